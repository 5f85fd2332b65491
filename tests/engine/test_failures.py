"""Which class a failure is of: by the messages that the parts of raydiff really give."""

import errno
from pathlib import Path

import pytest

from raydiff.engine.failures import FAILURE_CLASSES, MESSAGES, failure_class
from raydiff.output.atomic import disk_error
from raydiff.request import RenderResult, Status

DISK_FULL = str(disk_error(Path("/out/images/ab/x.png"), OSError(errno.ENOSPC, "No space left")))
TOO_BIG = (
    "a batch of 1 at 1024x1024 does not fit NVIDIA T4 under profile extreme: CUDA out of memory. "
    "Use a smaller engine.batch_size or a profile that needs less memory."
)


@pytest.mark.parametrize(
    ("request_id", "status", "error", "expected"),
    [
        ("ab", "completed", None, None),
        ("", "failed", "height is 500; it must be a multiple of 8.", "bad row"),
        ("", "failed", "sampler is 'disk'; known: euler", "bad row"),
        ("ab", "failed", "init_image /data/a.png: No such file or directory.", "bad row"),
        ("ab", "failed", TOO_BIG, "out of memory"),
        ("ab", "failed", "NaN in latents after step 3", "not a number"),
        ("ab", "failed", DISK_FULL, "disk"),
        ("ab", "failed", "it took longer than 120 s", "timeout"),
        ("ab", "failed", "worker w0: died: Segmentation fault", "crash"),
        ("ab", "failed", "ValueError: guidance went wrong (x.py:3)", "other"),
        ("ab", "failed", None, "other"),
        ("ab", "quarantined", "3 workers died rendering this row; the last: disk", "crash"),
        ("ab", "quarantined", "3 workers died; the last: killed: it took longer", "timeout"),
    ],
)
def test_the_class_of_a_result(
    request_id: str, status: Status, error: str | None, expected: str | None
) -> None:
    assert (
        failure_class(RenderResult(request_id=request_id, status=status, error=error)) == expected
    )


def test_every_class_of_a_message_is_a_known_one() -> None:
    assert {name for name, _ in MESSAGES} <= set(FAILURE_CLASSES)
