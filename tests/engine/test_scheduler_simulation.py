"""Each row ends exactly once and every run ends, whatever is lost: hundreds of random runs."""

import random
from collections import Counter

import pytest

from raydiff.config import EngineConfig
from raydiff.engine.messages import Place
from raydiff.engine.scheduler import Scheduler
from raydiff.request import RenderRequest
from tests.engine.scheduling import places, request
from tests.engine.simulated_cluster import SimulatedCluster, Weather


def random_places(rng: random.Random) -> list[Place]:
    """Workers of a fused run, or of a split one of two or three stages."""
    num = lambda: rng.randint(1, 3)  # noqa: E731
    return rng.choice(
        [
            places(fused=rng.randint(1, 5)),
            places(encode=num(), denoise_decode=num()),
            places(encode=num(), denoise=num(), decode=num()),
        ]
    )


def random_elastic(rng: random.Random, of: list[Place]) -> list[Place]:
    """Places for some more workers, which may come and go."""
    roles = sorted({place.role for place in of})
    return [
        Place(worker_id=f"elastic{index}", role=rng.choice(roles), is_elastic=True)
        for index in range(rng.randint(0, 4))
    ]


def unplaceable(rng: random.Random, of: list[Place], elastic: list[Place]) -> frozenset[str]:
    """Some elastic places, and perhaps the last of the others that its role can do without."""
    names = {place.worker_id for place in elastic if rng.random() < 0.4}
    if sum(place.role == of[-1].role for place in of) > 1 and rng.random() < 0.3:
        names.add(of[-1].worker_id)
    return frozenset(names)


def random_rows(rng: random.Random) -> list[RenderRequest]:
    """Rows of two models and sizes that share some of their prompts."""
    return [
        request(
            number,
            height=rng.choice([64, 128]),
            model=rng.choice("ab"),
            prompt=rng.choice([None, None, f"shared {number % 5}"]),
            guidance_scale=rng.choice([1.0, 5.0]),
        )
        for number in range(rng.randint(1, 80))
    ]


def machine_of(rng: random.Random, of: list[Place], **config: object) -> Scheduler:
    settings = EngineConfig.model_validate(
        {
            "batch_size": rng.choice(["auto", 1, 4]),
            "batches_in_flight": rng.randint(1, 3),
            "max_crashes": rng.choice([2, 3]),
            "max_failed_percent": 100,
            **config,
        }
    )
    return Scheduler(of, settings, embeds_cache_bytes=rng.choice([0, 50, 10**6]))


def offer(machine: Scheduler, rows: list[RenderRequest]) -> None:
    for row in rows:
        machine.offer(row)
    machine.close_input()


@pytest.mark.parametrize("seed", range(200))
def test_each_row_ends_once_whatever_dies(seed: int) -> None:
    """Poison of every stage, hung workers, chance, lost nodes, drained nodes, open shards."""
    rng = random.Random(seed)
    of, rows = random_places(rng), random_rows(rng)
    ids = [row.request_id for row in rows]
    roles = sorted({place.role for place in of} - {"encode"})
    poison = {one: rng.choice(roles) for one in rng.sample(ids, min(2, len(ids)))}
    has_texts = any(place.role == "encode" for place in of)
    lone = [row for row in rows if row.prompt.startswith("prompt")] if has_texts else []
    texts = [row.prompt for row in lone if row.request_id not in poison][:2]
    elastic = random_elastic(rng, of)
    weather = Weather(
        poison=poison,
        hangs=frozenset(one for one in poison if rng.random() < 0.3),
        bad_rows=frozenset(rng.sample(ids, min(3, len(ids)))) - set(poison),
        bad_texts=frozenset(texts[:1]),
        deadly_texts=frozenset(texts[1:]),
        crash_chance=0.05,
        hang_chance=0.01,
        num_node_deaths=rng.randint(0, 3),
        num_start_failures=rng.randint(0, 2),
        shard_rows=rng.choice([None, 5, 100]),
        elastic=elastic,
        num_place_changes=rng.randint(0, 3),
        unplaceable=unplaceable(rng, of, elastic),
    )
    machine = machine_of(rng, of)
    offer(machine, rows)
    cluster = SimulatedCluster(machine, of, weather, rng)
    assert cluster.run() is None
    expected: Counter[tuple[str, str]] = Counter()
    for row in rows:
        is_bad = row.request_id in weather.bad_rows or row.prompt in weather.bad_texts
        is_poison = row.request_id in poison or row.prompt in weather.deadly_texts
        if row.prompt in weather.deadly_texts:
            is_bad = False
        status = "failed" if is_bad else "quarantined" if is_poison else "completed"
        expected[row.request_id, status] += 1
    assert cluster.ends == expected
    assert not cluster.latents


@pytest.mark.parametrize("seed", range(50))
def test_each_row_ends_once_where_a_worker_is_broken(seed: int) -> None:
    rng = random.Random(seed)
    of, rows = random_places(rng), random_rows(rng)
    broken = rng.choice([place for place in of if place.role != "encode"])
    weather = Weather(broken_worker=broken.worker_id, shard_rows=rng.choice([None, 5]))
    machine = machine_of(rng, of, max_worker_failures=3)
    offer(machine, rows)
    cluster = SimulatedCluster(machine, of, weather, rng)
    assert cluster.run() is None
    assert Counter(request_id for request_id, _ in cluster.ends.elements()) == Counter(
        row.request_id for row in rows
    )


@pytest.mark.parametrize("seed", range(50))
def test_a_drained_run_ends_soon_and_no_row_ends_twice(seed: int) -> None:
    rng = random.Random(seed)
    of, rows = random_places(rng), random_rows(rng)
    machine = machine_of(rng, of)
    weather = Weather(
        crash_chance=0.1,
        hang_chance=0.02,
        num_node_deaths=2,
        shard_rows=rng.choice([None, 5, 100]),
        bad_rows=frozenset(row.request_id for row in rng.sample(rows, len(rows) // 3)),
    )
    offer(machine, rows)
    cluster = SimulatedCluster(machine, of, weather, rng)
    if cluster.advance(rng.randint(0, 80)) is None:
        machine.drain()
        assert cluster.run(max_steps=300) is None
    counts = Counter(request_id for request_id, _ in cluster.ends.elements())
    assert not counts or max(counts.values()) == 1


@pytest.mark.parametrize("seed", range(30))
def test_what_lies_in_the_cluster_is_bounded(seed: int) -> None:
    rng = random.Random(seed)
    of = places(encode=1, denoise=rng.randint(1, 4), decode=rng.randint(1, 2))
    rows = [request(number, prompt=f"shared {number % 9}") for number in range(300)]
    machine = machine_of(rng, of, batches_in_flight=2, batch_size=1)
    offer(machine, rows)
    cluster = SimulatedCluster(machine, of, Weather(), rng)
    assert cluster.run() is None
    num_denoise = sum(place.role == "denoise" for place in of)
    num_decode = sum(place.role == "decode" for place in of)
    # A queue before the decoders, what they hold, and what comes from the denoisers at once.
    assert cluster.num_latents_most <= 4 * num_decode + 2 * num_denoise
