"""Clips of a tiny LTX-2 are made again from their metadata: the same bytes, in every format."""

import asyncio
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner

from raydiff.cli.reproduce import describe_rerendered, reproduce
from raydiff.config import OutputConfig, load_config
from raydiff.engine.known_models import known_models
from raydiff.engine.plan import open_rows
from raydiff.engine.render import RENDERER
from raydiff.engine.rerender import Rerendered, Rerenderer, request_of
from raydiff.engine.worker import Worker, WorkerSpec
from raydiff.errors import ConfigError, ModelError
from raydiff.manifest.rows import read_rows
from raydiff.output.ledger import Ledger
from raydiff.output.row_samples import find_request, sample_requests
from raydiff.output.run_file import start_run
from raydiff.output.verify import Verification
from raydiff.output.video.clip_files import sound_name
from raydiff.output.video.clip_reader import open_clip
from raydiff.output.video.writer import VideoWriter
from raydiff.output.writer import clip_of
from raydiff.request import RenderBatch, batch_key, num_evaluations
from raydiff.video_codecs import VideoFormat
from tests.weights.packaged import add_alias, package_in

NUM_FRAMES = 9


def render_clips(out: Path, model: str | Path, **output: object) -> None:
    """Render three clips in one batch on two threads with a real worker, and commit their rows."""
    values = {f"output.{name}": value for name, value in output.items()}
    defaults = {"height": 64, "width": 64, "num_frames": NUM_FRAMES, "frame_rate": 8.0}
    config = load_config(
        None,
        {
            "prompts": ["a fox", "a hen", "an owl"],
            "out": str(out),
            "model.name": str(model),
            "ltx2.text_encoder": "random",
            "defaults.num_inference_steps": 2,
            **{f"defaults.{name}": value for name, value in defaults.items()},
            **values,
        },
    )
    manifest, models = open_rows(config), known_models(config.model)
    rows = list(read_rows(manifest, config=config, models=models))
    requests = [row.request for row in rows if row.request is not None]
    spec = WorkerSpec(
        renderer=RENDERER,
        arguments={"model": config.model, "memory": config.memory, "ltx2": config.ltx2},
        out=str(out),
        output=config.output,
        batch_size=3,
        environ={"OMP_NUM_THREADS": "2"},
    )
    batch = RenderBatch(batch_id=1, key=batch_key(requests[0]), requests=tuple(requests))
    with start_run(
        out,
        config=config,
        manifest_uri=manifest.uri,
        manifest_fingerprint=manifest.fingerprint,
        num_rows=3,
        models=models.revisions,
    ) as run:
        worker = Worker("w0", spec)

        async def work() -> None:
            await worker.start()
            reply = await worker.render(batch)
            results = {one.request_id: one for one in reply.results}
            for row, request in zip(rows, requests, strict=True):
                result = results[request.request_id]
                assert (result.status, result.error) == ("completed", None)
                assert (result.nfe, result.batch_size) == (num_evaluations(request), 3)
                assert result.num_threads == 2
                ledger.add(row, result)

        ledger = Ledger(out, extra_schema=pa.schema([]), config=config.output, lock=run.lock)
        asyncio.run(work())
        ledger.commit()


def again(out: Path) -> list[Rerendered]:
    rows = sample_requests(out, share=1.0, number=1, seed=0).to_pylist()
    renderer = Rerenderer(out)
    return [renderer.render(row) for row in rows]


def test_a_run_names_a_packaged_model_by_its_alias(
    tiny_ltx2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = package_in(tmp_path / "package", monkeypatch)
    shutil.copytree(tiny_ltx2, package / "tiny")
    add_alias("tiny-clips", tmp_path / "configs", monkeypatch, folder="tiny", family="ltx2")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    render_clips(tmp_path / "out", "tiny-clips", video="mp4")
    package_in(package.rename(tmp_path / "elsewhere"), monkeypatch)
    rendered = again(tmp_path / "out")
    assert len(rendered) == 3
    assert all(one.is_equal for one in rendered)
    (row, *_) = sample_requests(tmp_path / "out", share=1.0, number=1, seed=0).to_pylist()
    assert row["model"] == "tiny-clips"
    config = tmp_path / "elsewhere" / "tiny" / "transformer" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(ModelError, match="tiny-clips: it is revision local-"):
        again(tmp_path / "out")


@pytest.fixture(scope="module")
def runs(tiny_ltx2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[VideoFormat, Path]:
    """Three clips as MP4s, and as folders of frames with their sound beside them."""
    folder = tmp_path_factory.mktemp("runs")
    formats: tuple[VideoFormat, ...] = ("mp4", "frames")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "2")  # The worker sets it; afterwards it is as it was.
        for video in formats:
            render_clips(folder / video, tiny_ltx2, video=video, wav=video == "frames")
    return {video: folder / video for video in formats}


@pytest.fixture(autouse=True, scope="module")
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("video", ["mp4", "frames"])
def test_a_clip_is_made_again_byte_for_byte(
    video: VideoFormat, runs: dict[VideoFormat, Path]
) -> None:
    """Wherever they stood in their batch, whose rows two threads shared."""
    assert list(Verification(runs[video])) == []
    for made in again(runs[video]):
        assert (made.is_equal, made.sound_snr) == (True, math.inf)
        assert made.data == (runs[video] / made.file_name).read_bytes()
        assert describe_rerendered(made).endswith("equal, byte for byte")


@pytest.mark.parametrize(
    ("noise", "gain", "is_near", "said"),
    [
        (1, 1.0, True, r"of 255 off, PSNR [3-9]\d\.\d dB"),
        (60, 1.0, False, r"of 255 off, PSNR [12]\d\.\d dB"),
        (0, 0.0, False, r"the sound differs, SNR -?\d+\.\d dB"),
    ],
    ids=["rounding", "other frames", "other sound"],
)
def test_a_clip_that_is_not_the_metadata_s_is_found(
    noise: int,
    gain: float,
    is_near: bool,
    said: str,
    runs: dict[VideoFormat, Path],
    tmp_path: Path,
) -> None:
    """As if the run had written it: as other hardware might have, or as another clip."""
    out = Path(shutil.copytree(runs["mp4"], tmp_path / "out"))
    row = sample_requests(out, share=0, number=1, seed=0).to_pylist()[0]
    with open_clip(runs["frames"], find_request(runs["frames"], row["request_id"])) as clip:
        pixels, audio = np.stack(list(clip.frames())), clip.sound()
    assert audio is not None
    rng = np.random.default_rng(0)
    wrong = pixels.astype(int) + rng.integers(-noise, noise + 1, pixels.shape)
    loud = (audio.samples * gain + (1 - gain) * 0.5).astype(np.float32)
    request = request_of(row)
    assert request.video is not None
    clip_now = clip_of(request, request.video, replace(audio, samples=loud), {})
    frames = wrong.clip(0, 255).astype(np.uint8)
    written = VideoWriter(out, OutputConfig()).save(clip_now, [frames])
    made = Rerenderer(out).render({**row, "sha256": written.sha256})
    assert (made.is_equal, made.is_near) == (False, is_near)
    assert re.search(said, describe_rerendered(made))


def test_the_sound_beside_frames_counts(runs: dict[VideoFormat, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(runs["frames"], tmp_path / "out"))
    row = sample_requests(out, share=0, number=1, seed=0).to_pylist()[0]
    path = out / sound_name(row["file_name"])
    data = bytearray(path.read_bytes())
    data[100:2000] = b"\x10" * 1900
    path.write_bytes(data)
    made = Rerenderer(out).render(row)
    assert (made.sha256, made.is_equal) == (row["sha256"], False)
    assert "the same frames; the sound differs" in describe_rerendered(made)
    path.unlink()
    assert "the sound is missing" in describe_rerendered(Rerenderer(out).render(row))


def test_a_folder_of_frames_is_no_single_file(runs: dict[VideoFormat, Path]) -> None:
    row = sample_requests(runs["frames"], share=0, number=1, seed=0).to_pylist()[0]
    arguments = [str(runs["frames"]), row["request_id"], "--to", "again.png"]
    result = CliRunner().invoke(reproduce, arguments)
    assert isinstance(result.exception, ConfigError)
    assert "is a folder of frames" in str(result.exception)
