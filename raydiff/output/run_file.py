"""OUT/run.json: what the run in this folder is, so that only the same run goes on in it."""

import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from raydiff import __version__
from raydiff.config import LTX2Config, OutputConfig, RunConfig
from raydiff.errors import OutputError
from raydiff.object_storage import Patience
from raydiff.output.atomic import disk_error
from raydiff.output.lock import LOCK_FILE, RunLock
from raydiff.output.media_store import remove_stale_files
from raydiff.output.storage import Storage, open_storage, read_error
from raydiff.request import RECIPE_VERSION

RUN_FILE = "run.json"
EMBEDS_DIR = "embeds"
"""Encoded prompts; `raydiff encode` may put them there before the run begins."""
LIBRARIES = ("torch", "ray", "pyarrow", "pillow", "numpy", "av")
MODEL_KEYS = ("name", "revision", "variant", "dtype", "vae_dtype")
LTX2_KEYS = ("mode", "text_encoder")
IMAGE_KEYS = ("image", "quality", "strip_metadata")
CLIP_KEYS = ("video", "codec", "crf", "preset", "wav", "video_threads")
"""What decides what is in the files; the rest of these sections is how they are made, and may
change when a run is resumed."""


DRIVER_PATIENCE = Patience(first_s=15.0, total_s=15.0)
"""A driver waits out longer outages of its object store itself, watching its workers meanwhile."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Session(_Record):
    """One driver's time with the run."""

    epoch: int
    started_at: str
    host: str
    pid: int
    versions: dict[str, str]


class RunFile(_Record):
    """The content of run.json."""

    manifest: str
    """Where it was read from, without credentials."""
    manifest_fingerprint: str
    num_rows: int
    """Rows of the manifest."""
    models: dict[str, str]
    """Revision of every model that rows were rendered with, by the name they use."""
    recipe_version: int
    config: dict[str, Any]
    """The resolved RunConfig of the first session."""
    created_at: str
    sessions: tuple[Session, ...]


class Run:
    """A run that this process drives: its folder, its lock and its run.json."""

    def __init__(self, storage: Storage, lock: RunLock, file: RunFile, *, is_resumed: bool) -> None:
        self.storage = storage
        self.lock = lock
        self.file = file
        self.is_resumed = is_resumed

    @property
    def out(self) -> str:
        """The output folder's absolute path, or its URI."""
        return self.storage.uri

    @property
    def out_dir(self) -> Path:
        """The output folder as a path. Raises OutputError for one in an object store."""
        path = self.storage.local_path("")
        if path is None:
            raise OutputError(f"{self.out}: not a local folder. Choose one as --out.")
        return path

    def add_model(self, name: str, revision: str) -> None:
        """Record a model that a row names. Raises OutputError if it has changed since it was."""
        known = self.file.models.get(name)
        if known == revision:
            return
        if known is not None:
            raise _another_run(self.out, [_difference(f"model {name}", known, revision)])
        self.file = self.file.model_copy(update={"models": {**self.file.models, name: revision}})
        self.lock.check()
        try:
            _write(self.storage, self.file)
        except OSError as error:
            raise disk_error(self.storage.describe(RUN_FILE), error) from error

    def close(self) -> None:
        """Give the folder back."""
        self.lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_run(
    out: str | Path | Storage,
    *,
    config: RunConfig,
    manifest_uri: str,
    manifest_fingerprint: str,
    num_rows: int,
    models: Mapping[str, str],
) -> Run:
    """Take a new or empty folder, or one with the same run, and lock it.

    `models` gives the revision of each model known by now. Raises OutputError if the folder
    cannot be used: not writable, another driver's, not a run, or a run of something else.
    """
    storage = open_storage(out, patience=DRIVER_PATIENCE)
    _make_folder(storage)
    lock = RunLock(storage).acquire()
    try:
        wanted = _run_file(
            config, manifest_uri, manifest_fingerprint, num_rows, models, (_session(lock),)
        )
        is_resumed = storage.size(RUN_FILE) is not None
        if is_resumed:
            wanted = _continue(storage.uri, read_run(storage), wanted)
        _write(storage, wanted)
        folder = storage.local_path("")
        if folder is not None:
            remove_stale_files(folder)
    except OSError as error:
        lock.release()
        raise OutputError(
            f"output folder {storage.uri}: {error.strerror}. Choose another --out."
        ) from error
    except BaseException:
        lock.release()
        raise
    return Run(storage, lock, wanted, is_resumed=is_resumed)


def check_same_run(
    out: str | Path | Storage,
    *,
    config: RunConfig,
    manifest_uri: str,
    manifest_fingerprint: str,
    num_rows: int,
    models: Mapping[str, str],
) -> None:
    """Raise OutputError if `out` is a run that `start_run` would not go on with."""
    if is_run(out):
        wanted = _run_file(config, manifest_uri, manifest_fingerprint, num_rows, models, ())
        _continue(open_storage(out).uri, read_run(out), wanted)


def read_run(out: str | Path | Storage) -> RunFile:
    """Read a folder's run.json. Raises OutputError if it is not a run."""
    check_is_run(out)
    storage = open_storage(out)
    path = storage.describe(RUN_FILE)
    try:
        return RunFile.model_validate_json(storage.read(RUN_FILE))
    except OSError as error:
        raise read_error(path, error) from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise OutputError(
            f"{path}: not a run file of raydiff {__version__}: {where} {problem['msg']}. "
            "Use the version that wrote it, or another --out."
        ) from None


def is_run(out: str | Path | Storage) -> bool:
    """Tell whether a place is the output folder of a run. Raises OutputError if it is hidden."""
    storage = open_storage(out)
    try:
        return storage.size(RUN_FILE) is not None
    except OSError as error:
        raise read_error(storage.uri, error) from None


def check_is_run(out: str | Path | Storage) -> None:
    """Raise OutputError if `out` is not the output folder of a run."""
    if is_run(out):
        return
    storage = open_storage(out)
    folder = storage.local_path("")
    if folder is not None and not folder.is_dir():
        raise OutputError(f"{storage.uri}: no such folder. Name the output folder of a run.")
    raise OutputError(
        f"{storage.uri}: not a run: it has no {RUN_FILE}. Name a run's output folder."
    )


def _run_file(
    config: RunConfig,
    manifest_uri: str,
    manifest_fingerprint: str,
    num_rows: int,
    models: Mapping[str, str],
    sessions: tuple[Session, ...],
) -> RunFile:
    return RunFile(
        manifest=_redacted(manifest_uri),
        manifest_fingerprint=manifest_fingerprint,
        num_rows=num_rows,
        models=dict(models),
        recipe_version=RECIPE_VERSION,
        config=_resolved(config),
        created_at=_now(),
        sessions=sessions,
    )


def _make_folder(storage: Storage) -> None:
    """Make the folder if its parent is there; refuse one that holds anything but a run."""
    folder = storage.local_path("")
    try:
        if folder is not None:
            folder.mkdir(exist_ok=True)
        names = set(storage.list_names())
    except FileNotFoundError:
        parent = folder.parent if folder is not None else "its bucket"
        raise OutputError(
            f"output folder {storage.uri}: {parent} does not exist. Make it, or choose another "
            "--out."
        ) from None
    except OSError as error:
        raise OutputError(
            f"output folder {storage.uri}: {error.strerror}. Choose another --out."
        ) from None
    if RUN_FILE not in names and names - {LOCK_FILE, EMBEDS_DIR}:
        raise OutputError(
            f"output folder {storage.uri}: it holds {min(names)!r} and is not a run. "
            "Choose a new or empty folder as --out."
        )


def _continue(uri: str, last: RunFile, wanted: RunFile) -> RunFile:
    """Return the run file of a further session of `last`. Raises OutputError if it is not one."""
    differences = list(_differences(last, wanted))
    if differences:
        raise _another_run(uri, differences)
    return last.model_copy(
        update={
            "models": {**last.models, **wanted.models},
            "sessions": (*last.sessions, *wanted.sessions),
        }
    )


def _differences(last: RunFile, wanted: RunFile) -> Iterator[str]:
    if last.manifest_fingerprint != wanted.manifest_fingerprint:
        yield _difference("manifest", _manifest(last), _manifest(wanted))
    if last.recipe_version != wanted.recipe_version:
        yield _difference("recipe", last.recipe_version, wanted.recipe_version)
    for name in sorted(last.models.keys() & wanted.models.keys()):
        if last.models[name] != wanted.models[name]:
            yield _difference(f"revision of model {name}", last.models[name], wanted.models[name])
    old, new = _pixel_settings(last), _pixel_settings(wanted)
    if "ltx2" not in last.config:  # before there were clips, the default was 0 for every model
        for settings in (old, new):
            settings["defaults.guidance_rescale"] = settings["defaults.guidance_rescale"] or 0.0
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield _difference(key, old.get(key), new.get(key))


def _pixel_settings(file: RunFile) -> dict[str, Any]:
    """Return the settings that must not change in the middle of a run."""
    settings = {f"defaults.{key}": value for key, value in file.config["defaults"].items()}
    model = {key: file.config["model"].get(key) for key in MODEL_KEYS}
    if model["name"] in file.models:
        # The same checkpoint under another path or name is the same model.
        model = {**model, "name": None, "revision": file.models[model["name"]]}
    # What a run from before there were shards, or clips, does not say is as it is by default.
    output = OutputConfig().model_dump() | file.config["output"]
    ltx2 = LTX2Config().model_dump() | file.config.get("ltx2", {})
    keys = set(IMAGE_KEYS + CLIP_KEYS + ("format",))
    if output["image"] == "png":
        keys.remove("quality")
    settings |= {f"model.{key}": value for key, value in model.items()}
    settings |= {f"ltx2.{key}": ltx2[key] for key in LTX2_KEYS}
    return settings | {f"output.{key}": output[key] for key in keys}


def _difference(subject: str, old: object, new: object) -> str:
    return f"{subject} was {old}, now is {new}"


def _manifest(file: RunFile) -> str:
    return f"{file.manifest} ({file.num_rows:,} rows, {file.manifest_fingerprint[:12]})"


def _another_run(uri: str, differences: list[str]) -> OutputError:
    return OutputError(
        f"output folder {uri}: it holds another run: {'; '.join(differences)}. "
        "Choose another --out, or give the run what it was started with."
    )


def _write(storage: Storage, file: RunFile) -> None:
    storage.put(RUN_FILE, (file.model_dump_json(indent=2) + "\n").encode())


def _resolved(config: RunConfig) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    if values["manifest"] is not None:
        values["manifest"] = _redacted(values["manifest"])
    return values


def _redacted(uri: str) -> str:
    """Take passwords and signed queries out of a URI: run.json is shared with the images."""
    if "://" not in uri:
        return uri
    return re.sub(r"\?.*", "", re.sub(r"://[^/]*@", "://", uri), flags=re.DOTALL)


def _session(lock: RunLock) -> Session:
    return Session(
        epoch=lock.epoch,
        started_at=_now(),
        host=platform.node(),
        pid=os.getpid(),
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    versions = {"raydiff": __version__, "python": sys.version.split()[0]}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
