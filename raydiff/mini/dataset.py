"""Training data: a million scenes as numbers to draw, each with tokenized captions.

Scenes come in chunks, each from a seed of its own, so that any number of processes make the same.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raydiff.mini.captions import caption
from raydiff.mini.draw import table
from raydiff.mini.recipe import CAPTIONS_PER_SCENE, DATA_SEED
from raydiff.mini.scenes import is_held_out, place, sample_scene
from raydiff.tokenizer import CLIPTokenizer

CHUNK_SCENES = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Scenes to train on; none is held out."""

    tables: NDArray[np.float32]
    """(N, objects, fields) for `draw`."""
    input_ids: dict[str, NDArray[np.int16]]
    """By text encoder: (N, CAPTIONS_PER_SCENE, MAX_TOKENS)."""


def make_dataset(num_scenes: int, tokenizers: dict[str, Path]) -> Dataset:
    """Make the first `num_scenes` scenes, on all cores; `tokenizers` are folders."""
    seeds = range(-(-num_scenes // CHUNK_SCENES))
    chunk = partial(_chunk, tokenizers=tokenizers)
    if len(seeds) == 1:
        chunks = [chunk(0)]
    else:
        # Spawned, not forked: this process may have started CUDA.
        num_processes = len(os.sched_getaffinity(0))
        with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
            chunks = list(pool.map(chunk, seeds))
    return Dataset(
        tables=np.concatenate([one.tables for one in chunks])[:num_scenes],
        input_ids={
            name: np.concatenate([one.input_ids[name] for one in chunks])[:num_scenes]
            for name in tokenizers
        },
    )


def _chunk(seed: int, *, tokenizers: dict[str, Path]) -> Dataset:
    rng = np.random.default_rng([DATA_SEED, seed])
    tables: list[NDArray[np.float32]] = []
    texts: list[str] = []
    while len(tables) < CHUNK_SCENES:
        scene = sample_scene(rng)
        if is_held_out(scene):
            continue
        placed = place(scene, rng)
        if placed is None:
            continue
        tables.append(table(scene, placed, rng))
        texts += [caption(scene, rng) for _ in range(CAPTIONS_PER_SCENE)]
    return Dataset(
        tables=np.stack(tables),
        input_ids={name: _tokenize(folder, texts) for name, folder in tokenizers.items()},
    )


def _tokenize(folder: Path, texts: Sequence[str]) -> NDArray[np.int16]:
    ids = CLIPTokenizer.from_folder(folder).encode(texts).input_ids.astype(np.int16)
    return ids.reshape(-1, CAPTIONS_PER_SCENE, ids.shape[-1])
