"""Check the options of a component's config.json against those that we can run."""

from collections.abc import Iterable, Mapping
from typing import Any

from raydiff.errors import ModelError, nearest


def check_options(
    component: str,
    config: Mapping[str, Any],
    *,
    known: Iterable[str],
    accepted: Mapping[str, tuple[Any, ...]],
) -> None:
    """Raise ModelError for an option of another value than `accepted` has, or that is not `known`.

    Names that begin with an underscore are the writing program's own.
    """
    names = {*known, *accepted}
    for name, value in config.items():
        if name in accepted:
            if value not in accepted[name]:
                values = " or ".join(map(str, accepted[name]))
                raise ModelError(
                    f"{component} config: {name} is {value}; only {values} can be run. "
                    f"Check {component}/config.json."
                )
        elif name not in names and not name.startswith("_"):
            raise ModelError(
                f"{component} config: {name} is not an option. {nearest(name, names)}"
                f"Check {component}/config.json."
            )


def check_positive(component: str, name: str, value: object) -> None:
    """Raise ModelError unless `value` is a positive integer, or a sequence of them that has one."""
    values = value if isinstance(value, tuple) else (value,)
    if not values or not all(isinstance(item, int) and item > 0 for item in values):
        raise ModelError(
            f"{component} config: {name} is {value}; expected positive integers. "
            f"Check {component}/config.json."
        )
