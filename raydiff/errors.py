"""The errors that raydiff raises on purpose, each saying subject, value, rule and remedy.

RaydiffError
├── InputError          the command cannot start; nothing was rendered (exit status 2)
│   ├── ConfigError         a job file, an option or a --set override
│   ├── ManifestError       the manifest as a whole: missing, empty, wrong columns or types
│   ├── ModelError          a checkpoint: not found, incomplete, wrong tensors, refused format
│   └── OutputError         the output folder: not writable, locked, another run's
├── RowError            one row of the manifest; it becomes that row's `error`, the run goes on
├── OutOfMemoryError    a batch did not fit the device
└── EngineError         the run cannot go on: no worker could start, all were lost (exit status 1)
    └── DiskError           a file could not be written: disk full, permission lost
"""

from collections.abc import Iterable
from difflib import get_close_matches


class RaydiffError(Exception):
    """Base of every error that raydiff raises on purpose."""


class InputError(RaydiffError):
    """The command cannot start as it was given."""


class ConfigError(InputError):
    """A job file, an option or an override is wrong."""


class ManifestError(InputError):
    """The manifest as a whole cannot be used."""


class ModelError(InputError):
    """A checkpoint cannot be found, read or loaded."""


class OutputError(InputError):
    """The output folder cannot be used."""


class RowError(RaydiffError):
    """One row cannot be rendered; the message becomes its `error`."""


class OutOfMemoryError(RaydiffError):
    """A batch did not fit the device."""


class EngineError(RaydiffError):
    """The run cannot go on."""


class DiskError(EngineError):
    """An output file could not be written."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `did you mean "x"? ` for the known name nearest to `name`, or an empty string."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    matches = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f'did you mean "{by_lower[matches[0]]}"? ' if matches else ""
