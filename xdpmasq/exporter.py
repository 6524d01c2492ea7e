"""The HTTP server that shows metrics, in threads of its own, so that nobody who asks can hold up the agent.

Its clients are bounded. While there is room each is served by a thread; the next one then takes the place of the one
that has been slow for longest, so slow ones, however many, keep nobody out who asks at once what he wants. There is
one collection at a time, and those who ask meanwhile share the next.
"""

from __future__ import annotations

import errno
import gzip
import ipaddress
import logging
import socket
import socketserver
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar

from xdpmasq.errors import HostError
from xdpmasq.webconfig import Web

log = logging.getLogger("xdpmasq")

PATH = "/metrics"
CLIENTS = 32
PATIENCE_S = 10.0  # for a client from its coming to its end
_WAITING = 128  # not accepted yet
_FREEBIND = {4: (socket.IPPROTO_IP, 15), 6: (socket.IPPROTO_IPV6, 78)}  # IP_FREEBIND, IPV6_FREEBIND

Answer = Callable[[str], tuple[bytes, str]]  # what is accepted → text and its content type


@dataclass
class _Guest:
    """A client who is here."""

    connection: socket.socket
    until: float
    is_served: bool = False  # the delay is ours


class _Guests:
    """Those who are here, in the order in which they came."""

    def __init__(self) -> None:
        self._present: OrderedDict[int, _Guest] = OrderedDict()
        self._lock = threading.Lock()

    def admit(self, connection: socket.socket) -> bool:
        """Whether there is room, if need be that of the slowest."""
        with self._lock:
            if len(self._present) >= CLIENTS:
                slowest = next((each for each in self._present.values() if not each.is_served), None)
                if not slowest:
                    return False
                self._send_off(slowest)
            self._present[id(connection)] = _Guest(connection, time.monotonic() + PATIENCE_S)
            return True

    def serve(self, connection: socket.socket, served: bool) -> bool:
        """Whether the client is still here."""
        with self._lock:
            guest = self._present.get(id(connection))
            if guest:
                guest.is_served = served
            return bool(guest)

    def leave(self, connection: socket.socket) -> None:
        with self._lock:
            self._present.pop(id(connection), None)

    def send_off_late(self) -> None:
        now = time.monotonic()
        with self._lock:
            for guest in [each for each in self._present.values() if each.until < now]:
                self._send_off(guest)

    def _send_off(self, guest: _Guest) -> None:
        """Its thread sees the connection end, and ends."""
        del self._present[id(guest.connection)]
        with suppress(OSError):
            guest.connection.shutdown(socket.SHUT_RDWR)


class Exporter(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Bound at once, served later: what is wrong with address or port is said before anything is attached.

    Args:
        endpoint: address and port.
        web: who may come.

    Raises:
        HostError: the address is not here, or the port is taken.
    """

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = _WAITING

    def __init__(self, endpoint: tuple[str, int], web: Web) -> None:
        self._endpoint, self._address = endpoint, ipaddress.ip_address(endpoint[0])
        self.address_family = socket.AF_INET6 if self._address.version == 6 else socket.AF_INET
        self._tls, self.gate, self._guests = web.tls, web.gate(), _Guests()
        self._collecting = threading.Lock()
        self._answer: Answer | None = None
        self._latest: tuple[float, str, tuple[bytes, str]] = (
            0.0,
            "",
            (b"", ""),
        )  # begun at, what was accepted, answer
        self.url = f"{'https' if web.tls else 'http'}://{_joined(*endpoint)}{PATH}"
        try:
            super().__init__(endpoint, _Handler)
        except OSError as error:
            raise _cannot_listen(endpoint, error) from error

    def serve(self, answer: Answer) -> None:
        """Begins to answer."""
        self._answer = answer
        threading.Thread(target=self.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        if self._answer:
            ending = threading.Thread(target=self.shutdown)
            ending.start()
            # It looks only when somebody comes, or after half a second.
            with suppress(OSError), socket.create_connection(self._endpoint, timeout=0.5):
                ending.join()
            ending.join()
        self.server_close()

    def collect(self, connection: socket.socket, accept: str) -> tuple[bytes, str] | None:
        """The metrics, begun to be collected after this was called; None for a client who was sent off.

        A request that was cut off looks like a whole one to http.server.
        """
        asked_at = time.monotonic()
        if not self._guests.serve(connection, True):
            return None
        try:
            with self._collecting:
                begun_at, accepted, found = self._latest
                if begun_at < asked_at or accepted != accept:
                    begun_at = time.monotonic()
                    assert self._answer
                    found = self._answer(accept)
                    self._latest = (begun_at, accept, found)
                return found
        finally:
            self._guests.serve(connection, False)

    # called by socketserver

    def server_bind(self) -> None:
        if self._address.is_loopback:  # which is there only once lo is up: fresh namespaces leave it down
            self.socket.setsockopt(*_FREEBIND[self._address.version], 1)
        super().server_bind()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._guests.admit(request):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """In the client's own thread."""
        request.settimeout(PATIENCE_S)
        if not self._tls:
            super().finish_request(request, client_address)
            return
        with self._tls.wrap_socket(request.dup(), server_side=True) as encrypted:
            _Handler(encrypted, client_address, self, request)

    def shutdown_request(self, request: Any) -> None:
        self._guests.leave(request)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Twice a second."""
        self._guests.send_off_late()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go, speak no TLS, or are sent off are no news."""
        log.debug("metrics: a request of %s failed", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """One request of one client; the connection ends with it (HTTP/1.0)."""

    server: Exporter
    server_version: ClassVar[str] = "xdpmasq"  # type: ignore[misc]
    sys_version: ClassVar[str] = ""  # type: ignore[misc]

    def __init__(self, request: Any, client: Any, server: Exporter, plain: socket.socket | None = None) -> None:
        self._plain = plain or request
        super().__init__(request, client, server)

    def do_GET(self) -> None:
        if not self.server.gate.admits(self.headers.get("Authorization")):
            self._send(HTTPStatus.UNAUTHORIZED, b"", {"WWW-Authenticate": 'Basic realm="xdpmasq"'})
            return
        if self.path.partition("?")[0] != PATH:
            self._send(HTTPStatus.NOT_FOUND, f"see {PATH}\n".encode())
            return
        found = self.server.collect(self._plain, self.headers.get("Accept", ""))
        if not found:
            return
        body, kind = found
        if "gzip" in self.headers.get("Accept-Encoding", ""):
            body, encoding = gzip.compress(body, 1), {"Content-Encoding": "gzip"}
        else:
            encoding = {}
        self._send(HTTPStatus.OK, body, {"Content-Type": kind, **encoding})

    def _send(self, status: HTTPStatus, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("metrics: %s " + format, self.client_address[0], *args)


def _joined(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _cannot_listen(endpoint: tuple[str, int], error: OSError) -> HostError:
    what = f"cannot serve metrics on {_joined(*endpoint)}"
    do = "name another endpoint by listen in [metrics] of --config FILE, or switch them off there: enabled = false"
    if error.errno == errno.EADDRINUSE:
        return HostError(what, "the port is taken, perhaps by another xdpmasq (see `ss -ltnp`)", do)
    if error.errno == errno.EADDRNOTAVAIL:
        return HostError(what, "this machine does not have the address", do)
    return HostError(what, f"the kernel says: {error.strerror}", do)
