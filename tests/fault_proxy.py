"""A proxy on loopback that stands before an HTTP server and does to its traffic what networks and servers do.

Requests go through unchanged, with their Host header, so that signatures stay valid. Each is compared with
the faults in the order they were injected; the first that fits and did not happen `times` times yet happens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_PIECE = 64 * 1024


@dataclass
class Fault:
    """What happens to a request.

    Attributes:
        method: of the requests it is for; "" for all.
        path: a part of their path and query; "" for all.
        times: how often it happens.
        status: answer with this status, and do not ask the server.
        body: of that answer.
        delay_s: wait so long before anything else.
        cut_request_after: send the server so many bytes of the body, then cut both connections.
        cut_response_after: pass on so many bytes of the answer's body, then cut the connection.
        flip_request_byte: change this byte of the request's body.
        flip_response_byte: change this byte of the answer's body.
        drop_response: the server does what it is asked to, and its answer is lost.
    """

    method: str = ""
    path: str = ""
    times: int = 1
    status: int | None = None
    body: bytes = b""
    delay_s: float = 0.0
    cut_request_after: int | None = None
    cut_response_after: int | None = None
    flip_request_byte: int | None = None
    flip_response_byte: int | None = None
    drop_response: bool = False
    num_happened: int = field(default=0, init=False)


class FaultProxy:
    """The proxy: `endpoint_url` is its address, `requests` are the methods and paths that came, in order."""

    def __init__(self, target_url: str) -> None:
        self.target = urlsplit(target_url)
        self.requests: list[tuple[str, str]] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint_url = f"http://127.0.0.1:{self.server.server_port}"

    def inject(self, *faults: Fault) -> None:
        """Forget earlier faults and requests, and let these happen from now on."""
        with self._lock:
            self._faults = list(faults)
            self.requests.clear()

    def count(self, method: str, path: str = "") -> int:
        """How many requests of a kind came since `inject`."""
        with self._lock:
            return sum(method == found and path in where for found, where in self.requests)

    def take(self, method: str, path: str) -> Fault:
        """Note a request and return what is to happen to it."""
        with self._lock:
            self.requests.append((method, path))
            for fault in self._faults:
                if fault.num_happened < fault.times and fault.method in ("", method) and fault.path in path:
                    fault.num_happened += 1
                    return fault
            return Fault()


@contextmanager
def run_fault_proxy(target_url: str) -> Iterator[FaultProxy]:
    """Run a proxy before `target_url` for the length of the block."""
    proxy = FaultProxy(target_url)
    thread = threading.Thread(target=proxy.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.server.shutdown()
        proxy.server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    owner: FaultProxy

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def _serve(self) -> None:
        fault = self.owner.take(self.command, self.path)
        length = int(self.headers.get("Content-Length", 0))
        time.sleep(fault.delay_s)
        if fault.status is not None:
            self._read(length)
            self._answer(fault.status, [("Content-Type", "application/xml")], fault.body)
            return
        connection = HTTPConnection(str(self.owner.target.hostname), self.owner.target.port, timeout=60)
        try:
            response = self._ask(connection, length, fault)
            if response is None or fault.drop_response:
                self.close_connection = True
            else:
                self._pass_on(response, fault)
        except (OSError, HTTPException):
            # The server, or the client, is gone: the other side is told by a cut connection.
            self.close_connection = True
        finally:
            connection.close()

    def _ask(self, connection: HTTPConnection, length: int, fault: Fault) -> HTTPResponse | None:
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() != "expect":  # answered by this proxy
                connection.putheader(name, value)
        connection.endheaders()
        num_sent = 0
        while num_sent < length:
            piece = self.rfile.read(min(_PIECE, length - num_sent))
            if not piece:
                return None
            piece = _flipped(piece, fault.flip_request_byte, num_sent)
            if fault.cut_request_after is not None and num_sent + len(piece) > fault.cut_request_after:
                connection.send(piece[: fault.cut_request_after - num_sent])
                return None
            connection.send(piece)
            num_sent += len(piece)
        response = connection.getresponse()
        if fault.drop_response:
            response.read()
        return response

    def _pass_on(self, response: HTTPResponse, fault: Fault) -> None:
        length = response.getheader("Content-Length")
        headers = [
            (name, value)
            for name, value in response.getheaders()
            if name.lower() not in ("content-length", "transfer-encoding", "connection")
        ]
        if self.command == "HEAD" or length is None or response.status == 204:
            body = response.read()
            headers += [] if response.status == 204 else [("Content-Length", length or str(len(body)))]
            self._head(response.status, headers)
            self.wfile.write(body)
            return
        self._head(response.status, [*headers, ("Content-Length", length)])
        num_passed = 0
        while piece := _flipped(response.read(_PIECE), fault.flip_response_byte, num_passed):
            cut = fault.cut_response_after
            if cut is not None and num_passed + len(piece) > cut:
                self.wfile.write(piece[: cut - num_passed])
                self.close_connection = True
                return
            self.wfile.write(piece)
            num_passed += len(piece)
        if num_passed < int(length):  # the server was cut off itself
            self.close_connection = True

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self._head(status, [*headers, ("Content-Length", str(len(body)))])
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, headers: list[tuple[str, str]]) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def _read(self, length: int) -> None:
        while length > 0 and (piece := self.rfile.read(min(_PIECE, length))):
            length -= len(piece)


def _flipped(piece: bytes, position: int | None, start: int) -> bytes:
    """The piece, which begins at `start`, with the byte at `position` changed if that is in it."""
    if position is None or not start <= position < start + len(piece):
        return piece
    changed = bytearray(piece)
    changed[position - start] ^= 0xFF
    return bytes(changed)
