"""Fragments in any order, from raw sockets, both ways (RFC 4787 REQ-14); the far kernel puts them together.

::

    a-box .2 ─┐
    b-box .3 ─┴─ lan0 masq-gate 203.0.113.1 wan0 ─ exchange ─ .10 internet
"""

import itertools
import os
import socket
import time
from collections.abc import Callable, Sequence

import pytest
from netkit import Gateway, ask, raw, receive, soon
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.packet import Packet, Raw

from xdpmasq.lab.topology import HOSTS, INTERNET, PUBLIC

PIECE = 400  # bytes of each fragment's payload
IDENTIFIERS = itertools.count(0x4000)

Order = Callable[[list[bytes]], Sequence[bytes]]
ORDERS: dict[str, Order] = {
    "in order": lambda pieces: pieces,
    "reverse": lambda pieces: pieces[::-1],
    "first last": lambda pieces: [*pieces[1:], pieces[0]],
    "last first": lambda pieces: [pieces[-1], *pieces[:-1]],
    "middle first": lambda pieces: [*pieces[1::2], *pieces[::2]],
    "twice": lambda pieces: [piece for piece in pieces[::-1] for _ in range(2)],
}
any_order = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)


def transport(protocol: str, sport: int, dport: int, text: bytes) -> Packet:
    """A TCP segment (opening a connection, as only such a one opens a session), UDP datagram or echo request."""
    return {
        "udp": UDP(sport=sport, dport=dport),
        "tcp": TCP(sport=sport, dport=dport, flags="S", seq=1),
        "icmp": ICMP(type=8, id=sport),
    }[protocol] / Raw(text)


def answer(protocol: str, public: int, dport: int, text: bytes) -> Packet:
    return {
        "udp": UDP(sport=dport, dport=public),
        "tcp": TCP(sport=dport, dport=public, flags="SA", seq=1, ack=2 + len(text)),
        "icmp": ICMP(type=0, id=public),
    }[protocol] / Raw(text)


def pieces(src: str, dst: str, packet: Packet) -> list[bytes]:
    """A packet's fragments, in order."""
    whole = IP(bytes(IP(src=src, dst=dst, id=next(IDENTIFIERS)) / packet))
    payload = bytes(whole.payload)
    starts = range(0, len(payload), PIECE)
    return [
        bytes(
            IP(src=src, dst=dst, id=whole.id, proto=whole.proto, frag=at // 8, flags="MF" if at != starts[-1] else 0)
            / payload[at : at + PIECE]
        )
        for at in starts
    ]


def is_intact(packet: bytes) -> bool:
    """Whether all its checksums are right."""
    again = IP(packet)
    del again.chksum, again.payload.chksum
    return bytes(again) == packet


NUMBERS = {"udp": socket.IPPROTO_UDP, "tcp": socket.IPPROTO_TCP, "icmp": socket.IPPROTO_ICMP}


@pytest.mark.req("4787-14")
@any_order
@pytest.mark.parametrize("protocol", NUMBERS)
def test_both_ways(gateway: Gateway, protocol: str, order: Order) -> None:
    text, back = os.urandom(1900), os.urandom(1900)
    sport = 20_000 + next(IDENTIFIERS) % 8192
    number = NUMBERS[protocol]
    with raw(gateway, "a-box", number) as near, raw(gateway, "internet", number) as far:
        for piece in order(pieces(HOSTS["a-box"], INTERNET, transport(protocol, sport, 4000, text))):
            near.sendto(piece, (INTERNET, 0))
        came = receive(far, lambda packet: packet.endswith(text))
        assert IP(came).src == PUBLIC
        assert is_intact(came)
        public = IP(came).payload.id if protocol == "icmp" else IP(came).payload.sport
        for piece in order(pieces(INTERNET, PUBLIC, answer(protocol, public, 4000, back))):
            far.sendto(piece, (PUBLIC, 0))
        came = receive(near, lambda packet: packet.endswith(back))
        assert (IP(came).src, IP(came).dst) == (INTERNET, HOSTS["a-box"])
        assert is_intact(came)
        assert (IP(came).payload.id if protocol == "icmp" else IP(came).payload.dport) == sport


@pytest.mark.req("4787-14")
@pytest.mark.parametrize("protocol", NUMBERS)
def test_two_datagrams_interleaved_and_slowly(gateway: Gateway, protocol: str) -> None:
    """Of two hosts, with their first fragments last and a pause before those."""
    texts = {box: os.urandom(1900) for box in ("a-box", "b-box")}
    number = NUMBERS[protocol]
    cut = {
        box: pieces(HOSTS[box], INTERNET, transport(protocol, 21_000, 4000, text))[::-1]
        for box, text in texts.items()
    }
    with (
        raw(gateway, "a-box", number) as one,
        raw(gateway, "b-box", number) as two,
        raw(gateway, "internet", number) as far,
    ):
        for nth in range(len(cut["a-box"])):
            if nth == len(cut["a-box"]) - 1:
                time.sleep(0.3)
            for box, near in (("a-box", one), ("b-box", two)):
                near.sendto(cut[box][nth], (INTERNET, 0))
        came = set()
        while len(came) < len(texts):
            packet = receive(far, lambda packet: packet[-1900:] in texts.values())
            assert is_intact(packet)
            came.add(packet[-1900:])


@pytest.mark.req("4787-14a")
@pytest.mark.req("attacks-fragments")
def test_a_flood_of_orphans(gateway: Gateway) -> None:
    """Later fragments whose first never comes, 20,000 from inside and 20,000 from outside: others are served, their
    fragments too, and afterwards also those that come in disorder.
    """
    with (
        raw(gateway, "b-box", socket.IPPROTO_UDP) as inside,
        raw(gateway, "internet", socket.IPPROTO_UDP) as outside,
        gateway.udp("a-box") as client,
        gateway.counting() as grown,
    ):
        assert ask(client, b"before") == b"before"
        for number in range(20_000):
            for flood, src, dst in ((inside, HOSTS["b-box"], INTERNET), (outside, INTERNET, PUBLIC)):
                flood.sendto(orphan(src, dst, number), (dst, 0))
            if number % 2000 == 0:
                assert ask(client, b"small %d" % number) == b"small %d" % number
                large = os.urandom(3000)
                assert ask(client, large) == large
    assert grown["punt_fragment"] < 10_000  # of 40,000: what the agent gets is bounded
    assert grown["drop_fragment_orphan"] > 10_000

    def passes() -> bool:
        text = os.urandom(1900)
        with raw(gateway, "a-box", socket.IPPROTO_UDP) as near, raw(gateway, "internet", 17, timeout_s=0.5) as far:
            for piece in pieces(HOSTS["a-box"], INTERNET, transport("udp", 22_000, 4000, text))[::-1]:
                near.sendto(piece, (INTERNET, 0))
            try:
                return bool(receive(far, lambda packet: packet.endswith(text)))
            except TimeoutError:
                return False

    soon(passes, "fragments in disorder pass again", timeout_s=5)


def orphan(src: str, dst: str, number: int) -> bytes:
    head = b"\x45\0\0\x24" + number.to_bytes(2, "big") + b"\0\x40\x40\x11\0\0"  # at byte 512, the kernel sums it
    return head + socket.inet_aton(src) + socket.inet_aton(dst) + bytes(16)
