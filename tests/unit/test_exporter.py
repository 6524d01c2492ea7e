"""The metrics' HTTP server: who is answered, who is not, and that the slow keep nobody out."""

import base64
import gzip
import http.client
import itertools
import resource
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import bcrypt
import pytest

from xdpmasq import exporter
from xdpmasq.errors import HostError
from xdpmasq.exporter import CLIENTS, Exporter
from xdpmasq.webconfig import Web

TEXT = b"one 1\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def serve() -> Iterator[Any]:
    with ExitStack() as stack:

        def begin(web: Web | None = None, answer: Any = lambda accept: (TEXT, "text/plain")) -> int:
            port = free_port()
            server = Exporter(("127.0.0.1", port), web or Web())
            stack.callback(server.close)
            server.serve(answer)
            return port

        yield begin


def get(port: int, path: str = "/metrics", **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    return connection.getresponse()


def test_it_answers(serve: Any) -> None:
    answer = get(serve())
    assert (answer.status, answer.read(), answer.headers["Content-Type"]) == (200, TEXT, "text/plain")


def test_what_is_accepted_is_asked_for(serve: Any) -> None:
    port = serve(answer=lambda accept: (b"x", f"kind of {accept}"))
    assert get(port, Accept="openmetrics").headers["Content-Type"] == "kind of openmetrics"


def test_it_compresses(serve: Any) -> None:
    answer = get(serve(), Accept_Encoding="deflate, gzip")
    assert answer.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(answer.read()) == TEXT


def test_other_paths_are_not_there(serve: Any) -> None:
    port = serve()
    assert get(port, "/").status == 404
    assert get(port, "/metrics?name[]=one").status == 200


@pytest.mark.parametrize(
    "words", [b"nonsense\r\n\r\n", b"POST /metrics HTTP/1.1\r\n\r\n", b"GET " + b"x" * 70000 + b"\r\n"]
)
def test_nonsense_is_refused(serve: Any, words: bytes) -> None:
    port = serve()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(words)
        assert b" 200 " not in client.recv(4096)
    assert get(port).status == 200


def test_passwords(serve: Any) -> None:
    port = serve(Web(users={"ali": bcrypt.hashpw(b"open", bcrypt.gensalt(4)).decode()}))
    refused = get(port)
    assert (refused.status, refused.headers["WWW-Authenticate"]) == (401, 'Basic realm="xdpmasq"')
    assert get(port, "/").status == 401
    assert get(port, Authorization="Basic " + base64.b64encode(b"ali:open").decode()).read() == TEXT


def test_tls(serve: Any, tls: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls / "cert.pem", tls / "key.pem")
    port = serve(Web(tls=context))
    trusting = ssl.create_default_context(cafile=str(tls / "cert.pem"))
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=trusting, timeout=20)
    with socket.create_connection(("127.0.0.1", port)):  # one that says nothing keeps nobody waiting
        connection.request("GET", "/metrics")
        assert connection.getresponse().read() == TEXT
    with pytest.raises((http.client.HTTPException, OSError)):
        get(port)


def test_a_thousand_slow_clients_keep_nobody_out(serve: Any) -> None:
    collected: list[str] = []

    def answer(accept: str) -> tuple[bytes, str]:
        collected.append(accept)
        return TEXT, "text/plain"

    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # a shell's are often 1024 and more than enough
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, most)), most))
    port = serve(answer=answer)
    before = threading.active_count()
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, most))
        for _ in range(1000):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            slow.sendall(b"GET /metrics HTTP/1.0\r\n")
        started = time.monotonic()
        assert get(port).read() == TEXT
        assert time.monotonic() - started < exporter.PATIENCE_S / 2
        assert threading.active_count() - before < 10 * CLIENTS  # those sent off need a moment to end
        assert len(collected) == 1


def test_slow_readers_are_sent_off(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "PATIENCE_S", 0.3)
    port = serve(answer=lambda accept: (bytes(64 << 20), "text/plain"))
    with socket.create_connection(("127.0.0.1", port), timeout=20) as slow:
        slow.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        slow.recv(1)
        time.sleep(1)
        got = 0
        while part := _read(slow):
            got += len(part)
        assert got < 64 << 20


def _read(stream: socket.socket) -> bytes:
    try:
        return stream.recv(1 << 20)
    except ConnectionError:
        return b""


def test_one_at_a_time_is_collected_for(serve: Any) -> None:
    at_once, most = [0], [0]

    def answer(accept: str) -> tuple[bytes, str]:
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        time.sleep(0.02)
        at_once[0] -= 1
        return TEXT, "text/plain"

    port = serve(answer=answer)
    found: list[bytes] = []
    asking = [threading.Thread(target=lambda: found.append(get(port).read())) for _ in range(8)]
    for each in asking:
        each.start()
    for each in asking:
        each.join()
    assert found == [TEXT] * 8
    assert most == [1]


def test_those_who_ask_meanwhile_share_the_next(serve: Any) -> None:
    numbers = itertools.count(1)
    going_on = threading.Event()

    def answer(accept: str) -> tuple[bytes, str]:
        number = next(numbers)
        if number == 1:
            going_on.wait(10)
        return str(number).encode(), "text/plain"

    port = serve(answer=answer)
    found: list[bytes] = []
    asking = [threading.Thread(target=lambda: found.append(get(port).read())) for _ in range(8)]
    asking[0].start()
    time.sleep(0.2)
    for each in asking[1:]:
        each.start()
    time.sleep(0.5)
    going_on.set()
    for each in asking:
        each.join()
    assert sorted(found) == [b"1", *[b"2"] * 7]
    assert get(port).read() == b"3"


def test_those_who_are_waited_for_are_not_sent_off(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one's metrics are collected he is no slow client."""
    monkeypatch.setattr(exporter, "CLIENTS", 2)
    going_on = threading.Event()

    def answer(accept: str) -> tuple[bytes, str]:
        going_on.wait(10)
        return TEXT, "text/plain"

    port = serve(answer=answer)
    found: list[bytes] = []
    asking = threading.Thread(target=lambda: found.append(get(port).read()))
    asking.start()
    time.sleep(0.2)
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        time.sleep(0.2)
        going_on.set()
        asking.join()
    assert found == [TEXT]


def test_a_taken_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(HostError, match=rf"cannot serve metrics on 127.0.0.1:{port}: the port is taken"):
            Exporter(("127.0.0.1", port), Web())


def test_an_address_that_is_not_here() -> None:
    with pytest.raises(HostError, match=r"cannot serve metrics on 192.0.2.1:9477: this machine does not have"):
        Exporter(("192.0.2.1", 9477), Web())


def test_its_url() -> None:
    port = free_port()
    server = Exporter(("127.0.0.1", port), Web())
    assert server.url == f"http://127.0.0.1:{port}/metrics"
    server.close()
