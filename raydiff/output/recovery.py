"""What a crash may have left in the metadata, put right before a run goes on: temporary and
replaced parts, damaged parts, rows that stand twice, rows whose files a power loss took back.

A power loss takes nothing back from an object store."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raydiff.errors import OutputError
from raydiff.output.atomic import disk_error
from raydiff.output.media_files import MediaError, check_media, is_frames_index
from raydiff.output.part_files import (
    TEMPORARY_PART_NAME,
    Fence,
    Part,
    list_parts,
    read_columns,
    remove_parts,
    write_part,
)
from raydiff.output.storage import Storage, read_error
from raydiff.output.video.clip_files import frame_rows, read_sound_file

BOOT_ID_FILE = ".boot_id"
UNSYNCED_S = 120.0
"""Age at which a written file is surely on the disk: Linux writes back after 30 to 35 s."""


def recover_parts(
    folder: Storage,
    out: Storage,
    next_name: Callable[[], str],
    fence: Fence,
    warnings: list[str],
    *,
    has_sounds: bool,
) -> list[Part]:
    """Return the table's parts, free of what a crash left. Adds to `warnings`.

    `has_sounds` says that clips have a WAV file beside them.
    """
    remove_temporary_parts(folder)
    parts = list_parts(folder)
    remove_parts(folder, parts.replaced)
    for name in parts.damaged:
        set_aside(folder, name, warnings)
    live = list(parts.live)
    out_dir = out.local_path("")
    if out_dir is None:
        return live
    boot_id = _boot_id()
    if _last_boot_id(folder) != boot_id:
        lost = _lost_files(live, out_dir, has_sounds=has_sounds)
        if lost:
            num_lost = sum(len(rows) for rows in lost.values())
            warnings.append(
                f"{num_lost} rows lost their files when the machine went down; they are rendered "
                "again."
            )
            live = drop_rows(live, lost, next_name, fence)
        try:
            folder.put(BOOT_ID_FILE, boot_id.encode())
        except OSError as error:
            raise disk_error(folder.describe(BOOT_ID_FILE), error) from error
    return live


def set_aside(folder: Storage, name: str, warnings: list[str]) -> None:
    """Rename a damaged part so that no reader takes it for one; its rows count as not done."""
    aside = f".{name}.damaged"
    try:
        folder.move(name, aside)
    except OSError as error:
        raise disk_error(folder.describe(aside), error) from error
    warnings.append(
        f"{folder.describe(name)}: damaged; set aside as {aside}. The rows in it are rendered "
        "again."
    )


def drop_rows(
    parts: Sequence[Part],
    rows: Mapping[int, NDArray[np.int64]],
    next_name: Callable[[], str],
    fence: Fence,
) -> list[Part]:
    """Return `parts` without the rows at these places, given by the part's index."""
    shorter = [
        _without_rows(part, rows[index], next_name(), fence) if index in rows else part
        for index, part in enumerate(parts)
    ]
    return [part for part in shorter if part is not None]


def _without_rows(part: Part, rows: NDArray[np.int64], name: str, fence: Fence) -> Part | None:
    """Replace `part` by one of that name that lacks these rows; None if none is left."""
    keep = np.ones(part.num_rows, dtype=bool)
    keep[rows] = False
    shorter = None
    if keep.any():
        table = read_columns(part).filter(pa.array(keep))
        shorter = write_part(part.folder, name, iter([table]), replaces=[part], fence=fence)
    remove_parts(part.folder, [part.name])
    return shorter


def remove_temporary_parts(folder: Storage) -> None:
    """Remove parts that were never committed; the lock says that nobody is writing them."""
    try:
        names = folder.list_names()
    except OSError as error:
        raise read_error(folder.uri, error) from error
    remove_parts(folder, [name for name in names if TEMPORARY_PART_NAME.fullmatch(name)])


def _lost_files(
    parts: Sequence[Part], out_dir: Path, *, has_sounds: bool
) -> dict[int, NDArray[np.int64]]:
    """Return the rows of the last session's end whose file is missing or cut, by the part's index.

    Image files are not synced one by one. If the machine has restarted since (or this is another
    one), files of the last minutes may be gone though their rows, which are synced, are there.
    """
    newest = max((part.last_finished_s for part in parts), default=float("-inf"))
    lost = {}
    for index, part in enumerate(parts):
        if part.last_finished_s >= newest - UNSYNCED_S:
            rows = _lost_rows(part, out_dir, since=newest - UNSYNCED_S, has_sounds=has_sounds)
            if len(rows):
                lost[index] = rows
    return lost


def _lost_rows(part: Part, out_dir: Path, *, since: float, has_sounds: bool) -> NDArray[np.int64]:
    columns = ("file_name", "size_bytes", "duration_s", "audio_sample_rate")
    table = read_columns(part, ["status", "member", "finished_at", *columns])
    finished_us = pc.fill_null(table["finished_at"].cast(pa.int64()), 0).to_numpy()
    # Shards are synced before their rows are committed.
    is_completed = pc.equal(table["status"], "completed").to_numpy(zero_copy_only=False)
    is_completed &= pc.is_null(table["member"]).to_numpy(zero_copy_only=False)
    recent = np.flatnonzero((finished_us >= since * 1e6) & is_completed)
    rows = table.take(recent).to_pylist()
    pairs = zip(recent, rows, strict=True)
    lost = [place for place, row in pairs if not _is_whole(out_dir, row, has_sounds=has_sounds)]
    return np.array(lost, dtype=np.int64)


def _is_whole(out_dir: Path, row: Mapping[str, Any], *, has_sounds: bool) -> bool:
    file_name = row["file_name"]
    try:
        if (out_dir / file_name).stat().st_size != row["size_bytes"]:
            return False
        if is_frames_index(file_name):
            for frame in frame_rows(out_dir, row):
                check_media(out_dir, frame)
        if has_sounds and row.get("audio_sample_rate") is not None:
            read_sound_file(out_dir, row)
        return True
    except MediaError:
        return False
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise OutputError(
            f"{out_dir / file_name}: cannot be read: {error.strerror}. Make it readable."
        ) from error


def _boot_id() -> str:
    """Name this boot of this machine; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _last_boot_id(folder: Storage) -> str | None:
    try:
        return folder.read(BOOT_ID_FILE).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
