"""A pipeline folder saved by diffusers, rendered through the CLI, equals diffusers' own images."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import raydiff
from tests.cli.command import cli
from tests.parity.reference import SCHEDULERS, load_reference, render_reference, save_reference

PROMPT = "a corgi, 3 red cubes & a café at dusk"
NEGATIVES: tuple[str | None, ...] = (None, "", "blurry, low quality")


def manifest_rows(init_image: str) -> list[dict[str, Any]]:
    """Every sampler x task x guidance x negative prompt, sizes that are not square."""
    rows: list[dict[str, Any]] = []
    cases = product(SCHEDULERS, ("txt2img", "img2img"), (1.0, 7.5), NEGATIVES)
    for index, (sampler, task, guidance_scale, negative_prompt) in enumerate(cases):
        is_img2img = task == "img2img"
        rows.append(
            {
                "prompt": f"{PROMPT} {index}",
                "negative_prompt": negative_prompt,
                "task": task,
                "seed": 1000 + index,
                "height": 72,
                "width": 104,
                "num_inference_steps": 4 + index % 3,
                "guidance_scale": guidance_scale,
                "sampler": sampler,
                "strength": 0.6 if is_img2img else None,
                "init_image": init_image if is_img2img else None,
            }
        )
    return rows


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # diffusers' own
@pytest.mark.parametrize("kind", ["sd21-epsilon", "sd21-v", "sdxl"])
def test_cli_images_equal_diffusers(kind: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_reference(kind, model)
    pixels = np.random.default_rng(7).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    init_image = Image.fromarray(pixels).resize((104, 72), Image.Resampling.BICUBIC)
    init_image.save(tmp_path / "init.png")
    rows = manifest_rows("init.png")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "manifest.parquet")

    run = cli(
        "render", "manifest.parquet", "--model", "model", "--out", "out", "--json", cwd=tmp_path
    )
    assert json.loads(run.stdout.splitlines()[-1])["completed"] == len(rows)

    results = raydiff.read_results(tmp_path / "out").to_pylist()
    pipes = load_reference(model)
    worst = 0
    for row, result in zip(rows, results, strict=True):
        assert result["batch_size"] > 1
        ours = np.asarray(Image.open(tmp_path / "out" / result["file_name"])).astype(int)
        theirs = render_reference(pipes, row, init_image if row["init_image"] else None)
        difference = int(np.abs(ours - np.asarray(theirs).astype(int)).max())
        assert difference <= 1, f"{kind} {row}: {difference}/255 away from diffusers"
        assert ours.std() > 5  # an image, not a flat field
        worst = max(worst, difference)
    assert worst <= 1
