"""Aliases of checkpoints in a package folder of a test's own."""

import json
import shutil
from pathlib import Path

import pytest

from raydiff import config_files
from raydiff.weights import aliases

CONFIGS = Path(__file__).parents[2] / "configs"


def package_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let aliases look for what ships with raydiff in a folder, and return it."""
    monkeypatch.setattr(aliases, "PACKAGE", folder)
    return folder


def add_alias(name: str, configs: Path, monkeypatch: pytest.MonkeyPatch, **values: object) -> Path:
    """Add an alias to a copy of configs/ at `configs`, and return its file."""
    shutil.copytree(CONFIGS, configs)
    monkeypatch.setattr(config_files, "_configs_dir", lambda: configs)
    about = {"family": "sd21", "description": "a test's", "licence": "Apache-2.0"}
    file = configs / "models" / f"{name}.yaml"
    file.write_text(json.dumps(about | values), encoding="utf-8")
    return file
