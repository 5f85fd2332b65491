"""What workers are started with, and what a run says of itself."""

from pathlib import Path

import av
import pytest

from raydiff.config import RunConfig
from raydiff.engine.placement import fused_layout, local_layout
from raydiff.engine.render import RunSummary, render, worker_specs
from raydiff.errors import ConfigError, ModelError, OutputError


def config(**values: object) -> RunConfig:
    return RunConfig.model_validate(values)


def test_workers_on_the_cpu_see_no_gpu() -> None:
    on_cpu = worker_specs("out", config(), "m:C", {}, fused_layout(1000))["fused"]
    assert on_cpu.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert on_cpu.environ["OMP_NUM_THREADS"] == "1"
    on_gpus = worker_specs("out", config(), "m:C", {}, fused_layout(2, num_gpus=2))["fused"]
    assert "CUDA_VISIBLE_DEVICES" not in on_gpus.environ


def test_threads_of_a_worker_wait_as_the_user_says_or_else_briefly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def waits() -> dict[str, str]:
        spec = worker_specs("out", config(), "m:C", {}, fused_layout(2))["fused"]
        return {name: spec.environ[name] for name in spec.environ if "SPIN" in name}

    monkeypatch.delenv("OMP_WAIT_POLICY")  # the tests' own
    assert waits() == {"GOMP_SPINCOUNT": "2000"}
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    assert waits() == {}


def test_each_role_has_its_own_specification() -> None:
    layout = local_layout(config(engine={"stages": "split"}), [])
    specs = worker_specs("out", config(engine={"batch_size": 3}), "m:C", {"a": 1}, layout)
    assert {role: spec.role for role, spec in specs.items()} == {
        "encode": "encode",
        "denoise_decode": "denoise_decode",
    }
    assert {spec.batch_size for spec in specs.values()} == {3}


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


def test_an_encoder_that_is_missing_ends_a_run_of_clips_before_it_begins(
    tmp_path: Path, tiny_sd21: Path, tiny_ltx2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx265"})
    values = {"prompts": ("a cat",), "output": {"codec": "hevc"}, "limit": 1}
    clips = config(**values, ltx2={"text_encoder": "random"})
    with pytest.raises(ConfigError, match=r"output\.codec is hevc; .* no encoder libx265"):
        render(out=tmp_path / "out", config=clips, model=str(tiny_ltx2))
    assert not (tmp_path / "out").exists()
    # A run of images asks for no encoder: it gets as far as its folder.
    with pytest.raises(OutputError, match="does not exist"):
        render(out=tmp_path / "a" / "b", config=config(**values), model=str(tiny_sd21))
