"""An encoder service: a checkpoint's text encoder behind HTTP, one encode at a time.

What it answers is in `encoder_reply`. It is for the workers of one's own runs: on the loopback, or
on a network where those that know the token may ask.
"""

import hmac
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from socket import AF_INET6, gaierror, getaddrinfo
from threading import BoundedSemaphore, Thread
from typing import Any, NamedTuple

import torch

from raydiff.config import LTX2Config, MemoryConfig, ModelConfig
from raydiff.errors import ConfigError, EngineError, ModelError, RaydiffError, RowError
from raydiff.manifest.schema import MAX_TEXT_CHARACTERS, quoted
from raydiff.pipelines.base import Pipeline
from raydiff.pipelines.encoder_reply import MAX_BODY_BYTES, MAX_TEXTS, EncodeReply, ServiceInfo
from raydiff.pipelines.load import load_pipeline
from raydiff.pipelines.prompt_cache import EncodedPrompt
from raydiff.weights.components import needed_by
from raydiff.weights.resolve import resolve_model

MAX_WAITING = 64
"""Requests that are held at once; more are told to come again."""
CLIENT_TIMEOUT_S = 30.0
"""Without a byte from a client that is to send some."""
CHUNK_BYTES = 2**16
MIN_TOKEN_LENGTH = 16


def serve_encoder(
    server: "EncoderServer",
    *,
    model: ModelConfig,
    memory: MemoryConfig,
    on_ready: Callable[[ServiceInfo], None],
) -> None:
    """Load a checkpoint's text encoder and answer until the server is shut down; requests that
    come meanwhile wait. Raises ModelError for a checkpoint that is not LTX-2's.
    """
    info = resolve_model(
        model.name,
        revision=model.revision,
        variant=model.variant,
        dtype=model.dtype,
        needed=needed_by(["encode"], LTX2Config()),
    )
    if info.video is None:
        raise ModelError(
            f"{model.name}: this is {info.family}; only LTX-2's workers ask an encoder service. "
            "For images, engine.stages=split encodes elsewhere"
        )
    pipeline = load_pipeline(info, config=model, memory=memory, stages=["encode"])
    about = ServiceInfo(model=info.name, revision=info.revision, dtype=pipeline.dtype_name)
    on_ready(about)
    server.serve(about, pipeline)


class EncoderServer(ThreadingHTTPServer):
    """Listens from when it is made on; `serve` answers."""

    daemon_threads = True
    request_queue_size = MAX_WAITING
    about: ServiceInfo
    pipeline: Pipeline
    failure: str | None = None

    def __init__(self, host: str, port: int, *, token: str | None) -> None:
        """Without a token anyone who reaches `host` may ask.

        Raises ConfigError for an address that cannot be had, for one beyond this machine without a
        token, and for a token that is easily guessed.
        """
        if token is None and not _is_loopback(host):
            raise ConfigError(
                f"--insecure with --host {host}: anyone who reaches this machine could ask it. "
                "Give a --token-file, or listen on 127.0.0.1"
            )
        if token is not None and (len(token) < MIN_TOKEN_LENGTH or not _is_header_text(token)):
            raise ConfigError(
                f"the token: it has {len(token)} characters; at least {MIN_TOKEN_LENGTH} ASCII "
                "letters or digits are asked for, e.g. from `openssl rand -hex 32`"
            )
        self.token = token
        self.waiting = BoundedSemaphore(MAX_WAITING)
        # One thread: what computes is not thread-safe, and texts get what they would get alone.
        self.encode_thread = ThreadPoolExecutor(1, thread_name_prefix="encode")
        if ":" in host:
            self.address_family = AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"--host {host} --port {port}: cannot listen there: {error}. Choose another one"
            ) from None

    def serve(self, about: ServiceInfo, pipeline: Pipeline) -> None:
        """Answer with what a pipeline encodes, until `shutdown`.

        Raises EngineError when the GPU has failed.
        """
        self.about = about
        self.pipeline = pipeline
        self.serve_forever()
        if self.failure is not None:
            raise EngineError(f"the GPU failed: {self.failure}")

    def encode(self, texts: Sequence[str]) -> list[EncodedPrompt]:
        """Encode texts; called in the encode thread."""
        try:
            with self.pipeline.fitting(f"{len(texts)} texts"):
                return self.pipeline.encode_texts(texts)
        except torch.AcceleratorError as error:
            # Every later call of this process would fail too: what restarts it is to know.
            self.failure = str(error).splitlines()[0]
            Thread(target=self.shutdown, daemon=True).start()
            raise

    @property
    def url(self) -> str:
        """The address that it listens on."""
        host, port = self.server_address[:2]
        shown = f"[{host!s}]" if self.address_family == AF_INET6 else str(host)
        return f"http://{shown}:{port}"

    def server_close(self) -> None:
        """Stop listening, and end the encode thread."""
        super().server_close()
        self.encode_thread.shutdown(wait=False, cancel_futures=True)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in a line that a connection broke; the client knows."""
        print(f"{client_address[0]}: {sys.exception()!r}", file=sys.stderr)


class _Refusal(Exception):  # noqa: N818
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Reply(NamedTuple):
    """A body and its type."""

    content: bytes
    content_type: str


class _Handler(BaseHTTPRequestHandler):
    server: EncoderServer
    server_version = "raydiff-encode-server"
    sys_version = ""
    timeout = CLIENT_TIMEOUT_S
    num_unread = 0
    """Bytes of the body that have not been read."""

    def do_GET(self) -> None:
        self._answer({"/health": self._health})

    def do_POST(self) -> None:
        self._answer({"/encode": self._encode})

    def log_message(self, *args: Any, **kwargs: Any) -> None:
        """Stay silent: prompts are nobody's business, and probes would fill a log."""

    def _answer(self, paths: dict[str, Callable[[], _Reply]]) -> None:
        try:
            self.num_unread = self._content_length()
            self._check_token()
            if self.path not in paths:
                raise _Refusal(404, "there are GET /health and POST /encode")
            reply, status = paths[self.path](), 200
        except _Refusal as refusal:
            self._drain()
            content = json.dumps({"error": str(refusal)}).encode()
            reply, status = _Reply(content, "application/json"), refusal.status
        self.send_response(status)
        self.send_header("Content-Type", reply.content_type)
        self.send_header("Content-Length", str(len(reply.content)))
        self.end_headers()
        self.wfile.write(reply.content)

    def _health(self) -> _Reply:
        return _Reply(json.dumps(asdict(self.server.about)).encode(), "application/json")

    def _encode(self) -> _Reply:
        if not self.server.waiting.acquire(blocking=False):
            raise _Refusal(503, f"{MAX_WAITING} requests wait already; ask again later")
        try:
            return self._encoded(self._texts())
        finally:
            self.server.waiting.release()

    def _encoded(self, texts: list[str]) -> _Reply:
        future = self.server.encode_thread.submit(self.server.encode, texts)
        error = future.exception()
        if isinstance(error, RowError):
            raise _Refusal(422, str(error))
        if error is not None:
            # Its place and its traceback are for those who run the service.
            traceback.print_exception(error)
            what = str(error) if isinstance(error, RaydiffError) else type(error).__name__
            raise _Refusal(500, f"encoding failed: {what}")
        reply = EncodeReply(revision=self.server.about.revision, texts=tuple(future.result()))
        return _Reply(reply.serialize(), "application/octet-stream")

    def _texts(self) -> list[str]:
        """Read the texts, and refuse what is none of ours."""
        # A web page that a browser has open can only send this type where it is allowed to.
        if self.headers.get_content_type() != "application/json":
            raise _Refusal(415, "expected Content-Type: application/json")
        body = self.rfile.read(self.num_unread)
        if len(body) < self.num_unread:
            raise _Refusal(400, "the body is shorter than its Content-Length")
        self.num_unread = 0
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):
            raise _Refusal(400, "the body is not valid JSON") from None
        texts = values.get("texts") if isinstance(values, dict) else None
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise _Refusal(400, 'expected {"texts": [...]}, a list of strings')
        if not 1 <= len(texts) <= MAX_TEXTS:
            raise _Refusal(413, f"{len(texts)} texts; send 1 to {MAX_TEXTS} at a time")
        for text in texts:
            _check_text(text)
        return texts

    def _content_length(self) -> int:
        given = self.headers.get("Content-Length", "0")
        if not (given.isascii() and given.isdigit() and len(given) <= 18):
            raise _Refusal(400, "Content-Length is not a number")
        length = int(given)
        if self.command == "POST" and (length == 0 or "Transfer-Encoding" in self.headers):
            raise _Refusal(411, "a body with a Content-Length is expected")
        if length > MAX_BODY_BYTES:
            self.num_unread = length
            raise _Refusal(413, f"a body of {length:,} bytes; at most {MAX_BODY_BYTES:,}")
        return length

    def _check_token(self) -> None:
        if self.server.token is None:
            return
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode(), self.server.token.encode())
        if scheme.lower() != "bearer" or not is_right:
            raise _Refusal(401, "a token is asked for: Authorization: Bearer TOKEN")

    def _drain(self) -> None:
        """Read what a client still sends, within bounds: else it would not read the answer."""
        num_left = min(self.num_unread, MAX_BODY_BYTES)
        while num_left > 0:
            chunk = self.rfile.read(min(num_left, CHUNK_BYTES))
            if not chunk:
                return
            num_left -= len(chunk)


def _check_text(text: str) -> None:
    if len(text) > MAX_TEXT_CHARACTERS:
        raise _Refusal(
            422,
            f"{quoted(text)} has {len(text):,} characters; {MAX_TEXT_CHARACTERS:,} are allowed",
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Refusal(422, "a text is not valid Unicode: it has half of a pair in it") from None


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address, or every one that the name stands for."""
    try:
        found = getaddrinfo(host or "0.0.0.0", None)
    except (gaierror, UnicodeError):
        return False
    return all(ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)


def _is_header_text(token: str) -> bool:
    return token.isascii() and token.isprintable() and " " not in token
