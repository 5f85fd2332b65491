"""How a run scales with its workers: the same model and files on one GPU, then on more."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import raydiff
from raydiff.bench.engine import write_manifest
from raydiff.bench.random_modules import random_module
from raydiff.config import RunConfig
from raydiff.errors import ConfigError, EngineError
from raydiff.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from raydiff.models.clip import CLIPTextConfig, CLIPTextEncoder
from raydiff.models.unet import UNet, UNetConfig
from raydiff.pipelines.save import save_component, save_index
from raydiff.tokenizer import write_tiny_tokenizer
from raydiff.weights.published import PUBLISHED


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingReport:
    """One run. Its rate is taken from the moment when every worker has finished a batch."""

    num_workers: int
    num_images: int
    images_per_s: float
    speedup: float
    """Over the first of the runs, per worker of that one."""
    elapsed_s: float
    """Of the whole run, the loading of the models included."""


def bench_scaling(
    model: str | Path,
    out: str | Path,
    worker_counts: Sequence[int],
    *,
    images_per_worker: int,
    batch_size: int,
    num_inference_steps: int,
    profile: str = "auto",
) -> Iterator[ScalingReport]:
    """Render with each number of workers into a folder of its own below `out`."""
    base: float | None = None
    for num_workers in worker_counts:
        num_images = images_per_worker * num_workers
        manifest = Path(out) / f"manifest-{num_workers}.parquet"
        write_manifest(manifest, num_images)
        run_dir = Path(out) / f"run-{num_workers}"
        config = RunConfig.model_validate(
            {
                "manifest": str(manifest),
                "out": str(run_dir),
                "model": {"name": str(model)},
                "engine": {"workers": num_workers, "batch_size": batch_size, "stages": "fused"},
                "memory": {"profile": profile},
                "defaults": {"num_inference_steps": num_inference_steps},
            }
        )
        summary = raydiff.render(config=config)
        if summary.completed != num_images:
            raise EngineError(
                f"{run_dir}: {summary.completed} of {num_images} images were completed; a rate of "
                "some is no measure. `raydiff query` shows their errors."
            )
        rate = steady_rate(run_dir, num_workers)
        base = base or rate / num_workers
        yield ScalingReport(
            num_workers=num_workers,
            num_images=num_images,
            images_per_s=rate,
            speedup=rate / base,
            elapsed_s=summary.elapsed_s,
        )


def steady_rate(run_dir: Path, num_workers: int) -> float:
    """Return images per second from when the last worker has finished its first batch."""
    results = raydiff.read_results(run_dir, columns=["worker_id", "batch_size", "finished_at"])
    workers = np.array(results["worker_id"].to_pylist())
    sizes = results["batch_size"].to_numpy()
    finished = results["finished_at"].to_numpy().astype("datetime64[us]").astype(np.int64) / 1e6
    if len(np.unique(workers)) != num_workers:
        raise EngineError(
            f"{run_dir}: {len(np.unique(workers))} of {num_workers} workers rendered something; "
            "use more images per worker"
        )
    first_ends = []
    for worker in np.unique(workers):
        order = np.argsort(finished[workers == worker])
        first_size = int(sizes[workers == worker][order[0]])
        first_ends.append(finished[workers == worker][order[first_size - 1]])
    since = max(first_ends)
    return float((finished > since).sum() / (finished.max() - since))


def write_random_checkpoint(family: str, folder: Path) -> Path:
    """Write a full-size checkpoint with random weights, drawn on the GPU, in bfloat16."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "bench scaling draws full-size weights on a GPU, and torch sees none; name a "
            "checkpoint with --model, or run `raydiff doctor`"
        )
    torch.manual_seed(0)
    published = PUBLISHED[family]
    builders: dict[str, Any] = {
        "unet": lambda config: random_module(UNet, UNetConfig.from_dict(config), torch.bfloat16),
        "vae": lambda config: random_module(
            AutoencoderKL, AutoencoderKLConfig.from_dict(config), torch.bfloat16
        ),
    }
    for name, config in published.items():
        if name.startswith("text_encoder"):
            write_tiny_tokenizer(folder / name.replace("text_encoder", "tokenizer"), "!")
            module = random_module(
                CLIPTextEncoder, CLIPTextConfig.from_dict(config), torch.bfloat16
            )
        elif name in builders:
            module = builders[name](config)
        else:
            continue
        tensors = {key: value.cpu().contiguous() for key, value in module.state_dict().items()}
        save_component(folder / name, config, tensors)
    encoders = {name: one for name, one in published.items() if name.startswith("text_encoder")}
    save_index(folder, encoders, published["scheduler"], is_sdxl=family == "sdxl")
    torch.cuda.empty_cache()
    return folder
