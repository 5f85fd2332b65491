"""One thread for torch (the models are tiny), no network, and tiny pipelines to render with."""

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.s3_server import FaultyS3

EXIT_STATUS = pytest.StashKey[int]()

os.environ["OMP_NUM_THREADS"] = "1"
# Workers that a run starts take all cores. Their threads are not to spin while they wait for one
# another: beside other tests a render took ten times as long.
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # Some workers crash on purpose.


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the README's blocks, the longest test: side by side, nothing waits for it."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End with what the tests have shown, without Python's own shutdown.

    One of several whole runs crashed in it, after the summary: threads of the libraries that so
    many tests had brought into one process were still there.
    """
    if hasattr(config, "workerinput"):  # pytest-xdist's, which its main process ends
        return
    sys.stdout.flush()
    sys.stderr.flush()
    status = config.stash.get(EXIT_STATUS, None)
    if status is not None:
        os._exit(status)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[EXIT_STATUS] = int(exitstatus)


@pytest.fixture(scope="session")
def tiny_sd21(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny SD 2.1 pipeline folder, as `raydiff models make-tiny sd21` makes it."""
    return _tiny("sd21", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny SDXL pipeline folder."""
    return _tiny("sdxl", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_ltx2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny LTX-2.0 pipeline folder, which makes clips with sound."""
    return _tiny("ltx2", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_ltx23(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny LTX-2.3 pipeline folder."""
    return _tiny("ltx2.3", tmp_path_factory)


@pytest.fixture(scope="session")
def s3_server() -> "Iterator[FaultyS3]":
    from tests.s3_server import FaultyS3

    server = FaultyS3()
    yield server
    server.close()


@pytest.fixture
def s3(s3_server: "FaultyS3", monkeypatch: pytest.MonkeyPatch) -> "FaultyS3":
    """A real S3 server on loopback that fails on demand; the environment has its credentials."""
    s3_server.reset()
    for name, value in s3_server.environ.items():
        monkeypatch.setenv(name, value)
    return s3_server


def _tiny(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from raydiff.pipelines.tiny import make_tiny

    return make_tiny(family, tmp_path_factory.mktemp("models") / family)  # type: ignore[arg-type]
