"""The bench of clips on the tiny LTX-2: what it prints, and the arithmetic of the large one."""

import json
from typing import Any

import pytest
from click.testing import CliRunner

from raydiff.bench.video import forward_flops
from raydiff.bench.video_job import Sampling, Scene, samplings
from raydiff.cli import main


def bench(*options: str) -> list[dict[str, Any]]:
    run = CliRunner().invoke(main, ["bench", "video", "--tiny", "--json", *options])
    assert run.exit_code == 0, run.output
    return [json.loads(line) for line in run.output.splitlines()]


def test_both_renderers_are_measured_in_every_stage() -> None:
    results = bench("--steps", "2", "--guidance", "full", "--batch-size", "2")
    assert [result["renderer"] for result in results] == ["diffusers", "raydiff"]
    for result in results:
        assert (result["nfe"], result["batch_size"], result["dtype"]) == (8, 2, "bf16")
        stages = [result[f"{stage}_s"] for stage in ("encode", "denoise", "decode")]
        assert all(seconds > 0 for seconds in stages)
        assert result["step_s"] == pytest.approx(result["denoise_s"] / 2)
        # All its passes are in the denoising, and nothing else.
        assert 0 < result["forward_s"] * 2 * 8 < result["denoise_s"]
        assert result["transformer_tflop_per_s"] > 0
    theirs, ours = results
    assert theirs["write_s"] is None
    assert ours["total_s"] == pytest.approx(sum(stages) + ours["write_s"])


def test_fp8_is_compared_with_bf16_in_the_same_run() -> None:
    (result,) = bench("--dtype", "fp8", "--version", "2.3", "--steps", "8", "--no-peer")
    assert (result["renderer"], result["dtype"], result["version"]) == ("raydiff", "fp8", "2.3")
    assert (result["guidance"], result["nfe"]) == ("none", 8)
    assert 0.001 < result["fp8_error"] < 0.1
    assert result["fp8_speed_up"] > 0


def test_the_line_for_people_says_what_was_measured() -> None:
    options = ["--tiny", "--no-peer", "--steps", "1", "--guidance", "cfg"]
    run = CliRunner().invoke(main, ["bench", "video", *options])
    assert run.exit_code == 0, run.output
    assert "raydiff   LTX-2.0 bf16 eager    1 steps, guidance cfg, 2 NFE, batch 1; " in run.output
    assert "encode" in run.output
    assert "TFLOP/s" in run.output


def test_without_a_choice_distilled_and_guided_clips_are_measured() -> None:
    distilled, guided = samplings(None, None)
    assert (distilled, guided) == (
        Sampling(num_steps=8, guidance="none"),
        Sampling(num_steps=40, guidance="cfg"),
    )
    assert (distilled.mode, guided.mode) == ("distilled", "one_stage")
    assert samplings(8, None) == [distilled]
    assert samplings(None, "full") == [Sampling(num_steps=40, guidance="full")]


def test_the_arithmetic_of_one_forward_pass_is_counted() -> None:
    """198.8 TFLOP at 768x512 and 121 frames: 18.9 billion parameters, most of which 6,144 tokens
    see, and attention among these."""
    assert forward_flops(Scene(batch_size=2)) == pytest.approx(198.8e12, rel=0.002)
