"""The YAML files that ship with raydiff (configs/models, configs/profiles, configs/clusters): found
inside the installed package, or at the top of the checkout when it runs from source."""

from functools import cache
from pathlib import Path

from raydiff.errors import ConfigError, nearest


def config_file(kind: str, name: str) -> Path:
    """Return the path of configs/<kind>/<name>.yaml; ConfigError names the nearest known one."""
    names = config_names(kind)
    if name not in names:
        hint = nearest(name, names)
        known = ", ".join(names) or "none"
        raise ConfigError(f"configs/{kind}: there is no {name!r}; {hint}known: {known}")
    return _configs_dir() / kind / f"{name}.yaml"


def config_names(kind: str) -> list[str]:
    """Return the names of the files in configs/<kind>, without `.yaml`, sorted."""
    return sorted(path.stem for path in (_configs_dir() / kind).glob("*.yaml"))


@cache
def _configs_dir() -> Path:
    package = Path(__file__).resolve().parent
    # hatchling puts configs/ into the wheel as raydiff/configs; a checkout has it beside raydiff/.
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise ConfigError(
        f"{package}: its configs folder is missing, so the installation is incomplete; "
        "install raydiff again with pip install --force-reinstall raydiff"
    )
