"""Manifests and requests for the engine's tests, and the way to their faulty renderer."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydiff.bench.engine import MODEL
from raydiff.request import RenderBatch, RenderRequest, with_request_id

MakeRequest = Callable[[str, int], RenderRequest]


@pytest.fixture(autouse=True)
def _importable_renderer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives the driver's sys.path to its workers."""
    monkeypatch.syspath_prepend(Path(__file__).parent)


@pytest.fixture
def make_batch() -> Callable[[Sequence[str]], RenderBatch]:
    """Return a function that makes a batch of one request per prompt."""

    def make(prompts: Sequence[str], batch_id: int = 1) -> RenderBatch:
        requests = tuple(_request(prompt, seed) for seed, prompt in enumerate(prompts))
        return RenderBatch(batch_id=batch_id, model="null", height=8, width=8, requests=requests)

    return make


@pytest.fixture
def write_prompts(tmp_path: Path) -> Callable[[Sequence[str]], Path]:
    """Return a function that writes a manifest of prompts."""

    def write(prompts: Sequence[str]) -> Path:
        path = tmp_path / "manifest.parquet"
        pq.write_table(pa.table({"prompt": list(prompts), "tag": list(range(len(prompts)))}), path)
        return path

    return write


def _request(prompt: str, seed: int) -> RenderRequest:
    return with_request_id(
        RenderRequest(
            model=MODEL.name,
            model_revision=MODEL.revision,
            task="txt2img",
            prompt=prompt,
            negative_prompt=None,
            seed=seed,
            height=8,
            width=8,
            num_inference_steps=1,
            guidance_scale=1.0,
            guidance_rescale=0.0,
            sampler="ddim",
        )
    )
