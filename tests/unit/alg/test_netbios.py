"""NetBIOS name queries by broadcast, and datagrams' source addresses."""

import struct

import pytest
from carried import carry, harmless
from fakes import GATEWAY, HOST, REMOTE, session
from hypothesis import given, settings
from hypothesis import strategies as st
from talks import Talk, said

from xdpmasq.alg.api import Control, Side
from xdpmasq.alg.netbios import Netbios

NETBIOS = Netbios()
ASKER, SENDER = session(137, "udp"), session(138, "udp", internal_port=138)
NAME = b"\x20" + b"CK" + b"A" * 30 + b"\0"


def query(flags: int, questions: int = 1) -> bytes:
    return struct.pack("!HHHHHH", 0x1234, flags, questions, 0, 0, 0) + NAME + struct.pack("!HH", 0x20, 1)


def datagram(kind: int, address: bytes, port: int) -> bytes:
    return (
        struct.pack("!BBH4sH", kind, 0x0A, 7, address, port) + struct.pack("!HH", 70, 0) + NAME + NAME + b"user data"
    )


@pytest.mark.parametrize("flags", [0x0110, 0x0010], ids=["recursion", "none"])
def test_answers_to_a_broadcast_are_let_in(flags: int) -> None:
    done, (hole,) = carry(NETBIOS, ASKER, (Side.INSIDE, query(flags)))
    assert done == [query(flags)]
    assert (hole.internal, hole.external) == (ASKER.internal, ASKER.external)
    assert (hole.remote, hole.remote_port, hole.lasts_s, hole.sessions) == (None, 137, 3, 0)


CLOSED = {
    "unicast": (ASKER, Side.INSIDE, query(0x0100)),
    "response": (ASKER, Side.INSIDE, query(0x8510)),
    "registration": (ASKER, Side.INSIDE, query(0x2910)),
    "no question": (ASKER, Side.INSIDE, query(0x0110, 0)),
    "from outside": (ASKER, Side.OUTSIDE, query(0x0110)),
    "asked from outside": (session(137, "udp", from_outside=True), Side.INSIDE, query(0x0110)),
    "from port 137": (session(137, "udp", internal_port=137), Side.INSIDE, query(0x0110)),
    "cut": (ASKER, Side.INSIDE, query(0x0110)[:11]),
}


@pytest.mark.req("attacks-slipstream")
@pytest.mark.parametrize(("control", "side", "text"), CLOSED.values(), ids=CLOSED)
def test_nothing_is_opened(control: Control, side: Side, text: bytes) -> None:
    assert carry(NETBIOS, control, (side, text)) == ([text], [])


MINE, OUTSIDE = (HOST.packed, 138), (GATEWAY.packed, 30000)
SOURCES = {
    **{
        f"type {kind:#x}": (Side.INSIDE, datagram(kind, *MINE), datagram(kind, *OUTSIDE))
        for kind in range(0x10, 0x17)
    },
    "no type": (Side.INSIDE, datagram(0x17, *MINE), datagram(0x17, *MINE)),
    "another's": (Side.INSIDE, datagram(0x11, REMOTE.packed, 138), datagram(0x11, REMOTE.packed, 138)),
    "another port": (Side.INSIDE, datagram(0x11, HOST.packed, 139), datagram(0x11, HOST.packed, 139)),
    "in": (Side.OUTSIDE, datagram(0x11, *MINE), datagram(0x11, *MINE)),
    "cut": (Side.INSIDE, datagram(0x11, *MINE)[:9], datagram(0x11, *MINE)[:9]),
}


@pytest.mark.parametrize(("side", "before", "after"), SOURCES.values(), ids=SOURCES)
def test_datagrams(side: Side, before: bytes, after: bytes) -> None:
    assert carry(NETBIOS, SENDER, (side, before)) == ([after], [])


# for test_alg_fuzz.py
CONVERSATIONS = [
    *(Talk(name, said((side, text)), port=137, protocol="udp") for name, (_, side, text) in CLOSED.items()),
    *(Talk(f"{flags:#x}", said((Side.INSIDE, query(flags))), port=137, protocol="udp") for flags in (0x0110, 0x0010)),
    *(
        Talk(name, said((side, text)), port=138, protocol="udp", internal_port=138)
        for name, (side, text, _) in SOURCES.items()
    ),
]


@pytest.mark.req("attacks-alg_fuzz")
@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([ASKER, SENDER]),
    st.binary(max_size=60)
    | st.builds(query, st.integers(0, 65535), st.integers(0, 3))
    | st.builds(datagram, st.integers(0, 255), st.binary(min_size=4, max_size=4), st.integers(0, 65535)),
    st.sampled_from(Side),
)
def test_anything(control: Control, text: bytes, side: Side) -> None:
    harmless(NETBIOS, control, (side, text))
