"""The models that the rows of a run name, each found once."""

from collections.abc import Callable, Collection
from functools import partial

from raydiff.config import LTX2Config, ModelConfig
from raydiff.request import ModelInfo
from raydiff.weights.components import STAGES, Needed, Stage, needed_by
from raydiff.weights.resolve import resolve_model


class KnownModels:
    """Finds models by name and remembers them."""

    def __init__(self, find: Callable[[str], ModelInfo]) -> None:
        self._find = find
        self._found: dict[str, ModelInfo] = {}
        self.on_found: Callable[[str, ModelInfo], None] | None = None
        """Called with each further name and what it stands for."""

    @property
    def revisions(self) -> dict[str, str]:
        """The revision of each model found so far, by the name that rows use."""
        return {name: info.revision for name, info in self._found.items()}

    def __call__(self, name: str) -> ModelInfo:
        """Return the model. Raises ModelError."""
        if name not in self._found:
            self._found[name] = self._find(name)
            if self.on_found is not None:
                self.on_found(name, self._found[name])
        return self._found[name]


def known_models(
    config: ModelConfig,
    ltx2: LTX2Config | None = None,
    stages: Collection[Stage] = STAGES,
    *,
    is_loaded_here: bool = True,
) -> KnownModels:
    """Return the models of a run; `model.revision` is that of `model.name` alone.

    Of a model on the Hub what these stages need is fetched, but no weights unless some process of
    this machine is to load them.
    """
    needed = needed_by(stages, ltx2 or LTX2Config())
    return KnownModels(partial(_resolve, config, needed, is_loaded_here))


def _resolve(config: ModelConfig, needed: Needed, has_weights: bool, name: str) -> ModelInfo:
    return resolve_model(
        name,
        revision=config.revision if name == config.name else None,
        variant=config.variant,
        dtype=config.dtype,
        needed=needed,
        has_weights=has_weights,
    )
