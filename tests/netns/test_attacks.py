"""Attacks from outside on forwards and connections, each bounded, each survived.

::

    a-box .2 ─┐                                             ┌─ .10 internet: the attacker, raw sockets
    b-box .3 ─┴─ lan0 masq-gate 203.0.113.1 wan0 ─ exchange ┴─ .254 transit ─ 198.51.100.10 far
"""

import contextlib
import itertools
import random
import socket
import struct
from collections.abc import Iterator

import pytest
from netkit import Connection, Gateway, meet_tcp, raw, written
from scapy.layers.inet import IP, TCP, UDP, IPOption_LSRR, IPOption_SSRR
from scapy.packet import Packet

from xdpmasq.lab.topology import HOSTS, INTERNET, PUBLIC, TRANSIT

B = HOSTS["b-box"]
SYNS, EMBRYOS = 100_000, 4096


def joined(gateway: Gateway, port: int, inside: tuple[str, int]) -> Connection:
    """A connection from internet through a forward."""
    with gateway.listen(*inside) as listener:
        near = gateway.tcp("internet", (PUBLIC, port))
        far, peer = listener.accept()
    far.settimeout(5)
    return Connection(near, far, written(peer))


# --- floods ----------------------------------------------------------------------------------------


@pytest.mark.req("attacks-synflood")
def test_a_syn_flood_at_a_forward(gateway: Gateway) -> None:
    """From random sources: half-open sessions are capped, and push out each other only."""
    with (
        gateway.forward("tcp", "8080", f"{B}:9090"),
        joined(gateway, 8080, ("b-box", 9090)) as through,
        gateway.connection("a-box") as beside,
        gateway.listen("b-box", 9090) as server,
        raw(gateway, "internet", socket.IPPROTO_TCP) as attacker,
        gateway.counting() as grown,
    ):
        for number, packet in enumerate(syns(SYNS)):
            attacker.sendto(packet, (PUBLIC, 0))
            if number % 20_000 == 0:
                through.talk()
                beside.talk()
        through.talk(5)
        beside.talk(5)
        assert sessions_of(gateway, 8080) <= EMBRYOS + 1  # the established one
        server.close()
        for box in ("internet", "a-box"):
            meet_tcp(gateway, box, (PUBLIC, 8080), "b-box", 9090)
        assert gateway.opens()
    assert grown["forward_opened"] >= SYNS
    assert grown["embryo_evicted"] >= SYNS - 2 * EMBRYOS


def syns(count: int) -> Iterator[bytes]:
    chance = random.Random(1)
    destination = socket.inet_aton(PUBLIC)
    (high, low) = struct.unpack("!HH", destination)
    fixed = high + low + 6 + 20 + 8080 + 0x5002 + 65535  # pseudo header and what is alike in all
    for _ in range(count):
        source, port, seq = (
            chance.randrange(0xC6120000, 0xC6140000),
            chance.randrange(1024, 65536),
            chance.getrandbits(32),
        )
        total = fixed + (source >> 16) + (source & 0xFFFF) + port + (seq >> 16) + (seq & 0xFFFF)
        total = (total & 0xFFFF) + (total >> 16)
        check = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
        yield (
            struct.pack("!BBHHHBBHI", 0x45, 0, 40, 0, 0, 64, 6, 0, source)
            + destination
            + struct.pack("!HHIIHHHH", port, 8080, seq, 0, 0x5002, 65535, check, 0)
        )


def sessions_of(gateway: Gateway, port: int) -> int:
    """Of a forwarded TCP port."""
    tables = gateway.tables
    return int((tables.sessions["mapping"][tables.live_slots()] == port).sum())


@pytest.mark.req("attacks-rst")
def test_resets_from_off_the_path(gateway: Gateway) -> None:
    """With the right endpoints and 65,536 guesses at the sequence number."""
    with gateway.connection("a-box") as connection, raw(gateway, "far", socket.IPPROTO_TCP) as attacker:
        connection.talk(3)
        server, client = connection.far.getsockname(), connection.public.split(":")
        packet = bytearray(
            bytes(IP(src=server[0], dst=PUBLIC) / TCP(sport=server[1], dport=int(client[1]), flags="R"))
        )
        base = int.from_bytes(packet[36:38], "big")
        for guess in range(65_536):
            packet[24:26] = guess.to_bytes(2, "big")  # the sequence number's upper half
            total = (~base & 0xFFFF) + guess
            packet[36:38] = (~((total & 0xFFFF) + (total >> 16)) & 0xFFFF).to_bytes(2, "big")
            attacker.sendto(bytes(packet), (PUBLIC, 0))
        connection.talk(3)
        (session,) = gateway.sessions("--internal", written(connection.near.getsockname()))
        assert session["state"] == "ESTABLISHED"
        assert session["in"]["packets"] > 60_000  # they came


# --- packets that cannot be ------------------------------------------------------------------------


def strays(gateway: Gateway, packets: list[Packet], sender: str = "internet", receiver: str = "b-box") -> int:
    """How many of some UDP datagrams sent from one box get to another, on whatever port."""
    with (
        gateway.lab.capture(receiver, "eth0", "udp and dst port 9090") as seen,
        raw(gateway, sender, socket.IPPROTO_UDP) as attacker,
    ):
        for packet in packets:
            attacker.sendto(bytes(packet), (packet.dst, 0))
        return len(seen.stop())


@contextlib.contextmanager
def lenient(gateway: Gateway, name: str, value: int) -> Iterator[None]:
    """The kernel itself drops less."""
    names = [f"net.ipv4.conf.{interface}.{name}" for interface in ("all", "wan0", "lan0")]
    before = [gateway.sysctl(each) for each in names]
    for each in names:
        gateway.sysctl(each, value)
    try:
        yield
    finally:
        for each, value_before in zip(names, before, strict=True):
            gateway.sysctl(each, value_before)


MARTIANS = ["0.1.2.3", "127.0.0.1", "224.0.0.5", "240.0.0.1", "255.255.255.255", PUBLIC, *HOSTS.values()]


@pytest.mark.req("attacks-martian")
def test_sources_that_cannot_be_there(shared: tuple[Gateway, object]) -> None:
    """Towards a forward, to which everybody has access, and to the gateway itself."""
    gateway = shared[0]  # not watched for leaks: private addresses are on the wire, the attacker's
    packets = [
        IP(src=source, dst=PUBLIC) / UDP(sport=5000, dport=port) / b"?"
        for source, port in itertools.product(MARTIANS, (8080, 8079))
    ]
    with (
        gateway.forward("udp", "8080", f"{B}:9090"),
        lenient(gateway, "rp_filter", 0),
        gateway.counting() as grown,
    ):
        assert strays(gateway, packets) == 0
        assert strays(gateway, [IP(src=INTERNET, dst=PUBLIC) / UDP(sport=5000, dport=8080) / b"?"]) == 1
    assert grown["drop_source_martian"] == len(packets)
    assert grown["forward_opened"] == 1


@pytest.mark.req("attacks-martian")
def test_our_own_address_from_outside_within_a_hairpin(gateway: Gateway) -> None:
    """Somebody outside claims to be one end of a session between two hosts inside."""
    with (
        gateway.forward("udp", "8080", f"{B}:9090"),
        gateway.udp("a-box") as near,
        gateway.udp("b-box", 9090) as far,
        raw(gateway, "internet", socket.IPPROTO_UDP) as attacker,
        gateway.counting() as grown,
    ):

        def talk(text: bytes) -> tuple[str, int]:
            near.sendto(text, (PUBLIC, 8080))
            came, peer = far.recvfrom(100)
            assert came == text
            far.sendto(text, peer)
            assert near.recv(100) == text
            return peer

        for _ in range(3):
            peer = talk(b"inside")
        for sport, dport in ((peer[1], 8080), (8080, peer[1])):
            forged = IP(src=PUBLIC, dst=PUBLIC) / UDP(sport=sport, dport=dport) / b"forged"
            attacker.sendto(bytes(forged), (PUBLIC, 0))
        talk(b"still inside")
    assert grown["drop_source_martian"] == 2
    assert grown["fast_inbound"] == 0


@pytest.mark.req("attacks-options")
@pytest.mark.parametrize(
    ("option", "dropped"),
    [
        pytest.param(IPOption_LSRR, 2, id="loose"),
        pytest.param(IPOption_SSRR, 1, id="strict"),  # not addressed to itself, the kernel takes none
    ],
)
def test_source_routes(gateway: Gateway, option: type, dropped: int) -> None:
    """From outside to a forward, and from inside, although the kernel would take them."""
    routed = option(routers=[PUBLIC, TRANSIT])
    inward = IP(src=INTERNET, dst=PUBLIC, options=routed) / UDP(sport=5000, dport=8080) / b"?"
    outward = IP(src=HOSTS["a-box"], dst=INTERNET, options=routed) / UDP(sport=5000, dport=9090) / b"?"
    with (
        gateway.forward("udp", "8080", f"{B}:9090"),
        lenient(gateway, "accept_source_route", 1),
        gateway.counting() as grown,
    ):
        assert strays(gateway, [inward]) == 0
        assert strays(gateway, [outward], "a-box", "internet") == 0
    assert grown["drop_source_route"] == dropped
