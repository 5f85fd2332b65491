"""How many workers a run gets, of which roles, and what each takes."""

import os
from pathlib import Path

import pytest

from raydiff.config import RunConfig
from raydiff.engine.cluster_file import ClusterLayout
from raydiff.engine.placement import (
    NodeInfo,
    cluster_layout,
    fused_layout,
    grown,
    local_layout,
    places,
)
from raydiff.errors import ConfigError
from raydiff.memory.gpus import GpuInfo

GPUS = [
    GpuInfo(
        cuda_index=index,
        uuid=f"GPU-{index}",
        name="H200",
        total_bytes=2**37,
        free_bytes=2**37,
        driver="580",
    )
    for index in range(3)
]


def config(**values: object) -> RunConfig:
    return RunConfig.model_validate(values)


def node(num_cpus: int, num_gpus: int = 0) -> NodeInfo:
    return NodeInfo(
        node_id=f"{num_cpus}-{num_gpus}",
        address="10.0.0.1",
        port=1,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        object_store_bytes=2**30,
    )


def numbers(layout: ClusterLayout) -> dict[str, tuple[int, int]]:
    """Workers, and GPUs of each, by role."""
    return {role: (one.num_workers, one.num_gpus) for role, one in layout.by_role.items()}


def never() -> bool:
    raise AssertionError("nobody needs to ask the GPUs")


# -- this machine ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "num_gpus", "expected"),
    [
        ({}, 3, {"fused": (3, 1)}),
        ({}, 0, {"fused": (1, 0)}),
        ({"engine": {"workers": 2}}, 3, {"fused": (2, 1)}),
        ({"engine": {"workers": 4}}, 0, {"fused": (4, 0)}),
        ({"memory": {"profile": "cpu_only"}}, 3, {"fused": (1, 0)}),
        ({"memory": {"profile": "cpu_only"}, "engine": {"workers": 5}}, 3, {"fused": (5, 0)}),
        (
            {"memory": {"profile": "cpu_only", "devices": {"vae": "cuda"}}},
            3,
            {"fused": (3, 1)},
        ),
        ({"engine": {"stages": "split"}}, 3, {"encode": (1, 0), "denoise_decode": (3, 1)}),
        (
            {"engine": {"cluster": "local-split"}},
            0,
            {"encode": (1, 0), "denoise": (1, 0), "decode": (1, 0)},
        ),
        (
            {"engine": {"cluster": "cpu-encoders"}},
            3,
            {"encode": (1, 0), "denoise_decode": (3, 1)},
        ),
    ],
)
def test_workers_of_one_machine(
    settings: dict[str, object], num_gpus: int, expected: dict[str, tuple[int, int]]
) -> None:
    layout = local_layout(config(**settings), GPUS[:num_gpus])
    assert numbers(layout) == expected
    assert not any(place.is_elastic for place in places(layout))


def test_more_workers_than_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"there are 3\. Use --workers 3"):
        local_layout(config(engine={"workers": 4}), GPUS)
    with pytest.raises(ConfigError, match="stage denoise_decode takes 1 GPU, and of 0 here"):
        local_layout(config(engine={"cluster": "cpu-encoders"}), [])
    with pytest.raises(ConfigError, match="stage decode takes 1 GPU, and of 1 here 0 are free"):
        local_layout(config(engine={"cluster": "three-stage"}), GPUS[:1])


@pytest.mark.parametrize(
    ("engine", "match"),
    [
        ({"cluster": "local-split", "workers": 2}, "engine.workers: 2: the cluster file"),
        ({"cluster": "local-split", "stages": "fused"}, "engine.stages: fused: the cluster file"),
        ({"cluster": "gpus", "stages": "split"}, "engine.stages: split: the cluster file"),
    ],
)
def test_settings_that_contradict_the_cluster_file_are_refused(
    engine: dict[str, object], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        local_layout(config(engine=engine), GPUS)
    with pytest.raises(ConfigError, match=match):
        cluster_layout(config(engine=engine), [node(8, 1)], encodes_on_cpu=never)


def test_workers_share_the_machine_s_cores() -> None:
    num_cores = len(os.sched_getaffinity(0))
    assert fused_layout(1).by_role["fused"].num_threads == num_cores
    assert fused_layout(1000).by_role["fused"].num_threads == 1


def test_places_have_names_that_say_their_stage() -> None:
    assert [place.worker_id for place in places(fused_layout(2))] == ["w0", "w1"]
    split = local_layout(config(engine={"stages": "split"}), GPUS[:2])
    ids = [place.worker_id for place in places(split)]
    assert ids == ["encode-0", "denoise_decode-0", "denoise_decode-1"]


# -- a cluster -------------------------------------------------------------------------------------


def test_a_worker_on_each_gpu_of_a_cluster() -> None:
    layout = cluster_layout(config(), [node(8), node(32, 4), node(64, 4)], encodes_on_cpu=bool)
    assert numbers(layout) == {"fused": (8, 1)}
    assert layout.by_role["fused"].num_cpus == 8
    assert all(place.is_elastic for place in places(layout))


def test_a_cluster_without_gpus_gets_the_workers_that_are_asked_for() -> None:
    nodes = [node(2), node(2)]
    layout = cluster_layout(config(engine={"workers": 4}), nodes, encodes_on_cpu=never)
    assert numbers(layout) == {"fused": (4, 0)}
    on_cpu = config(memory={"profile": "cpu_only"})
    assert numbers(cluster_layout(on_cpu, [node(8, 2)], encodes_on_cpu=never)) == {"fused": (1, 0)}


def test_stages_are_split_where_text_encoders_go_on_cpu_nodes() -> None:
    def asks(stages: str, nodes: list[NodeInfo], *, encodes_on_cpu: bool) -> bool:
        settings = config(engine={"stages": stages})
        return cluster_layout(settings, nodes, encodes_on_cpu=lambda: encodes_on_cpu).is_split

    mixed = [node(4), node(16, 2)]
    assert asks("auto", mixed, encodes_on_cpu=True)
    assert not asks("auto", mixed, encodes_on_cpu=False)
    assert not asks("auto", [node(16, 2)], encodes_on_cpu=True)
    assert not asks("auto", [node(4)], encodes_on_cpu=True)
    assert asks("split", [node(16, 2)], encodes_on_cpu=False)
    assert not asks("fused", mixed, encodes_on_cpu=True)
    layout = cluster_layout(config(), mixed, encodes_on_cpu=lambda: True)
    assert numbers(layout) == {"encode": (1, 0), "denoise_decode": (2, 1)}
    assert layout.by_role["encode"].num_cpus == 4


def test_places_grow_with_the_nodes_and_stay_when_one_is_gone() -> None:
    first = cluster_layout(config(), [node(8, 1), node(8, 1)], encodes_on_cpu=never)
    more = cluster_layout(config(), [node(8, 1)] * 3, encodes_on_cpu=never)
    fewer = cluster_layout(config(), [node(8, 1)], encodes_on_cpu=never)
    assert numbers(grown(first, more)) == {"fused": (3, 1)}
    assert numbers(grown(first, fewer)) == {"fused": (2, 1)}


def test_a_cluster_file_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("stages: {fused: {max: 9, resources: {CPU: 3, big: 1}, labels: {a: b}}}")
    settings = config(engine={"cluster": str(file)})
    fused = cluster_layout(settings, [], encodes_on_cpu=never).by_role["fused"]
    assert (fused.num_workers, fused.num_cpus, fused.is_elastic) == (9, 3, True)
    assert (fused.custom_resources, fused.labels) == ({"big": 1.0}, {"a": "b"})
