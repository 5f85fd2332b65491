"""Encoder services on the loopback: a real one, and one whose answers are given."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, NamedTuple

from raydiff.pipelines.base import Pipeline
from raydiff.pipelines.encoder_reply import ServiceInfo
from raydiff.pipelines.encoder_server import EncoderServer

TOKEN = "0123456789abcdef"


@contextmanager
def running(server: ThreadingHTTPServer, serve: Callable[[], None]) -> Iterator[None]:
    """Let a server answer in a thread."""
    thread = Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def encoder_service(pipeline: Pipeline, token: str | None = None) -> Iterator[EncoderServer]:
    """Serve what a pipeline encodes."""
    server = EncoderServer("127.0.0.1", 0, token=token)
    about = about_pipeline(pipeline)
    with running(server, lambda: server.serve(about, pipeline)):
        yield server


def about_pipeline(pipeline: Pipeline) -> ServiceInfo:
    return ServiceInfo(
        model=pipeline.info.name, revision=pipeline.info.revision, dtype=pipeline.dtype_name
    )


class Answer(NamedTuple):
    """What a scripted service sends; status 0 closes the connection without a word."""

    status: int
    content: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


class ScriptedService(ThreadingHTTPServer):
    """Answers one request after the other with the next answer; the last one stays."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[Answer] = []
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def scripted_service() -> Iterator[ScriptedService]:
    server = ScriptedService()
    with running(server, lambda: server.serve_forever(poll_interval=0.02)):
        yield server


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedService

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer()

    def log_message(self, *args: Any) -> None:
        """Stay silent."""

    def _answer(self) -> None:
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        self.server.asked.append(self.path)
        if answer.status == 0:
            return
        self.send_response(answer.status)
        for name, value in answer.headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.content)
