"""Workers on the nodes of a cluster: joined with a token, lost, drained, stopped, replaced."""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from raydiff.bench.loopback_cluster import LoopbackCluster, loopback_cluster
from raydiff.bench.null_model import MODEL
from raydiff.config import RunConfig
from raydiff.engine.cluster import joined_session
from raydiff.engine.cluster_file import ClusterLayout
from raydiff.engine.known_models import KnownModels
from raydiff.engine.ray_session import environ
from raydiff.engine.render import RunSummary, run_manifest
from raydiff.errors import ConfigError
from raydiff.manifest.reader import open_manifest
from raydiff.output.ledger import read_results
from raydiff.output.progress import Progress
from raydiff.output.verify import Verification

WritePrompts = Callable[[Sequence[str | None]], Path]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LoopbackCluster]:
    """A head without room for workers, one node for text encoders and two for denoising."""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    # A node's death is noticed after 3 s instead of 12.
    health = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
    with environ(PYTHONPATH=path, **health), loopback_cluster() as nodes:
        nodes.add_node(num_cpus=0)
        nodes.add_node(num_cpus=1, labels={"does": "encode"})
        nodes.add_node(num_cpus=2, labels={"does": "denoise"})
        yield nodes


def stage(number: int, does: str, **placement: object) -> dict[str, object]:
    return {"max": number, "resources": {"CPU": 1}, "labels": {"does": does}, **placement}


SPLIT = {"encode": stage(1, "encode"), "denoise_decode": stage(2, "denoise")}
FUSED = {"fused": stage(2, "denoise")}


def drive(
    cluster: LoopbackCluster,
    manifest: Path,
    out: Path,
    log: Path,
    stages: dict[str, Any] | None,
    *,
    row_ms: float = 5,
    renderer: str = "faulty_renderer:FaultyRenderer",
    engine: dict[str, Any] | None = None,
    **callbacks: Any,
) -> RunSummary:
    """Render on the cluster with the faulty renderer."""
    config = RunConfig.model_validate(
        {
            "out": str(out),
            "model": {"name": MODEL.name},
            "engine": {"address": cluster.address, "batch_size": 4, **(engine or {})},
            "output": {"commit_s": 0.2},
        }
    )
    return run_manifest(
        open_manifest(manifest),
        config=config,
        models=KnownModels(lambda name: MODEL),
        renderer=renderer,
        arguments={"log": str(log), "row_ms": row_ms},
        layout=ClusterLayout.model_validate({"stages": stages}) if stages else None,
        **callbacks,
    )


class Once:
    """Does something once, when so many rows are done; it gets the workers that are busy."""

    def __init__(self, num_rows: int, action: Callable[[list[dict[str, Any]]], None]) -> None:
        self._num_rows = num_rows
        self._action = action
        self.is_done = False
        self.warnings: list[str] = []

    def on_progress(self, progress: Progress) -> None:
        busy = [worker for worker in progress.workers if worker["state"] == "busy"]
        if not self.is_done and progress.done >= self._num_rows and busy:
            self.is_done = True
            self._action(busy)


def lines(log: Path) -> list[list[str]]:
    return [line.split(" ", 1) for line in log.read_text().splitlines()]


def check_whole(out: Path, num_rows: int) -> None:
    assert read_results(out)["row_index"].to_pylist() == list(range(num_rows))
    assert set(read_results(out)["status"].to_pylist()) == {"completed"}
    assert not [problem for problem in Verification(out) if problem.is_error]


def test_encoders_run_once_per_distinct_prompt_and_the_files_are_those_of_a_fused_run(
    tmp_path: Path, cluster: LoopbackCluster, write_prompts: WritePrompts
) -> None:
    manifest = write_prompts([f"prompt {number % 12} {number // 12 % 2}" for number in range(60)])
    split, fused = tmp_path / "split", tmp_path / "fused"
    split_log, fused_log = tmp_path / "split.log", tmp_path / "fused.log"
    summary = drive(cluster, manifest, split, split_log, SPLIT)
    assert (summary.completed, summary.exit_status) == (60, 0)
    drive(cluster, manifest, fused, fused_log, FUSED)

    encoded = Counter(text for word, text in lines(split_log) if word == "encoded")
    assert encoded == {f"prompt {number} {half}": 1 for number in range(12) for half in range(2)}
    assert "encoded" not in fused_log.read_text()
    hashes = [read_results(out)["sha256"].to_pylist() for out in (split, fused)]
    assert hashes[0] == hashes[1]
    workers = {worker.rpartition("-")[0] for worker in read_results(split)["worker_id"].to_pylist()}
    assert workers == {"denoise_decode"}
    assert summary.session is not None
    assert summary.session.texts_encoded == 24


def test_a_stopped_worker_is_killed_and_its_rows_are_rendered_by_another(
    tmp_path: Path, cluster: LoopbackCluster, write_prompts: WritePrompts
) -> None:
    manifest = write_prompts([f"prompt {number}" for number in range(80)])
    stopped: list[int] = []

    def stop(busy: list[dict[str, Any]]) -> None:
        stopped.append(busy[0]["pid"])
        os.kill(stopped[0], signal.SIGSTOP)

    once = Once(8, stop)
    summary = drive(
        cluster,
        manifest,
        tmp_path / "out",
        tmp_path / "renders.log",
        FUSED,
        row_ms=20,
        engine={"health_timeout_s": 4},
        on_progress=once.on_progress,
        on_warning=once.warnings.append,
    )
    assert (summary.completed, summary.exit_status) == (80, 0)
    check_whole(tmp_path / "out", 80)
    assert any("it has not answered for" in warning for warning in once.warnings)
    assert summary.session is not None
    assert summary.session.restarts.get("hung") == 1
    until = time.monotonic() + 20
    while is_stopped(stopped[0]):  # it was another node's to kill
        assert time.monotonic() < until
        time.sleep(0.1)


def is_stopped(pid: int) -> bool:
    try:
        return "\nState:\tT" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_node_that_is_drained_loses_no_work(
    tmp_path: Path, cluster: LoopbackCluster, write_prompts: WritePrompts
) -> None:
    manifest = write_prompts([f"prompt {number}" for number in range(120)])
    spot = cluster.add_node(num_cpus=1, labels={"does": "spot"})
    cluster.add_node(num_cpus=1, labels={"does": "spot"})
    drained = Once(20, lambda busy: cluster.drain_node(spot, deadline_s=60))
    log = tmp_path / "renders.log"
    summary = drive(
        cluster,
        manifest,
        tmp_path / "out",
        log,
        {"fused": stage(2, "spot")},
        row_ms=40,
        on_progress=drained.on_progress,
        on_warning=drained.warnings.append,
    )
    assert summary.exit_status == 0
    check_whole(tmp_path / "out", 120)
    assert sum("is being drained" in warning for warning in drained.warnings) == 1
    assert set(Counter(line[0] for line in lines(log)).values()) == {1}
    assert summary.session is not None
    assert summary.session.restarts == {"stopped": 1}


def test_each_gpu_that_joins_gets_a_worker(
    tmp_path: Path, cluster: LoopbackCluster, write_prompts: WritePrompts
) -> None:
    manifest = write_prompts([f"prompt {number}" for number in range(10_000)])
    cluster.add_node(num_cpus=1, num_gpus=1)

    def join(busy: list[dict[str, Any]]) -> None:
        cluster.add_node(num_cpus=2, num_gpus=2)

    joined = Once(8, join)

    def watch(progress: Progress) -> None:
        joined.on_progress(progress)
        at_work.update(worker["worker_id"] for worker in progress.workers if worker["rows"])
        if len(at_work) == 3 and not seen:
            seen.append(True)
            os.kill(os.getpid(), signal.SIGINT)  # that is all there is to see

    at_work: set[str] = set()
    seen: list[bool] = []
    log = tmp_path / "renders.log"
    engine = {"stages": "fused"}
    summary = drive(
        cluster, manifest, tmp_path / "out", log, None, row_ms=40, engine=engine, on_progress=watch
    )
    assert summary.exit_status == 130
    assert at_work == {"w0", "w1", "w2"}
    gpus = {line[1].rpartition("gpus=")[2] for line in lines(log)}
    assert gpus == {"0", "1"}


def test_texts_of_a_lost_node_are_encoded_again_on_one_that_joins(
    tmp_path: Path, cluster: LoopbackCluster, write_prompts: WritePrompts
) -> None:
    manifest = write_prompts([f"prompt {number % 3}, {number}" for number in range(60)])
    doomed = cluster.add_node(num_cpus=1, labels={"does": "doomed"})

    def replace_node(busy: list[dict[str, Any]]) -> None:
        cluster.kill_node(doomed)
        cluster.add_node(num_cpus=1, labels={"does": "doomed"})

    # Embeddings of this renderer are large: they stay on the node that made them.
    once = Once(8, replace_node)
    summary = drive(
        cluster,
        manifest,
        tmp_path / "out",
        tmp_path / "renders.log",
        {"encode": stage(1, "doomed"), "denoise_decode": stage(2, "denoise")},
        renderer="raydiff.bench.chaos_renderer:ChaosRenderer",
        row_ms=200,
        engine={"lookahead": 16},
        on_progress=once.on_progress,
        on_warning=once.warnings.append,
    )
    assert once.is_done
    assert (summary.completed, summary.exit_status) == (60, 0)
    check_whole(tmp_path / "out", 60)
    assert any("encode-0" in warning and "died" in warning for warning in once.warnings)
    assert summary.session is not None
    assert summary.session.restarts == {"node": 1}


def test_a_cluster_is_joined_only_if_it_asks_for_a_token(
    cluster: LoopbackCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with joined_session(cluster.address) as session:
        session.open()
        assert len(session.nodes) >= 3
    with joined_session("auto") as session:
        session.open()
        assert len(session.nodes) >= 3
    other = tmp_path / "token"
    other.write_text("1" * 64)
    other.chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(other))
    with (
        joined_session(cluster.address) as session,
        pytest.raises(ConfigError, match="does not take this token"),
    ):
        session.open()


@pytest.mark.parametrize(
    ("address", "match"),
    [
        ("127.0.0.1:9", r"no Ray head answers there: .*refused"),
        ("somewhere", "expected host:port, e.g. 10.0.0.1:6379"),
        ("ray://10.0.0.1:10001", "client mode is not supported"),
    ],
)
def test_an_address_that_cannot_be_joined(
    address: str, match: str, cluster: LoopbackCluster
) -> None:
    with joined_session(address) as session, pytest.raises(ConfigError, match=match):
        session.open()


def test_a_cluster_without_tokens_is_refused_unless_insecure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret" * 8)
    with loopback_cluster(has_token=False) as cluster:
        cluster.add_node(num_cpus=1)
        with (
            joined_session(cluster.address) as session,
            pytest.raises(ConfigError, match=r"asks for no token.*--insecure"),
        ):
            session.open()
        with joined_session(cluster.address, insecure=True) as session:
            session.open()
            assert len(session.nodes) == 1
