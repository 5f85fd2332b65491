"""Train the miniatures from nothing. Those of images: scenes, the autoencoder they share, then each
model's text encoders and UNet; that of clips has a module of its own. The same code, seeds and kind
of device give the same models, but for rounding.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raydiff.errors import OutputError
from raydiff.mini.dataset import Dataset, make_dataset
from raydiff.mini.ltx2.train import train_clips
from raydiff.mini.recipe import FAMILIES, NUM_SCENES, RECIPES, AutoencoderRecipe, MiniFamily
from raydiff.mini.save import (
    load_autoencoder,
    save_autoencoder,
    save_miniature,
    save_tokenizers,
)
from raydiff.mini.slots import Slots, read_slots
from raydiff.mini.train_autoencoder import encode_scenes, train_autoencoder
from raydiff.mini.train_denoiser import train_denoiser
from raydiff.models.autoencoder_kl import AutoencoderKL
from raydiff.tokenizer import CLIPTokenizer

Log = Callable[[str], None]

AnyFamily = MiniFamily | Literal["ltx2"]

TENSORS = "shared.safetensors"
AUTOENCODER = "vae"


def train(
    out: str | Path,
    families: Sequence[AnyFamily] = FAMILIES,
    *,
    autoencoder: str | Path | None = None,
    scale: float = 1.0,
    log: Log = print,
) -> list[Path]:
    """Write OUT/mini-<family> for each family and return the folders.

    `autoencoder` is a folder that `train_shared` wrote, for the families that draw images; without
    it that training comes first. `scale` shortens everything (scenes, steps) for a quick try. On a
    GPU the families of images train side by side, on as many GPUs as there are. Raises OutputError
    where a folder is not empty, ModelError for an autoencoder that is not one of the miniatures'.
    """
    folders = {family: Path(out) / f"mini-{family}" for family in families}
    for folder in folders.values():
        _want_empty(folder)
    given = None if autoencoder is None else load_autoencoder(autoencoder)
    say, device = _start(log)
    of_images = {family: folders[family] for family in FAMILIES if family in folders}
    if of_images:
        _train_images(of_images, given, device, scale, say)
    if "ltx2" in folders:
        train_clips(folders["ltx2"], scale=scale, device=device, log=say)
    say("done")
    return list(folders.values())


def _train_images(
    folders: Mapping[MiniFamily, Path],
    given: AutoencoderKL | None,
    device: torch.device,
    scale: float,
    say: Log,
) -> None:
    tokenizers = {
        f"{family}.{name}": tokenizer
        for family, folder in folders.items()
        for name, tokenizer in save_tokenizers(RECIPES[family], folder).items()
    }
    dataset = make_dataset(max(1, int(NUM_SCENES * scale)), tokenizers)
    say(f"{len(dataset.tables):,} scenes")
    vae = given or _train_autoencoder(dataset, device, scale, say)
    vae.to(device)
    latents = encode_scenes(vae, dataset.tables, device).cpu()
    say("scenes encoded")
    with TemporaryDirectory(prefix="raydiff-mini-") as name:
        shared = Path(name)
        ids = {f"ids.{one}": torch.from_numpy(ids) for one, ids in dataset.input_ids.items()}
        slots = read_slots(torch.from_numpy(dataset.tables))._asdict()
        told = {f"slots.{key}": value.contiguous() for key, value in slots.items()}
        save_file({"latents": latents, **told, **ids}, shared / TENSORS)
        save_autoencoder(shared / AUTOENCODER, vae)
        del vae, latents, dataset
        jobs = [
            (family, folder, shared, scale, index)
            for index, (family, folder) in enumerate(folders.items())
        ]
        _run(jobs, is_parallel=device.type == "cuda")


def train_shared(out: str | Path, *, scale: float = 1.0, log: Log = print) -> Path:
    """Train the autoencoder that the miniatures share, write it into the folder OUT and return it.

    Raises OutputError where the folder is not empty.
    """
    folder = Path(out)
    _want_empty(folder)
    say, device = _start(log)
    dataset = make_dataset(max(1, int(NUM_SCENES * scale)), {})
    say(f"{len(dataset.tables):,} scenes")
    save_autoencoder(folder, _train_autoencoder(dataset, device, scale, say))
    say("done")
    return folder


def _want_empty(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder} is not empty; name a new folder with --out")


def _start(log: Log) -> tuple[Log, torch.device]:
    """Return a log with the seconds since now, and the device to train on."""
    started = time.monotonic()

    def say(text: str) -> None:
        log(f"{time.monotonic() - started:6.0f} s  {text}")

    torch.set_float32_matmul_precision("high")
    return say, torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _train_autoencoder(
    dataset: Dataset, device: torch.device, scale: float, log: Log
) -> AutoencoderKL:
    recipe = AutoencoderRecipe()
    recipe = replace(recipe, num_steps=max(1, int(recipe.num_steps * scale)))
    return train_autoencoder(recipe, dataset.tables, device, log)


def _run(jobs: Sequence[tuple[MiniFamily, Path, Path, float, int]], *, is_parallel: bool) -> None:
    if not is_parallel:
        for job in jobs:
            _train_family(*job)
        return
    context = get_context("spawn")
    processes = [context.Process(target=_train_family, args=job) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failed = [process for process in processes if process.exitcode]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(processes)} trainings failed; see above")


def _train_family(family: MiniFamily, folder: Path, shared: Path, scale: float, index: int) -> None:
    """Train one miniature from what the families share, in a folder."""
    started = time.monotonic()
    torch.set_float32_matmul_precision("high")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", index % torch.cuda.device_count())
        torch.cuda.set_device(device)
    tensors = load_file(shared / TENSORS)
    recipe = RECIPES[family]
    recipe = replace(recipe, num_steps=max(1, int(recipe.num_steps * scale)))
    tokenizers = {
        name: CLIPTokenizer.from_folder(folder / name.replace("text_encoder", "tokenizer"))
        for name in recipe.text_encoders
    }
    vocab_sizes = {name: tokenizer.vocab_size for name, tokenizer in tokenizers.items()}
    denoiser = train_denoiser(
        recipe,
        tensors["latents"].to(device),
        Slots(*(tensors[f"slots.{name}"].to(device) for name in Slots._fields)),
        {name: tensors[f"ids.{family}.{name}"].to(device) for name in tokenizers},
        {name: _empty_ids(tokenizer, device) for name, tokenizer in tokenizers.items()},
        vocab_sizes,
        lambda text: print(f"{time.monotonic() - started:6.0f} s  {text}", flush=True),
    )
    vae = load_autoencoder(shared / AUTOENCODER)
    save_miniature(recipe, folder, vae, denoiser, vocab_sizes)


def _empty_ids(tokenizer: CLIPTokenizer, device: torch.device) -> Tensor:
    ids = torch.from_numpy(tokenizer.encode([""]).input_ids[0])
    return ids.to(device, torch.int16)
