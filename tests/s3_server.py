"""A real S3 server (moto's) on loopback, behind a proxy that breaks requests on demand."""

import http.client
import itertools
import logging
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

from moto.server import ThreadedMotoServer

Fault = Literal["403", "500", "503", "reset", "reset_after", "hang"]
"""reset closes the connection before the server has seen the request, reset_after when it has
done it; hang answers nothing."""

SLOW_DOWN = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
HOP_HEADERS = {"connection", "transfer-encoding", "keep-alive", "expect"}
CONDITIONS = {"if-none-match", "if-match"}


class FaultyS3:
    """`uri` names a fresh folder of a bucket; `environ` has what a client needs to reach it."""

    _folders = itertools.count()
    """Of all servers of this process: moto keeps one set of buckets for them."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._moto.start()
        self._target = self._moto.get_host_and_port()
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._proxy.daemon_threads = True
        threading.Thread(target=self._proxy.serve_forever, args=(0.05,), daemon=True).start()
        self.environ = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._proxy.server_address[1]}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }
        self.reset()
        self.request("PUT", "/bucket")

    def reset(self) -> None:
        """End all faults and forget the requests seen."""
        self.faults: list[Fault] = []
        """Taken one by one by the next requests that `breaks` allows."""
        self.breaks: Callable[[str, str], bool] = lambda method, path: True
        self.ignores_conditions = False
        self.outage_until = 0.0
        """time.monotonic() until which every connection is closed."""
        self.requests: list[tuple[str, str]] = []

    def new_uri(self) -> str:
        return f"s3://bucket/run-{next(self._folders)}"

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Ask the server itself, past the proxy and its faults."""
        connection = http.client.HTTPConnection(*self._target, timeout=30)
        connection.request(method, path, body, {"Authorization": "AWS4-HMAC-SHA256 Credential=x/"
                                                "20260101/us-east-1/s3/aws4_request"})  # fmt: skip
        data = connection.getresponse().read()
        connection.close()
        return data

    def close(self) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        self._moto.stop()

    def _take_fault(self, method: str, path: str) -> Fault | None:
        if time.monotonic() < self.outage_until:
            return "reset"
        if self.faults and self.breaks(method, path):
            return self.faults.pop(0)
        return None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                path = urllib.parse.unquote(self.path)
                server.requests.append((self.command, path))
                fault = server._take_fault(self.command, path)
                if fault == "reset":
                    self._reset()
                elif fault == "hang":
                    time.sleep(3.0)
                    self._reset()
                elif fault in ("403", "500", "503"):
                    self._answer(int(fault), {}, SLOW_DOWN if fault == "503" else b"")
                else:
                    self._forward(body, is_answered=fault != "reset_after")

            def _forward(self, body: bytes, *, is_answered: bool) -> None:
                headers = {
                    name: value
                    for name, value in self.headers.items()
                    if name.lower() not in HOP_HEADERS
                    and not (server.ignores_conditions and name.lower() in CONDITIONS)
                }
                connection = http.client.HTTPConnection(*server._target, timeout=30)
                connection.request(self.command, self.path, body, headers)
                response = connection.getresponse()
                data = response.read()
                if is_answered:
                    self._answer(response.status, dict(response.getheaders()), data)
                else:
                    self._reset()
                connection.close()

            def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in HOP_HEADERS | {"content-length"}:
                        self.send_header(name, value)
                length = headers.get("Content-Length", "0") if self.command == "HEAD" else len(data)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def _reset(self) -> None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

            def log_message(self, *args: object) -> None:
                pass

        for method in ("GET", "PUT", "POST", "HEAD", "DELETE"):
            setattr(Handler, f"do_{method}", Handler.handle_any)
        return Handler
