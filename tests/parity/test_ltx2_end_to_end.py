"""LTX-2 folders saved by diffusers, rendered by us: through the command line and, in two stages and
distilled, through the pipeline, frames and sound are diffusers' own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from diffusers.pipelines.ltx2.utils import DISTILLED_SIGMA_VALUES
from PIL import Image

import raydiff
from raydiff.output.video.wav import read_wav
from raydiff.pipelines.load import load_pipeline
from raydiff.pipelines.ltx2.pipeline import LTX2Pipeline
from raydiff.video_settings import VideoMode
from raydiff.weights.published_ltx2 import LTX2Version
from tests.cli.command import cli
from tests.parity.ltx2_reference import GUIDED, UNGUIDED, Reference, write_image
from tests.pipelines.tiny_ltx2 import clip_request

PIXELS, SAMPLES = 1 / 255, 1e-3
"""How far a rounded frame, and a 16-bit sample, may be from the reference."""

VERSIONS: tuple[LTX2Version, ...] = ("2.0", "2.3")

ROW: dict[str, Any] = {
    "prompt": " a red cat on the video ",
    "negative_prompt": "blue",
    "seed": 11,
    "height": 64,
    "width": 96,
    "num_frames": 9,
    "frame_rate": 25.0,
    "num_inference_steps": 4,
    "stg_blocks": (0, 2),
    **GUIDED,
}

pytestmark = pytest.mark.filterwarnings("ignore:Accessing config attribute `hop_length`")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("end-to-end")


@pytest.fixture(scope="module")
def references(root: Path) -> dict[LTX2Version, Reference]:
    """Return the pipelines of both versions; `root` gets a folder of each one's name."""
    made = {version: Reference(version, root / f"tokenizer-{version}") for version in VERSIONS}
    for version, reference in made.items():
        reference.save(root / version)
    return made


def assert_equal(frames: np.ndarray, sound: np.ndarray, expected: tuple[Any, Any]) -> None:
    """Compare frames (F, H, W, 3) in 0..1 and sound (2, N), as long as the frames, with diffusers'
    sound, which is longer or shorter by a part of a latent."""
    expected_frames, expected_sound = expected[0][0], expected[1][0].numpy()
    assert frames.shape == expected_frames.shape
    assert np.abs(frames - expected_frames).max() <= PIXELS
    assert expected_frames.std() > 0.1
    num_samples = min(sound.shape[1], expected_sound.shape[1])
    assert num_samples > 0.9 * max(sound.shape[1], expected_sound.shape[1])
    assert np.abs(sound[:, :num_samples] - expected_sound[:, :num_samples]).max() <= SAMPLES
    assert 0.02 < expected_sound.std() < 0.7


def test_clips_of_the_command_line_equal_diffusers(
    root: Path, references: dict[LTX2Version, Reference]
) -> None:
    write_image(root / "first.png", 97, 145)
    rows = [
        {**ROW, "model": version, "task": task, "init_image": image, "seed": 11 + index}
        for index, (version, task, image) in enumerate(
            (version, task, image)
            for version in VERSIONS
            for task, image in (("txt2vid", None), ("img2vid", "first.png"))
        )
    ]
    table = pa.Table.from_pylist([{**row, "stg_blocks": list(ROW["stg_blocks"])} for row in rows])
    pq.write_table(table, root / "clips.parquet")
    settings = {"video": "frames", "wav": "true"}
    options = [
        word for key, value in settings.items() for word in ("--set", f"output.{key}={value}")
    ]
    run = cli("render", "clips.parquet", "--out", "out", *options, "--json", cwd=root)
    assert json.loads(run.stdout.splitlines()[-1])["completed"] == len(rows)

    for row, result in zip(rows, raydiff.read_results(root / "out").to_pylist(), strict=True):
        folder = (root / "out" / result["file_name"]).parent
        frames = [np.asarray(Image.open(path)) / 255 for path in sorted(folder.glob("*.png"))]
        with folder.with_suffix(".wav").open("rb") as file:
            sound = read_wav(file)
        assert result["nfe"] == 4 * 4
        assert (result["num_frames"], result["duration_s"]) == (9, 9 / 25)
        assert sound.sample_rate == result["audio_sample_rate"]
        asked = {name: row[name] for name in ROW}
        if row["init_image"] is not None:
            asked["init_image"] = str(root / row["init_image"])
        reference = references[row["model"]]
        assert_equal(np.stack(frames), sound.samples, reference.reference(asked))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mode", ["distilled", "two_stage"])
def test_loaded_folders_make_diffusers_clips_in_other_modes(
    root: Path, references: dict[LTX2Version, Reference], version: LTX2Version, mode: VideoMode
) -> None:
    pipeline, reference = load_pipeline(str(root / version), device="cpu"), references[version]
    assert isinstance(pipeline, LTX2Pipeline)
    if mode == "distilled":
        row = {**ROW, **UNGUIDED, "stg_blocks": (), "num_inference_steps": 8}
        scheduler = reference.fixed_scheduler()
        expected = reference.reference(row, scheduler, sigmas=DISTILLED_SIGMA_VALUES)
    else:
        row = {**ROW, "height": 128, "width": 192}
        frames, sound, _ = reference.reference_in_two_stages(row, reference.refine_transformer)
        expected = frames, sound
    clip = pipeline.render([clip_request(pipeline, mode=mode, **row)])
    assert clip.audio[0] is not None
    assert_equal(clip.pixels[0] / 255, clip.audio[0].samples, expected)
