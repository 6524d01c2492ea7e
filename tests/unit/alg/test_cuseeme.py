"""CU-SeeMe: the host's address in headers and lists of participants."""

import struct
from ipaddress import IPv4Address

import pytest
from carried import carry, harmless
from fakes import GATEWAY, HOST, REMOTE, session
from hypothesis import given, settings
from hypothesis import strategies as st
from talks import Talk, said

from xdpmasq.alg.api import Side
from xdpmasq.alg.cuseeme import Cuseeme

CUSEEME = Cuseeme()
MEMBER = session(7648, "udp", internal_port=7648)
NOBODY, OTHER = IPv4Address(0), IPv4Address("198.51.100.99")
VIDEO, OPEN_CONTINUE = 1, 101


def packet(to: IPv4Address, by: IPv4Address, kind: int = VIDEO, more: bytes = b"") -> bytes:
    length = 26 + len(more)
    return struct.pack("!HH4sHH4sIHHH", 0, 7648, to.packed, 1, 7648, by.packed, 77, 0, kind, length) + more


def clients(*members: IPv4Address, count: int | None = None) -> bytes:
    head = struct.pack("!HI20s4s", len(members) if count is None else count, 5, b"\4Name", b"\1\1\0\2")
    return head + b"".join(member.packed + b"informed" for member in members)


CASES = {
    "its own, out": (Side.INSIDE, packet(NOBODY, HOST), packet(NOBODY, GATEWAY)),
    "none, out": (Side.INSIDE, packet(OTHER, NOBODY), packet(OTHER, NOBODY)),
    "another's, out": (Side.INSIDE, packet(HOST, OTHER), packet(HOST, OTHER)),
    "to it": (Side.OUTSIDE, packet(GATEWAY, OTHER), packet(HOST, OTHER)),
    "to all": (Side.OUTSIDE, packet(NOBODY, OTHER), packet(NOBODY, OTHER)),
    "by it, in": (Side.OUTSIDE, packet(NOBODY, GATEWAY), packet(NOBODY, GATEWAY)),
    "participants": (
        Side.OUTSIDE,
        packet(GATEWAY, REMOTE, OPEN_CONTINUE, clients(OTHER, GATEWAY, REMOTE)),
        packet(HOST, REMOTE, OPEN_CONTINUE, clients(OTHER, HOST, REMOTE)),
    ),
    "fewer than counted": (
        Side.OUTSIDE,
        packet(NOBODY, REMOTE, OPEN_CONTINUE, clients(GATEWAY, count=65535) + GATEWAY.packed),
        packet(NOBODY, REMOTE, OPEN_CONTINUE, clients(HOST, count=65535) + GATEWAY.packed),
    ),
    "more than counted": (
        Side.OUTSIDE,
        packet(NOBODY, REMOTE, OPEN_CONTINUE, clients(GATEWAY, GATEWAY, count=1)),
        packet(NOBODY, REMOTE, OPEN_CONTINUE, clients(HOST, GATEWAY, count=1)),
    ),
    "the like in video": (
        Side.OUTSIDE,
        packet(NOBODY, REMOTE, VIDEO, clients(GATEWAY)),
        packet(NOBODY, REMOTE, VIDEO, clients(GATEWAY)),
    ),
    "participants, out": (
        Side.INSIDE,
        packet(NOBODY, HOST, OPEN_CONTINUE, clients(HOST)),
        packet(NOBODY, GATEWAY, OPEN_CONTINUE, clients(HOST)),
    ),
    "cut": (Side.INSIDE, packet(NOBODY, HOST)[:25], packet(NOBODY, HOST)[:25]),
    "cut list": (
        Side.OUTSIDE,
        packet(GATEWAY, REMOTE, OPEN_CONTINUE, clients(GATEWAY)[:-1]),
        packet(HOST, REMOTE, OPEN_CONTINUE, clients(GATEWAY)[:-1]),
    ),
    "no such data": (Side.INSIDE, packet(NOBODY, HOST, 4), packet(NOBODY, HOST, 4)),
    "family": (Side.INSIDE, b"\0\3" + packet(NOBODY, HOST)[2:], b"\0\3" + packet(NOBODY, HOST)[2:]),
}


@pytest.mark.parametrize(("side", "before", "after"), CASES.values(), ids=CASES)
def test_addresses(side: Side, before: bytes, after: bytes) -> None:
    assert carry(CUSEEME, MEMBER, (side, before)) == ([after], [])


# for test_alg_fuzz.py
CONVERSATIONS = [
    Talk(name, said((side, text), (other, text)), port=7648, protocol="udp", internal_port=7648)
    for name, (side, text, _) in CASES.items()
    for other in Side
]

ANYBODY = st.sampled_from([NOBODY, HOST, GATEWAY, REMOTE])


@pytest.mark.req("attacks-alg_fuzz")
@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=80) | st.builds(packet, ANYBODY, ANYBODY, st.integers(99, 102), st.binary(max_size=60)),
    st.sampled_from(Side),
)
def test_anything(text: bytes, side: Side) -> None:
    harmless(CUSEEME, MEMBER, (side, text))
