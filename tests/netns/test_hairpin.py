"""Hairpinning: hosts inside reach each other by their public endpoints (RFC 4787 REQ-9).

::

    a-box .2 ─┐
    b-box .3 ─┼─ lan0 192.168.0.1 ┐
    c-box .4 ─┘                   ├ masq-gate 203.0.113.1 wan0 ── .10 internet: echo
    d-box .2 ─── lan1 192.168.1.1 ┘
"""

import errno
import os
import re
import select
import socket
from collections.abc import Iterator

import pytest
from netkit import ECHO, Gateway, read, who

from xdpmasq.lab.topology import HOSTS, PUBLIC

IP_TTL, IP_RECVERR, IP_RECVTTL = 2, 11, 12  # linux/in.h


def public(client: socket.socket) -> tuple[str, int]:
    """A UDP socket's public endpoint, as the echo server outside tells it."""
    address, port = who(client).split(":")
    return address, int(port)


@pytest.mark.req("4787-9")
@pytest.mark.req("4787-9a")
def test_between_two_mappings(gateway: Gateway) -> None:
    """Both know the other's public endpoint only, and see only that."""
    with gateway.udp("a-box") as one, gateway.udp("b-box") as two:
        first, second = public(one), public(two)
        for number in range(20):
            one.sendto(b"to %d" % number, second)
            assert two.recvfrom(100) == (b"to %d" % number, first)
            two.sendto(b"fro %d" % number, first)
            assert one.recvfrom(100) == (b"fro %d" % number, second)
        assert public(one) == first


def test_a_socket_with_itself(gateway: Gateway) -> None:
    with gateway.udp("c-box") as alone:
        own = public(alone)
        alone.sendto(b"hello me", own)
        assert alone.recvfrom(100) == (b"hello me", own)


def test_another_lan_is_filtered_like_outside(gateway: Gateway) -> None:
    """Address-and-port-dependent: only after its own packet to that endpoint, as a stranger's outside."""
    with gateway.udp("d-box", timeout_s=0.3) as one, gateway.udp("b-box", timeout_s=0.3) as two:
        first, second = public(one), public(two)
        one.sendto(b"uninvited", second)
        with pytest.raises(TimeoutError):
            two.recv(100)
        two.sendto(b"invited by the packet before", first)
        assert one.recvfrom(100) == (b"invited by the packet before", second)
        one.sendto(b"now invited", second)
        assert two.recvfrom(100) == (b"now invited", first)


@pytest.mark.req("5382-8")
def test_tcp_simultaneous_open(gateway: Gateway) -> None:
    """Two LANs. Both have learned their public endpoints by connecting to outside, and call each other at once."""
    one, first = punched(gateway, "a-box")
    two, second = punched(gateway, "d-box")
    with one, two:
        for end, other in ((one, second), (two, first)):
            end.setblocking(False)
            assert end.connect_ex(other) == errno.EINPROGRESS
        for end, other in ((one, second), (two, first)):
            _, ready, _ = select.select([], [end], [], 5)
            assert ready
            assert end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
            assert end.getpeername() == other
            end.settimeout(5)
        exchange(one, two)


@pytest.mark.req("5382-8")
def test_tcp_to_a_mapping_on_the_same_lan(gateway: Gateway) -> None:
    server, public_name = punched(gateway, "b-box")
    client, seen_as = punched(gateway, "a-box")
    with server, client:
        server.listen()
        client.connect(public_name)
        far, peer = server.accept()
        with far:
            assert peer == seen_as
            exchange(client, far)


def punched(gateway: Gateway, box: str) -> tuple[socket.socket, tuple[str, int]]:
    """A TCP socket that does not do anything yet, and the public endpoint of its port."""
    made = bound(gateway, box)
    with (
        gateway.listen("internet", address=ECHO[0]) as rendezvous,
        bound(gateway, box, made.getsockname()[1]) as scout,
    ):
        scout.connect(rendezvous.getsockname())
        far, peer = rendezvous.accept()
        far.close()
    return made, peer


def bound(gateway: Gateway, box: str, port: int = 0) -> socket.socket:
    made = gateway.lab.socket(box, socket.SOCK_STREAM)
    made.settimeout(5)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind((HOSTS[box], port))
    return made


def exchange(one: socket.socket, two: socket.socket) -> None:
    for source, sink in ((one, two), (two, one)):
        text = os.urandom(20_000)
        source.sendall(text)
        assert read(sink, len(text)) == text


@pytest.mark.req("5508-7")
@pytest.mark.parametrize("box", ["a-box", "d-box"])
def test_icmp_errors_come_back(gateway: Gateway, box: str) -> None:
    """A closed port behind a forward: the caller's socket is told, as if it had called the Internet."""
    with gateway.forward("udp", "8080", f"{HOSTS['b-box']}:9999"), gateway.udp(box) as client:
        client.connect((PUBLIC, 8080))
        client.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            client.recv(100)


@pytest.mark.parametrize("box", ["a-box", "d-box"])
def test_large_datagrams(gateway: Gateway, box: str) -> None:
    """In fragments, both ways."""
    with (
        gateway.forward("udp", "8080", f"{HOSTS['b-box']}:9090"),
        gateway.udp(box) as near,
        gateway.udp("b-box", 9090) as far,
    ):
        for size in (1472, 1473, 8000, 40_000):
            text = os.urandom(size)
            near.sendto(text, (PUBLIC, 8080))
            came, peer = far.recvfrom(65535)
            assert came == text
            assert peer[0] == PUBLIC
            far.sendto(text, peer)
            assert near.recvfrom(65535) == (text, (PUBLIC, 8080))


def test_time_to_live(gateway: Gateway) -> None:
    """One less on the way, as through any router, and it can end here: traceroute shows the gateway, then the public
    address.
    """
    with gateway.forward("udp", "8080", f"{HOSTS['b-box']}:9090"):
        with gateway.udp("a-box") as near, gateway.udp("b-box", 9090) as far:
            near.setsockopt(socket.IPPROTO_IP, IP_TTL, 9)
            far.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
            near.sendto(b"?", (PUBLIC, 8080))
            _, [(_, _, ttl)], _, _ = far.recvmsg(100, 100)
            assert int.from_bytes(ttl, "little") == 8
        for box in ("a-box", "d-box"):
            traced = ["traceroute", "-n", "-U", "-p8080", "-q1", "-N1", "-w2", "-m4", PUBLIC]
            output = gateway.lab.exec(box, traced).stdout
            hops = re.findall(r"^ *\d+  (\S+)", output, re.MULTILINE)
            assert hops == [f"{HOSTS[box].rpartition('.')[0]}.1", PUBLIC], output


def test_nothing_of_it_leaves_by_the_wan(gateway: Gateway) -> None:
    with (
        gateway.forward("tcp", "8080", f"{HOSTS['b-box']}:9090"),
        gateway.lab.capture(*gateway.lab.topology.wan_wire, "tcp") as outside,
        gateway.listen("b-box", 9090) as listener,
        gateway.tcp("a-box", (PUBLIC, 8080)) as near,
    ):
        far, _ = listener.accept()
        with far:
            near.sendall(b"x" * 5000)
            assert read(far, 5000) == b"x" * 5000
        assert outside.stop() == []


RELAY = """
table ip relay {{
    chain pre {{ type nat hook prerouting priority -100; udp dport {port} dnat to {public}:{port}; }}
    chain post {{ type nat hook postrouting priority 100; masquerade; }}
}}
"""


@pytest.fixture
def relays(gateway: Gateway) -> Iterator[None]:
    """a-box passes on what comes for 8081, to the public address; b-box what comes for 8080."""
    boxes = {"a-box": 8081, "b-box": 8080}
    for box, port in boxes.items():
        gateway.lab.exec(box, ["nft", "-f", "-"], input=RELAY.format(port=port, public=PUBLIC))
        gateway.lab.exec(box, ["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.icmp_ratelimit=0"])
    yield
    for box in boxes:
        gateway.lab.exec(box, ["nft", "delete", "table", "ip", "relay"])
        gateway.lab.exec(box, ["sysctl", "-qw", "net.ipv4.ip_forward=0", "net.ipv4.icmp_ratelimit=1000"])


@pytest.mark.req("attacks-loop")
@pytest.mark.usefixtures("relays")
def test_forwards_that_lead_to_each_other(gateway: Gateway) -> None:
    """Round and round until the packet's time is over; what then is told comes all the way back, to who began it."""
    with (
        gateway.forward("udp", "8080", f"{HOSTS['a-box']}:8081"),
        gateway.forward("udp", "8081", f"{HOSTS['b-box']}:8080"),
        gateway.udp("c-box") as client,
        gateway.counting() as grown,
    ):
        client.setsockopt(socket.IPPROTO_IP, IP_TTL, 21)
        client.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        client.connect((PUBLIC, 8080))
        client.send(b"round and round")
        with pytest.raises(OSError, match="No route to host"):  # what Linux makes of Time Exceeded
            client.recv(100)
    assert 10 <= grown["forward_opened"] <= 11  # one of two hops each
