"""Classes of failure, told from a result's status and message: what a summary counts and a
dashboard draws, where messages themselves would be too many to tell apart."""

import re
from collections import Counter
from pathlib import Path
from typing import Literal

import pyarrow.compute as pc

from raydiff.output.lock import METADATA_DIR
from raydiff.output.part_files import map_parts
from raydiff.output.storage import open_storage
from raydiff.request import RenderResult

FailureClass = Literal[
    "bad row", "out of memory", "not a number", "timeout", "crash", "disk", "other"
]

FAILURE_CLASSES: tuple[FailureClass, ...] = (
    "bad row",
    "out of memory",
    "not a number",
    "timeout",
    "crash",
    "disk",
    "other",
)
MESSAGES: tuple[tuple[FailureClass, re.Pattern[str]], ...] = (
    ("bad row", re.compile(r"init_image\b")),
    ("out of memory", re.compile(r"out of memory|does not fit (?:the|in)|OutOfMemory", re.I)),
    ("not a number", re.compile(r"\bnan\b|not finite|overflow|wholly black|\binf\b", re.I)),
    ("disk", re.compile(r"no space left|disk|read-only file system|could not be written", re.I)),
    ("timeout", re.compile(r"timed? ?out|took (?:too long|longer)|did not answer|\bhung\b", re.I)),
    ("crash", re.compile(r"workers? died|\bdied\b|crashed|killed", re.I)),
)
"""The first that is found names the class."""


def failure_class(result: RenderResult) -> FailureClass | None:
    """Return why a row has no image; None where it has one.

    A row without a request was refused as it was read.
    """
    if result.status == "completed":
        return None
    if not result.request_id:
        return "bad row"
    found = next((name for name, said in MESSAGES if said.search(result.error or "")), None)
    if result.status == "quarantined":
        # Its last words may say anything: what it did was to end its workers.
        return "timeout" if found == "timeout" else "crash"
    return found or "other"


def count_failures(out: str | Path) -> Counter[FailureClass]:
    """Count a run's committed rows without an image, by class. Raises OutputError."""
    counts: Counter[FailureClass] = Counter()
    tables, _ = map_parts(
        open_storage(out).folder(METADATA_DIR),
        ["request_id", "status", "error"],
        lambda table: table.filter(pc.not_equal(table["status"], "completed")),
    )
    for table in tables:
        for row in table.to_pylist():
            values = {**row, "request_id": row["request_id"] or ""}
            found = failure_class(RenderResult(**values))
            if found is not None:
                counts[found] += 1
    return counts
