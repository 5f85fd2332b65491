"""Workers on other machines must see the driver's output folder."""

from pathlib import Path

import pytest

from raydiff.engine import shared_out
from raydiff.engine.shared_out import check_mark, visible_mark
from raydiff.errors import DiskError, EngineError


def test_a_mark_is_seen_and_removed(tmp_path: Path) -> None:
    (tmp_path / ".visible-of-a-killed-driver").touch()
    with visible_mark(tmp_path) as mark:
        check_mark(mark)
        assert list(tmp_path.iterdir()) == [mark]
    assert not list(tmp_path.iterdir())


def test_a_node_without_the_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_out, "PATIENCE_S", 0.1)
    with visible_mark(tmp_path) as mark:
        elsewhere = tmp_path / "not-mounted" / mark.name
        with pytest.raises(EngineError, match=r"does not see the driver's\. Use a folder that all"):
            check_mark(elsewhere)
    with pytest.raises(DiskError), visible_mark(tmp_path / "not-there"):
        pass
