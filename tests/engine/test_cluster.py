"""What a private Ray needs before it starts; the engine's tests run a real one."""

import os
import stat
from pathlib import Path

import pytest

from raydiff.config import OutputConfig
from raydiff.engine import cluster
from raydiff.engine.cluster import LocalCluster, Resources
from raydiff.engine.worker import WorkerSpec
from raydiff.errors import EngineError


@pytest.fixture
def temp_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cluster, "MAX_TEMP_DIR_LENGTH", 1000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_small_shared_memory_is_an_error_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "OBJECT_STORE_BYTES", 2**60)
    spec = WorkerSpec(renderer="m:C", out=str(tmp_path), output=OutputConfig())
    ray = LocalCluster(Resources(num_workers=1, num_gpus=0), spec)
    with pytest.raises(EngineError, match="--shm-size"):
        ray.start_worker("w0", 1)
    ray.close()


def test_a_killed_driver_s_session_is_removed_and_a_live_one_is_not(temp_root: Path) -> None:
    killed = temp_root / f"{cluster.SESSION_PREFIX}killed"
    killed.mkdir()
    (killed / "lock").touch()
    other = temp_root / f"{cluster.SESSION_PREFIX}not-a-session"
    other.mkdir()
    with cluster._session_dir() as first:
        with cluster._session_dir() as second:
            assert first.is_dir()
            assert second.is_dir()
            assert stat.S_IMODE(second.stat().st_mode) == 0o700
        assert not second.exists()
    assert {path.name for path in temp_root.iterdir()} == {other.name}


def test_environment_variables_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYDIFF_TEST_OLD", "old")
    with cluster._environ(RAYDIFF_TEST_OLD=None, RAYDIFF_TEST_NEW="new"):
        assert "RAYDIFF_TEST_OLD" not in os.environ
        assert os.environ["RAYDIFF_TEST_NEW"] == "new"
    assert os.environ["RAYDIFF_TEST_OLD"] == "old"
    assert "RAYDIFF_TEST_NEW" not in os.environ
