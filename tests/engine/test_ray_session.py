"""What a private Ray needs before it starts, and what a token must be."""

import os
import stat
from pathlib import Path

import pytest

from raydiff.engine import ray_session
from raydiff.engine.cluster import private_session
from raydiff.engine.placement import fused_layout
from raydiff.engine.ray_session import check_token, environ, session_dir, write_token
from raydiff.errors import ConfigError, EngineError


@pytest.fixture
def temp_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ray_session, "MAX_TEMP_DIR_LENGTH", 1000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_small_shared_memory_is_an_error_with_its_remedy() -> None:
    with (
        private_session(fused_layout(1), object_store_bytes=2**60) as session,
        pytest.raises(EngineError, match="--shm-size"),
    ):
        session.open()


def test_a_killed_driver_s_session_is_removed_and_a_live_one_is_not(temp_root: Path) -> None:
    killed = temp_root / f"{ray_session.SESSION_PREFIX}killed"
    killed.mkdir()
    (killed / "lock").touch()
    other = temp_root / f"{ray_session.SESSION_PREFIX}not-a-session"
    other.mkdir()
    with session_dir() as first:
        with session_dir() as second:
            assert first.is_dir()
            assert second.is_dir()
            assert stat.S_IMODE(second.stat().st_mode) == 0o700
        assert not second.exists()
    assert {path.name for path in temp_root.iterdir()} == {other.name}


def test_environment_variables_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYDIFF_TEST_OLD", "old")
    with environ(RAYDIFF_TEST_OLD=None, RAYDIFF_TEST_NEW="new"):
        assert "RAYDIFF_TEST_OLD" not in os.environ
        assert os.environ["RAYDIFF_TEST_NEW"] == "new"
    assert os.environ["RAYDIFF_TEST_OLD"] == "old"
    assert "RAYDIFF_TEST_NEW" not in os.environ


def test_a_token_that_others_may_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    token = write_token(tmp_path)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    assert check_token(insecure=False)
    token.chmod(0o644)
    for insecure in (False, True):
        with pytest.raises(ConfigError, match=f"mode 0644.*chmod 600 {token}"):
            check_token(insecure)


def test_a_missing_token_is_refused_unless_insecure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"\.ray/auth_token: no token for the cluster"):
        check_token(insecure=False)
    assert not check_token(insecure=True)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert check_token(insecure=False)
