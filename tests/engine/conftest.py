"""Manifests and requests for the engine's tests, and the way to their faulty renderer."""

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydiff.bench.null_model import MODEL
from raydiff.engine.render import RunSummary
from raydiff.request import RenderBatch, RenderRequest, batch_key, with_request_id


@pytest.fixture(autouse=True)
def _importable_renderer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process and Ray's find the modules of this folder, and raydiff."""
    here = Path(__file__).parent
    monkeypatch.syspath_prepend(here)
    path = [str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))


@pytest.fixture
def drive() -> Callable[..., RunSummary]:
    """Return the function that renders a manifest with two faulty workers."""
    function: Callable[..., RunSummary] = import_module("drive").drive
    return function


@pytest.fixture
def make_batch() -> Callable[..., RenderBatch]:
    """Return a function that makes a batch of one request per prompt; `changes` are the values of
    all of them."""

    def make(prompts: Sequence[str], batch_id: int = 1, **changes: Any) -> RenderBatch:
        requests = tuple(_request(prompt, seed, changes) for seed, prompt in enumerate(prompts))
        return RenderBatch(batch_id=batch_id, key=batch_key(requests[0]), requests=requests)

    return make


@pytest.fixture
def write_prompts(tmp_path: Path) -> Callable[[Sequence[str | None]], Path]:
    """Return a function that writes a manifest of prompts; equal ones have equal seeds."""

    def write(prompts: Sequence[str | None]) -> Path:
        path = tmp_path / "manifest.parquet"
        seeds: dict[str | None, int] = {}
        columns = {
            "prompt": list(prompts),
            "seed": [seeds.setdefault(prompt, len(seeds)) for prompt in prompts],
            "tag": list(range(len(prompts))),
        }
        pq.write_table(pa.table(columns), path)
        return path

    return write


def _request(prompt: str, seed: int, changes: dict[str, Any]) -> RenderRequest:
    values = {
        "model": MODEL.name,
        "model_revision": MODEL.revision,
        "task": "txt2img",
        "prompt": prompt,
        "negative_prompt": None,
        "seed": seed,
        "height": 8,
        "width": 8,
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "guidance_rescale": 0.0,
        "sampler": "ddim",
    }
    return with_request_id(RenderRequest(**{**values, **changes}))
