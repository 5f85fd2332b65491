"""Check the options of a component's config.json against those that we can run."""

from collections.abc import Iterable, Mapping
from typing import Any

from raydiff.errors import ModelError, nearest


def check_options(
    component: str,
    config: Mapping[str, Any],
    *,
    accepted: Mapping[str, tuple[Any, ...]],
    known: Iterable[str] | None = None,
) -> None:
    """Raise ModelError for an option of another value than `accepted` has, or that is not `known`.

    A list is accepted if each of its items is. Without `known` other options may have any name.
    Names that begin with an underscore are the writing program's own.
    """
    names = None if known is None else {*known, *accepted}
    for name, value in config.items():
        if name in accepted:
            if not _is_accepted(value, accepted[name]):
                values = " or ".join(map(repr, accepted[name]))
                raise _error(component, f"{name} is {value!r}; only {values} can be run.")
        elif names is not None and name not in names and not name.startswith("_"):
            raise _error(component, f"{name} is not an option. {nearest(name, names)}".rstrip())


def positive(
    component: str, options: Mapping[str, Any], name: str, *, instead: str | None = None
) -> int:
    """The option, or the one named `instead` where it is None. Raises ModelError unless it is a
    positive integer."""
    value = options[name]
    if value is None and instead is not None:
        value = options[instead]
    if not _is_positive(value):
        raise _error(component, f"{name} is {value!r}; expected a positive integer.")
    number: int = value
    return number


def check_positive(component: str, name: str, value: object) -> None:
    """Raise ModelError unless `value` is a positive integer, or a sequence of them that has one."""
    values = value if isinstance(value, tuple) else (value,)
    if not values or not all(map(_is_positive, values)):
        raise _error(component, f"{name} is {value!r}; expected positive integers.")


def _is_accepted(value: Any, accepted: tuple[Any, ...]) -> bool:
    if value in accepted:
        return True
    return isinstance(value, list | tuple) and all(item in accepted for item in value)


def _is_positive(value: object) -> bool:
    return type(value) is int and value > 0


def _error(component: str, problem: str) -> ModelError:
    return ModelError(f"{component} config: {problem} Check {component}/config.json.")
