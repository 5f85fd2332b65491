"""A Hub on the loopback: serves folders as model repositories, and counts what was fetched."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", COMMIT)


class Hub(ThreadingHTTPServer):
    """`repos` maps org/name to a folder, or to the name of the error that the Hub answers."""

    def __init__(self, repos: dict[str, Path | str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos = repos
        self.fetched: list[str] = []
        self.begun: list[str] = []
        """Files of which the first bytes were asked for."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub(repos: dict[str, Path | str]) -> Iterator[Hub]:
    hub = Hub(repos)
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *args: Any) -> None:
        """Stay silent."""

    def _answer(self) -> None:
        words = unquote(urlparse(self.path).path).strip("/").split("/")
        is_api = words[:2] == ["api", "models"]
        words = words[2:] if is_api else words
        repo, kind, revision = "/".join(words[:2]), (words[2:] or [""])[0], (words[3:] or [""])[0]
        folder = self.server.repos.get(repo, "RepoNotFound")
        if isinstance(folder, str):
            status = {"GatedRepo": 403, "RepoNotFound": 404}[folder]
            self._send(status, b"", {"X-Error-Code": folder})
        elif revision and revision not in REVISIONS:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif is_api and kind == "tree":
            self._send_json([{"type": "file", **entry} for entry in _entries(folder)])
        elif is_api:
            siblings = [{"rfilename": entry["path"]} for entry in _entries(folder)]
            self._send_json({"id": repo, "sha": COMMIT, "siblings": siblings})
        else:
            self._send_file(folder, "/".join(words[4:]))

    def _send_file(self, folder: Path, name: str) -> None:
        path = folder / name
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            self.server.begun.append(name)
            first, last = int(part[1]), min(int(part[2]), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self._send(206, content[first : last + 1], headers)
            return
        if self.command == "GET":
            self.server.fetched.append(name)
        self._send(200, content, headers)

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def _entries(folder: Path) -> list[dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {
            "path": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        }
        for path in files
    ]
