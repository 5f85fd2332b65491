"""The commands as a user calls them: good rows beside bad ones, bad input, exit statuses."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import raydiff
from raydiff.output.media import read_image_metadata
from tests.cli.command import cli


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as a manifest; what a row leaves out is null."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    pq.write_table(pa.table(columns or {"prompt": pa.array([], pa.string())}), path)
    return path


FAST = ("--set", "defaults.num_inference_steps=2", "--set", "defaults.guidance_scale=2")


def test_bad_rows_fail_alone_and_odd_prompts_are_data(tiny_sd21: Path, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "init.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "init.png").read_bytes()[:300])
    bad: list[tuple[dict[str, Any], str]] = [
        ({"height": 500}, "height is 500"),
        ({"sampler": "eular"}, '"euler"'),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"init_image": "init.png", "strength": 1.5}, "strength"),
        ({"init_image": "gone.png"}, "gone.png"),
        ({"init_image": "broken.png"}, "broken.png"),
        ({"init_image": "/etc/passwd"}, "input.root"),
        ({"init_image": "https://example.com/a.png"}, "URL"),
        ({"task": "txt2vid"}, "txt2vid"),
        ({"prompt": None}, "prompt"),
        ({"sampler": "lcm", "num_inference_steps": 60}, "lcm"),
    ]
    odd = [
        "nul\0byte",
        "two\nlines",
        "../../../tmp/evil",
        "<script>alert(1)</script>",
        "x" * 100_000,
    ]
    rows = [{"prompt": f"bad {i}", "tag": f"bad {i}"} | row for i, (row, _) in enumerate(bad)]
    rows += [{"prompt": prompt, "tag": "odd"} for prompt in odd]
    rows += [{"prompt": "the same", "seed": 5, "tag": f"twin {i}"} for i in range(3)]
    rows += [{"prompt": "image", "init_image": "init.png", "strength": 0.5, "tag": "img2img"}]
    write(tmp_path / "manifest.parquet", rows)

    cli("plan", "manifest.parquet", "--model", tiny_sd21, "--out", "out", cwd=tmp_path, status=1)
    assert not (tmp_path / "out").exists()
    run = cli(
        "render", "manifest.parquet", "--model", tiny_sd21, "--out", "out", *FAST, "--json",
        cwd=tmp_path, status=1,
    )  # fmt: skip
    summary = json.loads(run.stdout)
    assert (summary["completed"], summary["failed"]) == (len(odd) + 4, len(bad))

    results = raydiff.read_results(tmp_path / "out").to_pylist()
    assert [row["tag"] for row in results] == [row["tag"] for row in rows]
    for (_, message), row in zip(bad, results, strict=False):
        assert row["status"] == "failed"
        assert message in row["error"], row["error"]
    good = results[len(bad) :]
    assert all(row["status"] == "completed" for row in good)
    assert [row["prompt"] for row in good[: len(odd)]] == odd
    assert len({row["request_id"] for row in good}) == len(odd) + 2  # the twins are one
    for row in good:
        assert re.fullmatch(r"images/[0-9a-f]{2}/[0-9a-f]{32}\.png", row["file_name"])
        embedded = read_image_metadata(tmp_path / "out" / row["file_name"])
        assert embedded is not None
        assert embedded["prompt"] == row["prompt"]
    assert good[len(odd) - 1]["warning"] == "prompt cut to 77 tokens"
    assert {path.name for path in tmp_path.iterdir()} == {
        "init.png", "broken.png", "manifest.parquet", "out",
    }  # fmt: skip

    assert "all is well" in cli("verify", "out", cwd=tmp_path).stdout
    status = json.loads(cli("status", "out", "--json", cwd=tmp_path).stdout)
    assert (status["state"], status["done"], status["failed"]) == ("finished", 9, 12)
    victim = tmp_path / "out" / good[0]["file_name"]
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    assert good[0]["file_name"] in cli("verify", "out", cwd=tmp_path, status=1).stdout
    again = cli(
        "render", "manifest.parquet", "--model", tiny_sd21, "--out", "out", *FAST, "--json",
        cwd=tmp_path, status=1,
    )  # fmt: skip
    assert json.loads(again.stdout)["ended"] == 0


def test_prompts_formats_and_metadata_left_out(tiny_sdxl: Path, tmp_path: Path) -> None:
    run = cli(
        "render", "--prompt", "a", "--prompt", "b", "--model", tiny_sdxl, "--strip-metadata",
        "--set", "output.image=webp", "--set", "defaults.num_images=2", *FAST,
        cwd=tmp_path,
    )  # fmt: skip
    assert "4 completed" in run.stdout
    (out,) = tmp_path.glob("raydiff-out-*")
    results = raydiff.read_results(out).to_pylist()
    assert [(row["row_index"], row["image_index"]) for row in results] == [
        (0, 0), (0, 1), (1, 0), (1, 1),
    ]  # fmt: skip
    assert results[1]["seed"] == results[0]["seed"] + 1
    for row in results:
        with Image.open(out / row["file_name"]) as image:
            assert (image.format, image.size) == ("WEBP", (64, 64))
        assert read_image_metadata(out / row["file_name"]) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"promt": "x"}], '"prompt"'),
        ([{"prompt": 3}], "prompt"),
        ([{"prompt": "x", "seed": "seven"}], "seed"),
        ([{"prompt": "x", "height": "tall"}], "height"),
        ([], "no rows"),
        (b"", "0 bytes"),
        (b"PAR1 not really", "Parquet"),
    ],
    ids=["no-prompt", "prompt-type", "seed-type", "height-type", "empty", "0-byte", "not-parquet"],
)
def test_a_bad_manifest_is_refused_before_anything_is_written(
    content: Any, message: str, tiny_sd21: Path, tmp_path: Path
) -> None:
    path = tmp_path / "manifest.parquet"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write(path, content)
    run = cli("render", path, "--model", tiny_sd21, "--out", "out", cwd=tmp_path, status=2)
    assert message.lower() in run.stderr.lower()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["render"], "nothing to render"),
        (["render", "gone.parquet", "--out", "o"], "gone.parquet"),
        (["render", "gone.yaml"], "gone.yaml"),
        (["render", "--prompt", "x", "--model", "gone", "--out", "o"], "gone"),
        (["render", "--prompt", "x", "--set", "engine.batchsize=4"], "batch_size"),
        (["render", "--prompt", "x", "--set", "engine.workers=0"], "engine.workers"),
        (["render", "--prompt", "x", "--set", "nonsense"], "section.key=value"),
        (["render", "a.parquet", "--prompt", "x", "--out", "o"], "one or the other"),
        (["render", "a.parquet"], "--out"),
        (["status", "."], "not a run"),
        (["verify", "."], "not a run"),
        (["models", "inspect", "gone"], "gone"),
        (["bench", "model", "sdxl"], "GPU"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_clear_message(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    run = cli(*arguments, cwd=tmp_path, status=2)
    assert message in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_checkpoint_is_refused(tiny_sd21: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    subprocess.run(["cp", "-r", tiny_sd21, model], check=True)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    run = cli("render", "--prompt", "x", "--model", model, "--out", "out", cwd=tmp_path, status=2)
    assert "diffusion_pytorch_model.safetensors" in run.stderr
    assert not (tmp_path / "out").exists()


def test_a_pickle_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04")
    run = cli(
        "render", "--prompt", "x", "--model", "model.ckpt", "--out", "o", cwd=tmp_path, status=2
    )
    assert "safetensors" in run.stderr


def test_inspect_and_doctor_speak_json(tiny_sdxl: Path, tmp_path: Path) -> None:
    report = json.loads(cli("models", "inspect", tiny_sdxl, "--json", cwd=tmp_path).stdout)
    assert report["family"] == "sdxl"
    assert {part["name"] for part in report["components"]} == {
        "text_encoder", "text_encoder_2", "unet", "vae",
    }  # fmt: skip
    checks = json.loads(cli("doctor", "--json", cwd=tmp_path).stdout)
    states = {check["name"]: check["state"] for check in checks}
    assert states["Python"] == states["torch"] == states["ray"] == "ok"


def test_make_tiny_is_deterministic_and_keeps_what_is_there(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        assert "noise" in cli("models", "make-tiny", "sd21", folder, cwd=tmp_path).stdout
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert files
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    run = cli("models", "make-tiny", "sd21", "one", cwd=tmp_path, status=2)
    assert "not empty" in run.stderr


def test_a_run_ends_with_a_contact_sheet(tiny_sd21: Path, tmp_path: Path) -> None:
    command = ["render", "--model", tiny_sd21, *FAST, "--prompt", "one", "--prompt", "two"]
    command += ["--out", "out", "--set"]
    shown = cli(*command, "output.sheet=sheet.png", cwd=tmp_path)
    assert "sheet.png: 1 page, 2 results" in shown.stdout
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 2 * 64
    # It is no setting of the results: the run goes on without it, and with another.
    again = cli(*command, "output.sheet=other.pdf", "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["completed"] == 2
    assert "other.pdf: 1 page" in again.stderr
    assert (tmp_path / "other.pdf").read_bytes().startswith(b"%PDF")


def test_a_contact_sheet_that_cannot_be_written_is_said_first(
    tiny_sd21: Path, tmp_path: Path
) -> None:
    command = ["render", "--model", tiny_sd21, *FAST, "--prompt", "one", "--out", "out", "--set"]
    for name, reason in (("sheet.jpg", "a .png or a .pdf"), ("gone/sheet.png", "no folder gone")):
        refused = cli(*command, f"output.sheet={name}", cwd=tmp_path, status=2)
        assert reason in refused.stderr
        assert not (tmp_path / "out").exists()
