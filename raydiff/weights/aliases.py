"""Short names of models: one file each in configs/models."""

from dataclasses import dataclass
from typing import Any

import yaml

from raydiff.config_files import config_file, config_names
from raydiff.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Alias:
    """A published checkpoint under a short name."""

    name: str
    repo: str
    """Hub id."""
    family: str
    description: str
    licence: str
    gated: bool
    """Whether the Hub wants an account that has accepted the licence."""
    revision: str | None = None
    """Commit to pin; None is the Hub's default branch."""


def alias_names() -> list[str]:
    """Return the known aliases, sorted."""
    return config_names("models")


def read_alias(name: str) -> Alias:
    """Read configs/models/<name>.yaml; ConfigError for an unknown name or a wrong file."""
    path = config_file("models", name)
    values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        return Alias(name=name, **values)
    except TypeError as error:
        raise ConfigError(f"{path}: {error}") from None
