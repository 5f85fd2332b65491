"""Short names of models: one file each in configs/models."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from raydiff.config_files import config_file, config_names
from raydiff.errors import ConfigError, ModelError, nearest

PACKAGE = Path(__file__).resolve().parents[1]

DEFAULTS = ("num_inference_steps", "guidance_scale", "strength")
"""What an alias may have defaults of its own for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alias:
    """A checkpoint under a short name: a published one, or one that ships with raydiff."""

    name: str
    family: str
    description: str
    licence: str
    repo: str | None = None
    """Hub id."""
    folder: str | None = None
    """In place of `repo`: a folder of the raydiff package."""
    gated: bool = False
    """Whether the Hub wants an account that has accepted the licence."""
    revision: str | None = None
    """Commit to pin; None is the Hub's default branch."""
    defaults: Mapping[str, float] = field(default_factory=dict)
    """What a request uses when it does not say, over the family's."""

    @property
    def path(self) -> Path | None:
        """Where a checkpoint that ships with raydiff lies; None for one of the Hub."""
        return None if self.folder is None else PACKAGE / self.folder

    @property
    def hub_id(self) -> str:
        """The repository to fetch from; ModelError for a checkpoint that should have been here."""
        if self.repo is None:
            raise ModelError(
                f"{self.name}: no checkpoint in {self.path}, so the installation is incomplete; "
                "install raydiff again with pip install --force-reinstall raydiff"
            )
        return self.repo


def alias_names() -> list[str]:
    """Return the known aliases, sorted."""
    return config_names("models")


def read_alias(name: str) -> Alias:
    """Read configs/models/<name>.yaml; ConfigError for an unknown name or a wrong file."""
    path = config_file("models", name)
    values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        alias = Alias(name=name, **values)
    except TypeError as error:
        raise ConfigError(f"{path}: {error}") from None
    if (alias.repo is None) == (alias.folder is None):
        raise ConfigError(f"{path}: give repo or folder, one of the two")
    for key in alias.defaults:
        if key not in DEFAULTS:
            raise ConfigError(
                f"{path}: defaults: there is no {key!r}; "
                f"{nearest(key, DEFAULTS)}known: {', '.join(DEFAULTS)}"
            )
    return alias
