"""A worker without Ray: bad rows, memory, disks, and files written while the next batch renders."""

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raydiff.config import OutputConfig
from raydiff.engine.messages import BatchReply
from raydiff.engine.worker import Worker, WorkerSpec
from raydiff.errors import EngineError
from raydiff.output import writer as writer_module
from raydiff.request import RenderBatch

MakeBatch = Callable[..., RenderBatch]


def spec(out: Path, *, batch_size: int | None = None, **arguments: object) -> WorkerSpec:
    return WorkerSpec(
        renderer="faulty_renderer:FaultyRenderer",
        arguments={"log": str(out.parent / "renders.log"), **arguments},
        out=str(out),
        output=OutputConfig(),
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
