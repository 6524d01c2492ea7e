"""Limits of internal hosts and of the pool: who goes too far is told by ICMP, all others have their sessions at once.

::

    a-box .2 ─┐
    b-box .3 ─┴─ lan0 masq-gate 203.0.113.1 wan0 ─ exchange ─ .10 internet: echo
"""

import contextlib
import errno
import socket
import struct
from collections.abc import Iterator

import pytest
from netkit import ECHO, Gateway, answers, ask, raw, soon

from xdpmasq.config import Limits
from xdpmasq.lab.servers import EchoServer
from xdpmasq.lab.topology import HOSTS, INTERNET

pytestmark = pytest.mark.xdist_group("limits")
UDP_CLASS = 1


@pytest.fixture(scope="module")
def shared() -> Iterator[Gateway]:
    with Gateway.in_new_lab("tc") as gateway:
        EchoServer(gateway.lab)
        yield gateway


@pytest.fixture
def gateway(shared: Gateway) -> Iterator[Gateway]:
    """Nobody has anything open, nor is remembered."""
    yield shared
    tables = shared.tables
    tables.flush(tables.live_slots())
    hosts = tables.maps["hosts"]
    for keys, _ in hosts.items(chunk=hosts.max_entries):
        for key in keys:
            hosts.delete(key)


def opened(gateway: Gateway, stack: contextlib.ExitStack, count: int, box: str = "a-box") -> list[socket.socket]:
    """UDP sockets with a session each."""
    made = [stack.enter_context(gateway.udp(box)) for _ in range(count)]
    for client in made:
        client.connect(ECHO)
        client.send(b"hello")
        assert client.recv(100) == b"hello"
    return made


def refusal(gateway: Gateway, kind: socket.SocketKind, box: str = "a-box") -> int:
    """The error that a new socket's first packet meets; 0: none."""
    with gateway.lab.socket(box, kind) as client:
        client.settimeout(3)
        try:
            client.connect(ECHO)  # of TCP nobody listens there
            client.send(b"hello")
            client.recv(100)
        except ConnectionRefusedError:
            return 0
        except OSError as error:
            return error.errno or -1
    return 0


def opens_at_once(gateway: Gateway, box: str = "b-box") -> None:
    with gateway.udp(box) as client:
        assert ask(client, b"me too") == b"me too"


@pytest.mark.req("6888-4")
@pytest.mark.req("5508-8")
@pytest.mark.parametrize(
    ("limit", "kind"),
    [
        pytest.param("host_sessions", socket.SOCK_DGRAM, id="sessions, UDP"),
        pytest.param("host_sessions", socket.SOCK_STREAM, id="sessions, TCP"),
        pytest.param("host_mappings", socket.SOCK_DGRAM, id="ports, UDP"),
    ],
)
def test_as_many_as_a_host_may_have(gateway: Gateway, limit: str, kind: socket.SocketKind) -> None:
    """The next is refused at once, with ICMP 3/13, of which Linux makes "No route to host"."""
    with gateway.settings(**{limit: 5}), contextlib.ExitStack() as stack, gateway.counting() as grown:
        sockets = opened(gateway, stack, 5)
        assert refusal(gateway, kind) == errno.EHOSTUNREACH
        opens_at_once(gateway)
        for client in sockets:
            assert ask(client, b"still here") == b"still here"
    assert grown["drop_host_limit"] == 1
    assert refusal(gateway, kind) == 0


@pytest.mark.req("6888-4")
def test_as_fast_as_a_host_may_open(gateway: Gateway) -> None:
    with gateway.settings(host_rate=5, host_burst=10), contextlib.ExitStack() as stack, gateway.counting() as grown:
        opened(gateway, stack, 10)
        assert refusal(gateway, socket.SOCK_DGRAM) == errno.EHOSTUNREACH
        opens_at_once(gateway)
        soon(lambda: refusal(gateway, socket.SOCK_DGRAM) == 0, "it may open another", timeout_s=2)
    assert grown["drop_host_rate"] >= 1


@pytest.mark.req("6888-11")
@pytest.mark.req("5508-8")
@pytest.mark.req("reliability-full")
def test_no_port_is_left(gateway: Gateway) -> None:
    """The refused are told, what runs goes on; and with ports given back all is well, without a restart."""
    pool = gateway.tables.settings["pool"].copy()
    pool["first"][UDP_CLASS], pool["count"][UDP_CLASS] = [4096, 0], [64, 0]
    with gateway.settings(pool=pool), contextlib.ExitStack() as stack, gateway.counting() as grown:
        sockets = opened(gateway, stack, 64)
        for box in ("a-box", "b-box"):
            assert refusal(gateway, socket.SOCK_DGRAM, box) == errno.EHOSTUNREACH
        for client in sockets:
            assert ask(client, b"still here") == b"still here"
        assert grown == {}
        gateway.tables.flush(gateway.tables.live_slots()[:1])
        soon(lambda: gateway.opens("b-box"), "a port is found")
    assert grown["drop_ports_exhausted"] >= 2


@pytest.mark.req("6888-5")
@pytest.mark.req("attacks-exhaust")
@pytest.mark.parametrize("way", ["ports", "remotes"])
def test_one_host_opens_as_many_as_it_can(gateway: Gateway, way: str) -> None:
    """From each of its ports, or from one to ever more remotes: another's session opens with its first packet."""
    limits = {"host_sessions": 30_000} if way == "remotes" else {}
    with (
        gateway.settings(**limits),
        raw(gateway, "a-box", socket.IPPROTO_UDP) as flood,
        gateway.udp("a-box") as own,
        gateway.udp("b-box") as other,
        gateway.counting() as grown,
    ):
        assert ask(own, b"mine") == b"mine"
        assert ask(other, b"other") == b"other"
        for nth, packet in enumerate(flooding(way)):
            flood.sendto(packet, (INTERNET, 0))
            if nth % 8000 == 0:
                opens_at_once(gateway)
        opens_at_once(gateway)
        assert ask(own, b"mine") == b"mine"
        assert ask(other, b"other") == b"other"
        assert not answers_new(gateway)
    assert grown["drop_host_limit"] > 10_000
    assert grown["session_opened"] > 20_000


def answers_new(gateway: Gateway) -> bool:
    with gateway.udp("a-box") as client:
        return answers(client)


def flooding(way: str) -> Iterator[bytes]:
    """64,000 UDP datagrams of a-box, to closed ports of internet."""
    head = struct.pack("!BBHHHBBH", 0x45, 0, 28, 0, 0, 64, 17, 0)
    addresses = socket.inet_aton(HOSTS["a-box"]) + socket.inet_aton(INTERNET)
    for number in range(1000, 65_000):
        sport, dport = (number, 9) if way == "ports" else (999, number)
        yield head + addresses + struct.pack("!HHHH", sport, dport, 8, 0)


@pytest.mark.req("5508-8")
@pytest.mark.parametrize(("word", "code"), [("prohibited", 13), ("host-unreachable", 1)])
def test_in_which_words(gateway: Gateway, word: str, code: int) -> None:
    """The ICMP that a refused host gets; the settings of the last test in this file, as it takes a new agent."""
    if word != "prohibited":
        gateway.kill_agent()
        gateway.attach_with(limits=Limits(refusal=word))
    with gateway.settings(host_sessions=0), gateway.lab.capture("a-box", "eth0", "icmp") as told:
        assert refusal(gateway, socket.SOCK_STREAM) == errno.EHOSTUNREACH
        (frame,) = told.stop()
    assert frame[34:36] == bytes([3, code])
    assert socket.inet_ntoa(frame[26:30]) == "192.168.0.1"
    assert frame[42 + 12 : 42 + 20] == socket.inet_aton(HOSTS["a-box"]) + socket.inet_aton(INTERNET)
