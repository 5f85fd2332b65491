"""raydiff renders a Parquet manifest of prompts into images and videos on every GPU there is.

    raydiff.render("prompts.parquet", "out", model="sdxl")      what `raydiff render` calls
    raydiff.load_pipeline("sdxl", device="cuda")                 one resident pipeline
    raydiff.read_results("out")                                  the metadata as a pyarrow Table
    raydiff.score("out", "raydiff.score_hooks:sharpness")        what `raydiff score` calls

Names are imported on first use, so that `import raydiff` loads neither torch nor ray.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "load_pipeline": "raydiff.pipelines.load",
    "render": "raydiff.engine.render",
    "read_results": "raydiff.output.ledger",
    "score": "raydiff.engine.score",
    "RunConfig": "raydiff.config",
    "RenderRequest": "raydiff.request",
    "RaydiffError": "raydiff.errors",
}

__all__ = [
    "RaydiffError",
    "RenderRequest",
    "RunConfig",
    "__version__",
    "load_pipeline",
    "read_results",
    "render",
    "score",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'raydiff' has no attribute {name!r}")
