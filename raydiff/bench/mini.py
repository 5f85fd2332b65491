"""What the miniatures have learnt: pictures of held-out captions, and whether they show them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import raydiff
from raydiff.mini.captions import caption
from raydiff.mini.ltx2.measure import ClipScore
from raydiff.mini.measure import Score, background_name, score
from raydiff.mini.recipe import FAMILIES
from raydiff.mini.scenes import Scene, is_held_out, place, sample_scene
from raydiff.pipelines.base import Pipeline
from raydiff.request import ModelInfo, RenderRequest, with_request_id

SCENE_SEED = 7
MINIATURES = tuple(f"mini-{family}" for family in FAMILIES)
"""Those that ship with raydiff."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MiniReport:
    """Shares of the pictures that show what the caption says, of all groups in it together."""

    model: str
    num_captions: int
    guidance_scale: float
    num_inference_steps: int
    sampler: str
    color: float
    shape: float
    count: float
    position: float
    """Of the captions that say where a group stands."""
    background: float
    everything: float
    """All of these at once."""
    seconds_per_image: float


def held_out_scenes(num_scenes: int, *, seed: int = SCENE_SEED) -> list[tuple[Scene, str]]:
    """Return scenes that no training has seen, each with a caption that leaves nothing open."""
    rng = np.random.default_rng(seed)
    found: list[tuple[Scene, str]] = []
    while len(found) < num_scenes:
        scene = sample_scene(rng)
        if is_held_out(scene) and place(scene, rng) is not None:
            found.append((scene, caption(scene, rng, open_share=0.0)))
    return found


def bench_mini(
    model: str,
    *,
    num_captions: int = 400,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    sampler: str | None = None,
    batch_size: int = 16,
    sheet: str | Path | None = None,
) -> MiniReport:
    """Render held-out captions with a miniature and look at the pictures; `sheet` shows them."""
    pipeline = raydiff.load_pipeline(model)
    info = pipeline.info
    chosen: dict[str, Any] = {
        "guidance_scale": info.default_guidance_scale if guidance_scale is None else guidance_scale,
        "num_inference_steps": num_inference_steps or info.default_num_inference_steps,
        "sampler": sampler or info.default_sampler,
    }
    scenes = held_out_scenes(num_captions)
    requests = [request_of(info, text, seed, **chosen) for seed, (_, text) in enumerate(scenes)]
    started = time.perf_counter()
    pictures = render_batches(pipeline, requests, batch_size)
    elapsed_s = time.perf_counter() - started
    scores = [score(scene, one) for (scene, _), one in zip(scenes, pictures, strict=True)]
    if sheet is not None:
        _save_sheet(pictures, Path(sheet))
    has_background = [
        background_name(one) == scene.background
        for (scene, _), one in zip(scenes, pictures, strict=True)
    ]
    is_right = [
        one.is_right and is_ground for one, is_ground in zip(scores, has_background, strict=True)
    ]
    return MiniReport(
        model=model,
        num_captions=num_captions,
        **chosen,
        color=share(scores, "color"),
        shape=share(scores, "shape"),
        count=share(scores, "count"),
        position=share(scores, "position"),
        background=float(np.mean(has_background)),
        everything=float(np.mean(is_right)),
        seconds_per_image=elapsed_s / num_captions,
    )


def share(scores: Sequence[Score | ClipScore], name: str) -> float:
    """Return how many of the pictures or clips that can be right in this respect are."""
    values = [getattr(one, name) for one in scores]
    return float(np.mean([value for value in values if value is not None]))


def request_of(info: ModelInfo, prompt: str, seed: int, **values: Any) -> RenderRequest:
    """Return an image as a model draws it by default, or what else `values` make of it."""
    defaults: dict[str, Any] = {
        "task": "txt2img",
        "negative_prompt": None,
        "height": info.default_height,
        "width": info.default_width,
        "num_inference_steps": info.default_num_inference_steps,
        "guidance_scale": info.default_guidance_scale,
        "guidance_rescale": 0.0,
        "sampler": info.default_sampler,
    }
    return with_request_id(
        RenderRequest(
            model=info.name,
            model_revision=info.revision,
            prompt=prompt,
            seed=seed,
            **(defaults | values),
        )
    )


def render_batches(
    pipeline: Pipeline, requests: Sequence[RenderRequest], batch_size: int
) -> list[NDArray[np.uint8]]:
    """Return the picture (H, W, 3) of each request, which all are of one size."""
    starts = range(0, len(requests), batch_size)
    batches = [pipeline.render(requests[start : start + batch_size]) for start in starts]
    return [picture for batch in batches for picture in batch.pixels]


def _save_sheet(pictures: Sequence[np.ndarray], path: Path) -> None:
    side = int(len(pictures) ** 0.5)
    rows = [np.concatenate(pictures[row * side : (row + 1) * side], axis=1) for row in range(side)]
    Image.fromarray(np.concatenate(rows)).save(path)
