"""How many workers a run gets, and what they are started with."""

from pathlib import Path

import pytest

from raydiff.config import RunConfig
from raydiff.engine.cluster import Resources
from raydiff.engine.render import RunSummary, choose_resources, render, worker_spec
from raydiff.errors import ConfigError, ModelError, OutputError
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


@pytest.mark.parametrize(
    ("settings", "num_gpus", "expected"),
    [
        ({}, 3, (3, 3)),
        ({}, 0, (1, 0)),
        ({"engine": {"workers": 2}}, 3, (2, 2)),
        ({"engine": {"workers": 4}}, 0, (4, 0)),
        ({"memory": {"profile": "cpu_only"}}, 3, (1, 0)),
        ({"memory": {"profile": "cpu_only"}, "engine": {"workers": 5}}, 3, (5, 0)),
        ({"memory": {"profile": "cpu_only", "devices": {"vae": "cuda"}}}, 3, (3, 3)),
    ],
)
def test_a_worker_per_gpu_or_one_on_the_cpu(
    settings: dict[str, object], num_gpus: int, expected: tuple[int, int]
) -> None:
    resources = choose_resources(config(**settings), GPUS[:num_gpus])
    assert (resources.num_workers, resources.num_gpus) == expected


def test_more_workers_than_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"there are 3\. Use --workers 3"):
        choose_resources(config(engine={"workers": 4}), GPUS)


def test_workers_on_the_cpu_see_no_gpu_and_share_the_cores(tmp_path: Path) -> None:
    resources = Resources(num_workers=1000, num_gpus=0)
    spec = worker_spec(tmp_path, config(), "module:Class", {}, resources)
    assert spec.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert spec.environ["OMP_NUM_THREADS"] == "1"
    assert Path(spec.out).is_absolute()
    on_gpus = worker_spec(tmp_path, config(), "m:C", {}, Resources(num_workers=2, num_gpus=2))
    assert "CUDA_VISIBLE_DEVICES" not in on_gpus.environ


@pytest.mark.parametrize(
    ("failed", "quarantined", "is_interrupted", "status"),
    [(0, 0, False, 0), (1, 0, False, 1), (0, 1, False, 1), (1, 0, True, 130), (0, 0, True, 130)],
)
def test_the_exit_status(failed: int, quarantined: int, is_interrupted: bool, status: int) -> None:
    summary = RunSummary(
        out="out",
        completed=3,
        failed=failed,
        quarantined=quarantined,
        duplicates=0,
        ended=4,
        elapsed_s=1.0,
        is_interrupted=is_interrupted,
    )
    assert summary.exit_status == status


def test_nothing_is_written_where_nothing_can_be_rendered(tmp_path: Path, tiny_sd21: Path) -> None:
    out = tmp_path / "out"
    prompts = config(prompts=("a cat",))
    with pytest.raises(ConfigError, match="nothing to render"):
        render(out=out)
    with pytest.raises(ConfigError, match="no output folder"):
        render(config=prompts, model=str(tiny_sd21))
    with pytest.raises(ModelError):
        render(out=out, config=prompts, model=str(tmp_path / "no-such-model"))
    bad_size = config(prompts=("a cat",), defaults={"height": 63})
    with pytest.raises(ConfigError, match="63"):
        render(out=out, config=bad_size, model=str(tiny_sd21))
    assert not out.exists()
    with pytest.raises(OutputError, match="does not exist"):
        render(out=out / "deeper", config=prompts, model=str(tiny_sd21))
