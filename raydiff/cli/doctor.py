"""`raydiff doctor`: what this machine has, what a run needs, and what to do about the rest."""

import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import click

GIB = 1024**3
MIN_SHM_BYTES = 256 * 1024**2
"""Ray keeps its object store there; raydiff passes no pixels through it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    state: Literal["ok", "warning", "problem"]
    detail: str


@click.command()
@click.option("--out", default=".", help="Folder whose disk is checked, or an object store's URI.")
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def doctor(out: str, is_json: bool) -> None:
    """Check Python, torch, CUDA, GPUs, Ray, shared memory, disk and the Hub token.

    Exit status 1 when something would keep a run from starting.

    \b
    raydiff doctor
    raydiff doctor --out /data/renders --json
    """
    checks = list(_checks(out))
    if is_json:
        click.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        for check in checks:
            mark = {"ok": "ok     ", "warning": "warning", "problem": "PROBLEM"}[check.state]
            click.echo(f"{mark}  {check.name}: {check.detail}")
    if any(check.state == "problem" for check in checks):
        sys.exit(1)


def _checks(out: str) -> Iterator[Check]:
    is_new_enough = sys.version_info >= (3, 11)
    yield Check(
        name="Python",
        state="ok" if is_new_enough else "problem",
        detail=f"{sys.version.split()[0]} at {sys.executable}; 3.11 or newer is needed",
    )
    for package in ("torch", "ray", "pyarrow", "safetensors", "tokenizers", "pillow", "av"):
        yield _package(package)
    yield from _gpus()
    yield _shared_memory()
    yield _object_store(out) if "://" in out else _disk(Path(out))
    yield _token()


def _package(name: str) -> Check:
    try:
        return Check(name=name, state="ok", detail=version(name))
    except PackageNotFoundError:
        return Check(name=name, state="problem", detail="not installed; pip install raydiff")


def _gpus() -> Iterator[Check]:
    from raydiff.memory.gpus import visible_gpus

    gpus = visible_gpus()
    for gpu in gpus:
        yield Check(
            name=f"GPU {gpu.cuda_index}",
            state="ok",
            detail=f"{gpu.name}, {gpu.free_bytes / GIB:.1f} of {gpu.total_bytes / GIB:.1f} GiB "
            f"free, driver {gpu.driver}",
        )
    if not gpus:
        variable = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f"; CUDA_VISIBLE_DEVICES={variable!r} may hide it" if variable is not None else ""
        yield Check(name="GPU", state="warning", detail=f"none found, the CPU renders{why}")
    import torch

    if gpus and not torch.cuda.is_available():
        detail = f"torch {torch.__version__} cannot use the GPU: install a CUDA build of torch"
        yield Check(name="CUDA", state="problem", detail=detail)
    else:
        yield Check(name="CUDA", state="ok", detail=torch.version.cuda or "torch built without it")


def _shared_memory() -> Check:
    shm = Path("/dev/shm")  # where Ray maps its object store
    if not shm.is_dir():
        return Check(name="shared memory", state="warning", detail="/dev/shm is not there")
    free = shutil.disk_usage(shm).free
    state: Literal["ok", "problem"] = "ok" if free >= MIN_SHM_BYTES else "problem"
    remedy = "" if state == "ok" else "; start the container with --shm-size=1g"
    return Check(name="shared memory", state=state, detail=f"{free / GIB:.1f} GiB free{remedy}")


def _object_store(uri: str) -> Check:
    """Try what a run needs of an object store: to list, to write once and to remove."""
    from raydiff.errors import ConfigError
    from raydiff.object_storage import ObjectStorage, StorageError

    name = f".doctor-{secrets.token_hex(8)}"
    try:
        storage = ObjectStorage(uri)
        storage.list_names()
        storage.create(name, b"1")
        is_conditional = not storage.create(name, b"2")
        storage.delete([name])
    except (ConfigError, StorageError) as error:
        return Check(name="object store", state="problem", detail=str(error))
    if is_conditional:
        return Check(name="object store", state="ok", detail=f"{uri} can be written")
    detail = f"{uri} can be written, but ignores conditional writes: start one run at a time in it"
    return Check(name="object store", state="warning", detail=detail)


def _disk(out: Path) -> Check:
    folder = next(path for path in [out.absolute(), *out.absolute().parents] if path.exists())
    free = shutil.disk_usage(folder).free
    is_writable = os.access(folder, os.W_OK)
    detail = f"{free / GIB:.1f} GiB free at {folder}"
    if not is_writable:
        return Check(name="disk", state="problem", detail=f"{folder} is not writable")
    return Check(name="disk", state="ok" if free > GIB else "warning", detail=detail)


def _token() -> Check:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return Check(name="Hugging Face", state="ok", detail="offline (HF_HUB_OFFLINE)")
    if get_token():
        return Check(name="Hugging Face", state="ok", detail="a token is set")
    detail = "no token: gated models need `hf auth login`"
    return Check(name="Hugging Face", state="warning", detail=detail)
