"""A user's scoring hook, by its import path `module:name`: a function, or what makes one."""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from raydiff.engine.worker import Failure, attempt
from raydiff.errors import ConfigError, nearest

Hook = Callable[..., Any]
"""Takes pixels, uint8 (H, W, 3) or a clip's (F, H, W, 3), and the file's metadata row; returns a
value or a dict."""


def find_hook(path: str, arguments: dict[str, Any], import_dir: str) -> Hook:
    """Import what `path` names, also from `import_dir`, and check that it can be called.

    Raises ConfigError, naming what is nearest.
    """
    module, colon, name = path.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), name]):
        raise ConfigError(
            f"--with {path}: expected module:function, e.g. raydiff.score_hooks:sharpness"
        )
    if import_dir not in sys.path:
        sys.path.insert(0, import_dir)
    found = getattr(_import(path, module, import_dir), name, None)
    if found is None:
        known = [one for one in vars(sys.modules[module]) if not one.startswith("_")]
        raise ConfigError(
            f"--with {path}: {module} has no {name!r}; "
            f"{nearest(name, known) or 'name a function or class of it.'}".rstrip()
        )
    if not callable(found):
        raise ConfigError(f"--with {path}: {type(found).__name__} cannot be called")
    is_factory(path, found, arguments)
    return found  # type: ignore[no-any-return]


def make_hook(path: str, found: Hook, arguments: dict[str, Any]) -> Hook:
    """Return the function itself with its arguments, or what the class or factory makes."""
    if not is_factory(path, found, arguments):
        return partial(found, **arguments)
    made = found(**arguments)
    if not callable(made):
        raise ConfigError(f"it gave {type(made).__name__}, which cannot be called")
    hook: Hook = made
    return hook


def is_factory(path: str, found: Hook, arguments: dict[str, Any]) -> bool:
    """Tell what makes a hook from a hook: a class, or a function that takes no pixels.

    Raises ConfigError for what can be called as neither.
    """
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        return isinstance(found, type)  # built in, and says nothing of itself
    if not isinstance(found, type) and _binds(signature, None, None, **arguments):
        return False
    if _binds(signature, **arguments):
        return True
    given = "".join(f", {key}=..." for key in arguments)
    raise ConfigError(
        f"--with {path}: it takes {signature}, and would be called with (pixels, row{given}), or a "
        f"class or factory with ({given[2:]}). --set NAME=VALUE gives arguments by name."
    )


def _binds(signature: inspect.Signature, *args: None, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _import(path: str, module: str, import_dir: str) -> Any:
    spec = attempt(find_spec, module)
    if spec is None or (isinstance(spec, Failure) and "No module named" in spec.message):
        known = [one.stem for one in Path(import_dir).glob("*.py")]
        raise ConfigError(
            f"--with {path}: no module {module!r} in {import_dir} or among Python's packages; "
            f"{nearest(module, known) or 'run it where the module is, or set PYTHONPATH.'}".rstrip()
        )
    loaded = spec if isinstance(spec, Failure) else attempt(import_module, module)
    if isinstance(loaded, Failure):
        raise ConfigError(f"--with {path}: {module} cannot be imported: {loaded.message}")
    return loaded
