"""How long an output that cannot be written is waited for."""

import pytest

from raydiff.engine.outage import FIRST_RETRY_S, MAX_RETRY_S, Outage
from raydiff.errors import DiskError

FULL = DiskError("out: No space left on device.")


def test_it_tries_again_ever_more_seldom_and_gives_up() -> None:
    said: list[str] = []
    outage = Outage(patience_s=30, on_warning=said.append)
    tries = []
    with pytest.raises(DiskError, match="No space left"):  # noqa: PT012
        for now in range(1000):
            if outage.may_try(now):
                tries.append(now)
                outage.failed(FULL, now)
    assert tries == [0, 1, 3, 7, 15, 25, 35]
    assert (FIRST_RETRY_S, MAX_RETRY_S) == (1, 10)
    assert said == ["out: No space left on device. Trying again for 30 s."]


def test_an_outage_that_ends_is_told_and_forgotten() -> None:
    said: list[str] = []
    outage = Outage(patience_s=30, on_warning=said.append)
    outage.succeeded(0)
    assert not said
    for start in (0, 100):
        outage.failed(FULL, start)
        assert outage.is_on
        assert not outage.may_try(start + 0.5)
        outage.succeeded(start + 20)
        assert not outage.is_on
        assert outage.may_try(start + 20)
    assert len(said) == 4
    assert said[1] == "The output can be written again, after 20 s."
