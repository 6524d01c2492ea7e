"""VDOLive: the message in which a player announces its UDP port."""

import struct

import pytest
from carried import carry, harmless
from fakes import HOST, REMOTE, session
from hypothesis import given, settings
from hypothesis import strategies as st
from talks import Talk, said

from xdpmasq.alg.api import Endpoint, Side
from xdpmasq.alg.vdolive import Vdolive

VDOLIVE = Vdolive()
PLAYER = session(7000)


def first(port: int, tag: bytes = b"VDO Live") -> bytes:
    return struct.pack("!II16s", 36, 6, b"sixteen bytes...") + tag + struct.pack("!I", port) + b"rest"


def test_the_port_is_opened() -> None:
    done, opened = carry(VDOLIVE, PLAYER, (Side.INSIDE, first(4000)), (Side.OUTSIDE, b"x"), (Side.INSIDE, b"y"))
    assert done == [first(40000), b"x", b"y"]
    (hole,) = opened
    assert (hole.protocol, hole.internal, hole.remote, hole.sessions) == ("udp", Endpoint(HOST, 4000), REMOTE, 1)


def test_ready_waits_for_the_port() -> None:
    assert [VDOLIVE.ready(first(4000)[:cut], Side.INSIDE, session(21)) for cut in range(41)] == [0] * 36 + list(
        range(36, 41)
    )
    assert VDOLIVE.ready(b"GET / HTTP/1.0", Side.INSIDE, session(21)) == 14
    assert VDOLIVE.ready(first(4000)[:5], Side.OUTSIDE, session(21)) == 5


LEFT = {
    "after something else": [b"GET / HTTP/1.0\r\n\r\n", first(4000)],
    "another number": [first(4000).replace(b"\0\6", b"\0\1")],
    "another tag": [first(4000, b"VDO Lime")],
    "not at the beginning": [b"x" + first(4000)],
    "cut": [first(4000)[:35]],
    "system port": [first(1023)],
    "no such port": [first(0x10FA0)],
}


@pytest.mark.req("attacks-slipstream")
@pytest.mark.parametrize("texts", LEFT.values(), ids=LEFT)
def test_nothing_is_opened(texts: list[bytes]) -> None:
    assert carry(VDOLIVE, PLAYER, *((Side.INSIDE, text) for text in texts)) == (texts, [])


@pytest.mark.parametrize("inside", [False, True], ids=["player", "server"])
def test_only_a_player_inside_is_heard(inside: bool) -> None:
    control, side = (session(7000, from_outside=True), Side.INSIDE) if inside else (PLAYER, Side.OUTSIDE)
    assert carry(VDOLIVE, control, (side, first(4000))) == ([first(4000)], [])


# for test_alg_fuzz.py
CONVERSATIONS = [
    Talk(name, said(*((Side.INSIDE, text) for text in texts), (Side.OUTSIDE, b"x")), port=7000)
    for name, texts in {"first": [first(4000), first(4002)], **LEFT}.items()
]


@pytest.mark.req("attacks-alg_fuzz")
@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(Side),
            st.binary(max_size=40)
            | st.builds(first, st.integers(0, 2**32 - 1), st.binary(min_size=7, max_size=9) | st.just(b"VDO Live")),
        ),
        max_size=4,
    )
)
def test_anything(steps: list[tuple[Side, bytes]]) -> None:
    harmless(VDOLIVE, PLAYER, *steps)
