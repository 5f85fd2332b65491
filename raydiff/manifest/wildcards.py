"""Wildcards: `__name__` in a template stands for a line of FOLDER/name.txt."""

import hashlib
from pathlib import Path

from raydiff.errors import ConfigError, nearest
from raydiff.manifest.template import MAX_DEPTH, Choice, make_choice, parse_template


class Wildcards:
    """The wildcards of a folder, each read when a template first asks for it.

    A line is a template itself, so wildcards nest. Empty lines and lines that begin with # are
    left out. Without a folder every wildcard is an error.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = None if folder is None else Path(folder).expanduser()
        if self._folder is not None and not self._folder.is_dir():
            raise ConfigError(f"wildcards: {folder} is not a folder. Name the one with NAME.txt.")
        self._choices: dict[str, Choice] = {}
        self._open: list[str] = []
        """Names that are being read, outermost first."""
        self._digest = hashlib.blake2b(digest_size=16)

    @property
    def num_read(self) -> int:
        """How many wildcards templates have asked for."""
        return len(self._choices)

    @property
    def digest(self) -> str:
        """Hash of the names and lines that were read, in the order of their reading."""
        return self._digest.hexdigest()

    def choice(self, name: str) -> Choice:
        """Return the wildcard's lines as a choice. Raises ConfigError, naming loops in full."""
        if name not in self._choices:
            if name in self._open:
                loop = [*self._open[self._open.index(name) :], name]
                path = " -> ".join(f"__{each}__" for each in loop)
                raise ConfigError(
                    f"wildcards in {self._folder}: {path} is a loop. "
                    f"Take __{name}__ out of {loop[-2]}.txt."
                )
            if len(self._open) == MAX_DEPTH:
                raise ConfigError(
                    f"wildcards in {self._folder}: __{self._open[0]}__ nests more than {MAX_DEPTH} "
                    "deep. Nest them less."
                )
            self._open.append(name)
            self._choices[name] = self._read(name)
            self._open.pop()
        return self._choices[name]

    def _read(self, name: str) -> Choice:
        lines = self._lines(name)
        self._digest.update(repr((name, lines)).encode())
        options = (parse_template(line, self.choice, is_named=False) for line in lines)
        return make_choice(name, options)

    def _lines(self, name: str) -> list[str]:
        if self._folder is None:
            raise ConfigError(
                f"wildcards: the template has __{name}__ and there is no folder of wildcards. "
                rf"Name it (--wildcards FOLDER), or write \__{name}__ for plain text."
            )
        folder = self._folder.resolve()
        path = (folder / f"{name}.txt").resolve()
        if not path.is_relative_to(folder) or not path.is_file():
            known = sorted(
                found.relative_to(folder).with_suffix("").as_posix()
                for found in folder.rglob("*.txt")
            )
            hint = nearest(name, known)
            listed = ", ".join(known[:20]) or "none"
            raise ConfigError(
                f"wildcards: __{name}__: {self._folder} has no {name}.txt; {hint}known: {listed}"
            )
        try:
            lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
        except UnicodeDecodeError:
            raise ConfigError(f"wildcards: {path} is not UTF-8. Save it as UTF-8.") from None
        except OSError as error:
            raise ConfigError(f"wildcards: {path}: {error.strerror}") from None
        lines = [line for line in lines if line and not line.startswith("#")]
        if not lines:
            raise ConfigError(f"wildcards: {path} has no lines. Give it one text a line.")
        return lines
