"""A worker without Ray: its role's stages, bad rows, memory, disks, files written on the side."""

import asyncio
import hashlib
import io
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raydiff.config import OutputConfig
from raydiff.engine.messages import (
    BatchReply,
    DenoiseReply,
    EncodeBatch,
    EncodeReply,
    FlushReply,
    Role,
    WorkerHealth,
    texts_of,
)
from raydiff.engine.worker import Worker, WorkerSpec
from raydiff.errors import EngineError
from raydiff.output import writer as writer_module
from raydiff.output.video.info import read_video_info
from raydiff.output.video.wav import read_wav
from raydiff.request import RenderBatch, RenderResult, num_evaluations
from raydiff.video_codecs import VideoFormat
from tests.clips import FRAME_RATE, NUM_FRAMES, video_settings

MakeBatch = Callable[..., RenderBatch]


def spec(
    out: Path,
    *,
    batch_size: int | None = None,
    role: Role = "fused",
    output: OutputConfig | None = None,
    **arguments: object,
) -> WorkerSpec:
    return WorkerSpec(
        renderer="faulty_renderer:FaultyRenderer",
        arguments={"log": str(out.parent / "renders.log"), **arguments},
        role=role,
        out=str(out),
        output=output or OutputConfig(),
        batch_size=batch_size,
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def run(worker_spec: WorkerSpec, batches: Sequence[RenderBatch]) -> list[BatchReply]:
    async def all_at_once() -> list[BatchReply]:
        worker = Worker("w7", worker_spec)
        await worker.start()
        return await asyncio.gather(*(worker.render(batch) for batch in batches))

    return asyncio.run(all_at_once())


def call(worker_spec: WorkerSpec, name: str, *arguments: object) -> Any:
    """Start a worker, call one of its methods, and send arguments and answer as Ray does."""

    async def started() -> Any:
        worker = Worker("w7", worker_spec)
        await worker.start()
        return await getattr(worker, name)(*pickle.loads(pickle.dumps(arguments)))

    return pickle.loads(pickle.dumps(asyncio.run(started())))


def encode(out: Path, batch: RenderBatch) -> tuple[list[Any], list[Any]]:
    """Return the batch's texts and their embeddings, from an `encode` worker."""
    texts = list(dict.fromkeys(text for request in batch.requests for text in texts_of(request)))
    _, *embeds = call(
        spec(out, role="encode"), "encode", EncodeBatch(encode_id=3, texts=tuple(texts))
    )
    return texts, embeds


def denoise(
    out: Path, batch: RenderBatch, **arguments: object
) -> tuple[DenoiseReply, list[np.ndarray]]:
    """Return what a `denoise` worker does with the embeddings of an `encode` worker."""
    texts, embeds = encode(out, batch)
    worker_spec = spec(out, role="denoise", **arguments)  # type: ignore[arg-type]
    reply, latents = call(worker_spec, "denoise", batch, texts, *embeds)
    return reply, latents


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.rglob("*.png")}


def in_order(reply: BatchReply, batch: RenderBatch) -> list[RenderResult]:
    """Return the results of a batch in the order of its requests."""
    results = {result.request_id: result for result in reply.results}
    return [results[request.request_id] for request in batch.requests]


def rendered_sizes(out: Path) -> list[int]:
    lines = (out.parent / "renders.log").read_text().splitlines()
    return [int(line.split()[2]) for line in lines]


def test_every_row_gets_a_file_and_what_it_cost(out: Path, make_batch: MakeBatch) -> None:
    batch = make_batch(["a", "b", "a long prompt"])
    (reply,) = run(spec(out), [batch])
    assert reply.batch_id == batch.batch_id
    results = {result.request_id: result for result in reply.results}
    assert set(results) == {request.request_id for request in batch.requests}
    for request in batch.requests:
        result = results[request.request_id]
        assert (result.status, result.batch_size, result.worker_id) == ("completed", 3, "w7")
        assert result.warning == ("cut" if "long" in request.prompt else None)
        assert result.file_name is not None
        with Image.open(out / result.file_name) as image:
            pixels = np.asarray(image)
        rng = np.random.default_rng(request.seed)
        assert np.array_equal(pixels, rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))


def test_a_row_that_raises_fails_alone(out: Path, make_batch: MakeBatch) -> None:
    prompts = ["a", "please raise", "c", "d"]
    batch = make_batch(prompts)
    (reply,) = run(spec(out), [batch])
    by_prompt = {request.request_id: request.prompt for request in batch.requests}
    statuses = {by_prompt[result.request_id]: result.status for result in reply.results}
    assert statuses == {
        "a": "completed",
        "please raise": "failed",
        "c": "completed",
        "d": "completed",
    }
    (error,) = [result.error for result in reply.results if result.error]
    assert error.startswith("ValueError: cannot render 'please raise' (")
    assert "faulty_renderer.py:" in error
    assert rendered_sizes(out) == [1, 1, 1]


def test_out_of_memory_halves_the_batch_and_is_remembered(out: Path, make_batch: MakeBatch) -> None:
    batches = [make_batch([f"{n} of {index}" for n in range(8)], index) for index in range(2)]
    replies = run(spec(out, max_rows=3), batches)
    assert [reply.max_batch_size for reply in replies] == [2, 2]
    assert all(result.status == "completed" for reply in replies for result in reply.results)
    assert rendered_sizes(out) == [2] * 16


def test_a_row_that_does_not_fit_alone_fails(out: Path, make_batch: MakeBatch) -> None:
    (reply,) = run(spec(out, max_rows=0), [make_batch(["a", "b"])])
    assert [result.error for result in reply.results] == ["1 rows do not fit"] * 2


def test_a_larger_batch_than_the_renderer_takes_is_split(out: Path, make_batch: MakeBatch) -> None:
    (reply,) = run(spec(out), [make_batch([str(n) for n in range(11)])])
    assert rendered_sizes(out) == [8] * 8 + [3] * 3
    assert reply.max_batch_size == 8


def test_a_batch_size_that_was_asked_for_is_taken(out: Path, make_batch: MakeBatch) -> None:
    (reply,) = run(spec(out, batch_size=3), [make_batch(["a", "b", "c", "d"])])
    assert rendered_sizes(out) == [3, 3, 3, 1]
    assert reply.max_batch_size == 3


def test_a_lost_device_is_the_worker_s_failure_not_the_rows(
    out: Path, make_batch: MakeBatch
) -> None:
    with pytest.raises(EngineError, match="the GPU failed"):
        run(spec(out), [make_batch(["a", "lose the GPU"])])


def test_a_disk_error_is_no_row_s_failure(out: Path, make_batch: MakeBatch) -> None:
    (out / "images").write_text("in the way")
    (reply,) = run(spec(out), [make_batch(["a", "b", "c"])])
    assert reply.results == ()
    assert reply.disk_error is not None
    assert "images" in reply.disk_error


def test_files_are_written_while_the_next_batch_renders(
    out: Path, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four batches of 100 ms, each with 100 ms of encoding: 500 ms, not 800."""
    encode = writer_module.encode_image

    def slow(*args: object, **kwargs: object) -> bytes:
        time.sleep(0.1)
        return encode(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(writer_module, "encode_image", slow)
    batches = [make_batch([f"a {index}", f"b {index}"], index) for index in range(4)]
    started = time.perf_counter()
    replies = run(spec(out, row_ms=50), batches)
    assert time.perf_counter() - started < 0.7
    assert [len(reply.results) for reply in replies] == [2] * 4


def test_batches_are_rendered_in_the_order_they_come(out: Path, make_batch: MakeBatch) -> None:
    batches = [make_batch([f"{index}"], index) for index in range(50)]
    run(spec(out, row_ms=0), batches)
    lines = (out.parent / "renders.log").read_text().splitlines()
    assert [line.split()[0] for line in lines] == [b.requests[0].request_id for b in batches]


# -- clips -----------------------------------------------------------------------------------------


CLIP: dict[str, Any] = {"task": "txt2vid", "height": 64, "width": 64, "sampler": "euler"}


@pytest.mark.parametrize("video", ["mp4", "webm", "gif"])
def test_a_clip_is_a_file_with_its_frames_rate_and_sound(
    video: VideoFormat, out: Path, make_batch: MakeBatch
) -> None:
    batch = make_batch(["a", "a silent one"], video=video_settings(), **CLIP)
    (reply,) = run(spec(out, output=OutputConfig(video=video)), [batch])
    for result, request in zip(in_order(reply, batch), batch.requests, strict=True):
        assert (result.status, result.error) == ("completed", None)
        assert result.file_name == f"videos/{request.request_id[:2]}/{request.request_id}.{video}"
        data = (out / result.file_name).read_bytes()
        assert (result.sha256, result.size_bytes) == (hashlib.sha256(data).hexdigest(), len(data))
        is_silent = "silent" in request.prompt
        assert result.audio_sample_rate == (None if is_silent else 24_000)
        assert result.duration_s == NUM_FRAMES / FRAME_RATE
        assert result.nfe == num_evaluations(request)
        assert result.write_s is not None
        info = read_video_info(io.BytesIO(data))
        assert (info.num_frames, info.height, info.width) == (NUM_FRAMES, 64, 64)
        assert info.duration_s == pytest.approx(NUM_FRAMES / FRAME_RATE, abs=0.01)
        assert (info.audio_codec is None) == (is_silent or video == "gif")
        assert info.metadata is not None
        assert info.metadata["prompt"] == request.prompt
        assert (info.metadata["num_frames"], info.metadata["stg_blocks"]) == (NUM_FRAMES, [29])
        assert "video" not in info.metadata
    assert sum(path.is_file() for path in out.rglob("*")) == 2


def test_a_clip_is_a_folder_of_frames_with_its_sound_beside_it(
    out: Path, make_batch: MakeBatch
) -> None:
    batch = make_batch(["a"], video=video_settings(), **CLIP)
    (reply,) = run(spec(out, output=OutputConfig(video="frames", wav=True)), [batch])
    (result,), (request,) = reply.results, batch.requests
    folder = out / f"videos/{request.request_id[:2]}/{request.request_id}"
    assert result.file_name == f"{folder.relative_to(out)}/frames.json"
    frames = [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]
    wanted = np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, 64, 64, 3), dtype=np.uint8)
    assert np.array_equal(frames, wanted)
    with folder.with_suffix(".wav").open("rb") as file:
        assert read_wav(file).samples.shape == (2, NUM_FRAMES / FRAME_RATE * 24_000)


def test_a_clip_that_its_format_cannot_hold_fails_alone(out: Path, make_batch: MakeBatch) -> None:
    fine = make_batch(["a"], video=video_settings(), **CLIP)
    odd = make_batch(["b"], video=video_settings(), **{**CLIP, "height": 63})
    both = replace(fine, requests=fine.requests + odd.requests)
    (reply,) = run(spec(out), [both])
    first, second = in_order(reply, both)
    assert first.status == "completed"
    assert (second.status, second.file_name) == ("failed", None)
    assert str(second.error).startswith("height is 63; a video in yuv420p needs an even one.")


# -- roles -----------------------------------------------------------------------------------------


def test_split_stages_write_the_files_of_a_fused_worker(
    tmp_path: Path, make_batch: MakeBatch
) -> None:
    batch = make_batch(["a", "b", "a long prompt", "a"])
    for name in ("fused", "two", "three"):
        (tmp_path / name).mkdir()
    fused = call(spec(tmp_path / "fused"), "render", batch)
    texts, embeds = encode(tmp_path / "two", batch)
    two_roles = spec(tmp_path / "two", role="denoise_decode")
    two = call(two_roles, "render_encoded", batch, texts, *embeds)
    denoised, latents = denoise(tmp_path / "three", batch)
    three = call(spec(tmp_path / "three", role="decode"), "decode", batch, denoised, latents)
    assert files(tmp_path / "fused") == files(tmp_path / "two") == files(tmp_path / "three")
    assert len(files(tmp_path / "three")) == 4
    for reply in (two, three):
        assert isinstance(reply, BatchReply)
        for one, other in zip(reply.results, fused.results, strict=True):
            measured = {"write_s": 0.0, "finished_at": 0.0}
            assert replace(one, **measured) == replace(other, **measured)


def test_an_encode_worker_answers_for_each_text(out: Path, make_batch: MakeBatch) -> None:
    batch = make_batch(["ab", "unreadable", "cde"])
    texts = tuple(text for request in batch.requests for text in texts_of(request))
    reply, *embeds = call(spec(out, role="encode"), "encode", EncodeBatch(encode_id=3, texts=texts))
    assert isinstance(reply, EncodeReply)
    assert (reply.encode_id, reply.sizes, reply.num_from_disk) == (3, (2, 0, 3), 0)
    assert reply.errors == (None, "'unreadable' cannot be encoded", None)
    assert reply.encode_s > 0
    assert [one if one is None else bytes(one) for one in embeds] == [b"ab", None, b"cde"]
    lines = (out.parent / "renders.log").read_text().splitlines()
    assert lines == ["encoded ab", "encoded cde"]


def test_a_row_without_latents_leaves_its_batch(out: Path, make_batch: MakeBatch) -> None:
    batch = make_batch(["a", "NaN", "c", "d", "e"])
    reply, latents = denoise(out, batch, max_rows=2)
    first, nan, *others = (request.request_id for request in batch.requests)
    assert reply.request_ids == (first, *others)
    assert [int(one[0, 0, 0]) for one in latents] == [0, 2, 3, 4]
    assert [(result.request_id, result.error) for result in reply.results] == [
        (nan, "NaN in latents")
    ]
    assert (reply.batch_id, reply.max_batch_size) == (batch.batch_id, 2)
    assert reply.batch_sizes == (2, 2, 2, 1)
    assert reply.latents_bytes == 4 * 4 * 8 * 8 * 4
    assert reply.denoise_s > 0
    assert (reply.device, reply.dtype) == ("cpu", "float32")


def test_a_row_that_raises_as_it_is_denoised_fails_alone(out: Path, make_batch: MakeBatch) -> None:
    batch = make_batch(["a", "please raise", "c"])
    reply, latents = denoise(out, batch)
    first, bad, last = (request.request_id for request in batch.requests)
    assert reply.request_ids == (first, last)
    assert reply.batch_sizes == (1, 1)
    assert len(latents) == 2
    assert [result.request_id for result in reply.results] == [bad]


def test_latents_are_found_by_their_row(out: Path, make_batch: MakeBatch) -> None:
    """A batch may come in parts, after its decoder died; a wrong row would be another's image."""
    batch = make_batch(["a", "b", "a long prompt", "black"])
    denoised, latents = denoise(out, batch)
    part = replace(batch, requests=batch.requests[:0:-1])
    reply = call(spec(out, role="decode"), "decode", part, denoised, latents)
    results = {result.request_id: result for result in reply.results}
    plain, long, black = (results[request.request_id] for request in batch.requests[1:])
    assert (plain.status, plain.batch_size) == ("completed", 4)
    assert long.warning == "cut"
    assert (black.status, black.error) == ("failed", "VAE overflow")
    assert len(results) == 3
    assert len(files(out)) == 2


def test_a_row_with_an_error_fails_alone(out: Path, make_batch: MakeBatch) -> None:
    batch = make_batch(["a", "NaN", "c"])
    (reply,) = run(spec(out), [batch])
    errors = {result.request_id: result.error for result in reply.results}
    assert [errors[request.request_id] for request in batch.requests] == [
        None,
        "NaN in latents",
        None,
    ]
    assert rendered_sizes(out) == [3, 3, 3]
    assert len(files(out)) == 2


def test_a_single_row_that_does_not_fit_steps_the_profile_down(
    out: Path, make_batch: MakeBatch
) -> None:
    batches = [make_batch(["a", "heavy", "c"]), make_batch(["d", "e"], 2)]
    first, second = run(spec(out), batches)
    assert all(result.status == "completed" for result in first.results)
    assert first.warnings == ("profile balanced", "profile gpu_poor")
    assert second.warnings == ()
    assert {result.profile for result in second.results} == {"gpu_poor"}
    assert second.max_batch_size == 8


def test_a_row_that_fits_no_profile_leaves_the_worker_as_it_was(
    out: Path, make_batch: MakeBatch
) -> None:
    batches = [make_batch([f"{index}"], index) for index in range(2)]
    first, second = run(spec(out, max_rows=0), batches)
    assert [result.error for result in first.results + second.results] == ["1 rows do not fit"] * 2
    assert len(first.warnings) == 2
    assert second.warnings == ()  # it is not tried for every row


def test_health_is_told_while_a_batch_renders(out: Path, make_batch: MakeBatch) -> None:
    async def ask() -> tuple[list[WorkerHealth], float]:
        worker = Worker("w7", spec(out, slow_s=1.5))
        await worker.start()
        before = await worker.health()
        rendering = asyncio.create_task(worker.render(make_batch(["slow", "b"])))
        await asyncio.sleep(0.3)
        asked = time.perf_counter()
        during = await worker.health()
        answered_s = time.perf_counter() - asked
        assert not rendering.done()
        await rendering
        return [before, during, await worker.health()], answered_s

    (before, during, after), answered_s = asyncio.run(ask())
    assert answered_s < 0.5
    assert [health.rows for health in (before, during, after)] == [0, 0, 2]
    assert before.busy_s + 0.1 < during.busy_s < after.busy_s
    assert 1.5 < after.busy_s < 10


def test_rows_wait_in_an_open_shard_until_it_is_flushed(out: Path, make_batch: MakeBatch) -> None:
    async def replies() -> tuple[list[BatchReply], list[FlushReply]]:
        output = OutputConfig(format="webdataset", shard_rows=4)
        worker = Worker("w7", spec(out, output=output))
        await worker.start()
        batches = [
            make_batch([f"a {index}", f"b {index}", f"c {index}"], index) for index in (0, 1)
        ]
        done = [await worker.render(batch) for batch in batches]
        return done, [await worker.flush(), await worker.flush()]

    (first, second), (flush, empty) = asyncio.run(replies())
    assert first.results == ()
    assert len(second.results) == 4
    assert len(flush.results) == 2
    assert empty == FlushReply(results=())
    results = second.results + flush.results
    assert all(result.status == "completed" and result.member for result in results)
    assert len({result.file_name for result in results}) == 2


def test_files_need_no_flush(out: Path) -> None:
    assert call(spec(out), "flush") == FlushReply(results=())
