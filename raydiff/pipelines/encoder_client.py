"""Asks an encoder service over HTTP. One host is ever contacted, the address's own: no redirect is
followed and no proxy used. Each reply has a bound in bytes and in time.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead

from raydiff.config import EncoderAddress
from raydiff.errors import ConfigError, EngineError, RowError
from raydiff.pipelines.encoder_reply import MAX_OTHER_BYTES, ServiceInfo, parse_error

TOKEN_VARIABLE = "RAYDIFF_ENCODER_TOKEN"
START_PATIENCE_S, PATIENCE_S = 10.0, 60.0
"""How long a service that does not answer is asked again: at first, and once it has answered."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
"""Between one time and the next; each is twice the last."""
CONNECT_S, REPLY_S = 10.0, 300.0
CHUNK_BYTES = 2**18

BUSY = (429, 500, 502, 503, 504)
"""Statuses that may be other ones a moment later."""
REFUSED = (400, 413, 422)
"""Statuses that say what is wrong with the texts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a client waits, in seconds."""

    start_s: float = START_PATIENCE_S
    total_s: float = PATIENCE_S
    first_pause_s: float = FIRST_PAUSE_S
    reply_s: float = REPLY_S


class EncoderClient:
    """The client of one service, with the token that the environment has for it."""

    def __init__(self, address: EncoderAddress, *, patience: Patience | None = None) -> None:
        self._address = address
        self._patience = patience or Patience()
        self._token = _token()
        self._has_answered = False

    @property
    def url(self) -> str:
        """The service's address, for messages."""
        where = self._address
        host = f"[{where.host}]" if ":" in where.host else where.host
        return f"http{'s' if where.is_https else ''}://{host}:{where.port}{where.path}"

    def health(self) -> ServiceInfo:
        """Return what the service encodes with.

        Raises ConfigError where it wants another token, EngineError where it stays away.
        """
        try:
            data = self._ask("GET", "/health", None, MAX_OTHER_BYTES)
            return ServiceInfo.parse(data)
        except (ValueError, RowError) as error:
            raise self._strange(str(error)) from None

    def encode(self, texts: Sequence[str], max_bytes: int) -> bytes:
        """Return the body of the reply to texts, at most so many bytes.

        Raises RowError where the service refuses them, EngineError where it stays away, answers
        too much, or wants another token.
        """
        body = json.dumps({"texts": list(texts)}, ensure_ascii=False).encode()
        try:
            return self._ask("POST", "/encode", body, max_bytes)
        except ConfigError as error:
            raise EngineError(str(error)) from None

    def _ask(self, method: str, path: str, body: bytes | None, max_bytes: int) -> bytes:
        """Ask until there is an answer or patience ends."""
        limit_s = self._patience.total_s if self._has_answered else self._patience.start_s
        deadline = time.monotonic() + limit_s
        pause_s = self._patience.first_pause_s
        while True:
            try:
                status, data = self._answer(method, path, body, max_bytes)
                if status not in BUSY:
                    break
                trouble = f"it answered {status}: {parse_error(data) or 'without a message'}"
            except (OSError, HTTPException) as error:
                trouble = str(error) or type(error).__name__
            if time.monotonic() + pause_s > deadline:
                raise EngineError(
                    f"encoder service {self.url}: no answer in {limit_s:g} s; the last try: "
                    f"{trouble}. Start `raydiff encode-server` there and run the same command again"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        self._has_answered = True
        if status == 200:
            return data
        raise self._refusal(status, parse_error(data))

    def _answer(
        self, method: str, path: str, body: bytes | None, max_bytes: int
    ) -> tuple[int, bytes]:
        where = self._address
        connection_class = HTTPSConnection if where.is_https else HTTPConnection
        connection = connection_class(where.host, where.port, timeout=CONNECT_S)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        deadline = time.monotonic() + self._patience.reply_s
        try:
            connection.connect()
            connection.sock.settimeout(self._patience.reply_s)
            connection.request(method, where.path + path, body, headers)
            response = connection.getresponse()
            limit = max_bytes if response.status == 200 else MAX_OTHER_BYTES
            return response.status, self._read(response, limit, deadline)
        finally:
            connection.close()

    def _read(self, response: HTTPResponse, max_bytes: int, deadline: float) -> bytes:
        data = bytearray()
        while chunk := response.read1(CHUNK_BYTES):
            data += chunk
            if len(data) > max_bytes:
                raise self._strange(f"more than the {max_bytes:,} bytes that it may have")
            if time.monotonic() > deadline:
                raise TimeoutError(f"its answer took more than {self._patience.reply_s:g} s")
        if response.length:
            raise IncompleteRead(bytes(data[:1]), response.length)
        return bytes(data)

    def _refusal(self, status: int, message: str) -> RowError | ConfigError | EngineError:
        if status in REFUSED and message:
            return RowError(f"the encoder service refused the text: {message}")
        if status in (401, 403):
            given = "is another one" if self._token else "is not set here"
            return ConfigError(
                f"encoder service {self.url}: it asks for a token, and {TOKEN_VARIABLE} {given}. "
                "Set it to the service's in the environment of every worker"
            )
        if 300 <= status < 400:
            return EngineError(
                f"encoder service {self.url}: it redirects to another address, which is not "
                "followed. Name the service's own in ltx2.encoder_url"
            )
        return self._strange(f"status {status} {message}".rstrip())

    def _strange(self, what: str) -> EngineError:
        return EngineError(
            f"encoder service {self.url}: this is no answer of `raydiff encode-server`: {what}. "
            "Check ltx2.encoder_url, and that both have one version of raydiff"
        )


def _token() -> str | None:
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token.isascii() or not token.isprintable():
        raise ConfigError(f"{TOKEN_VARIABLE}: it has letters that a header cannot have")
    return token or None
