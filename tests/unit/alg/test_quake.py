"""Quake: the port of the game in CCREP_ACCEPT."""

import struct

import pytest
from carried import carry, harmless
from fakes import GATEWAY, HOST, REMOTE, session
from hypothesis import given, settings
from hypothesis import strategies as st
from talks import Talk, said

from xdpmasq.alg.api import Control, Endpoint, Side
from xdpmasq.alg.quake import Quake

QUAKE = Quake()
CLIENT, SERVER = session(26000, "udp"), session(26000, "udp", from_outside=True)
CONNECT = bytes.fromhex("80 00 00 0c 01 51 55 41 4b 45 00 03")


def accept(port: int, more: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("!HHB", 0x8000, length or 9 + len(more), 0x81) + struct.pack("<I", port) + more


@pytest.mark.parametrize("more", [b"", b"\1\x1e\0"], ids=["Quake", "ProQuake"])
def test_a_clients_mapping_is_open_to_the_game(more: bytes) -> None:
    steps = (Side.INSIDE, CONNECT), (Side.OUTSIDE, accept(1515, more))
    done, (hole,) = carry(QUAKE, CLIENT, *steps)
    assert done == [text for _, text in steps]
    assert (hole.protocol, hole.internal, hole.external) == ("udp", CLIENT.internal, CLIENT.external)
    assert (hole.remote, hole.remote_port, hole.sessions) == (REMOTE, 1515, 1)


@pytest.mark.parametrize("more", [b"", b"\1\x1e\0"], ids=["Quake", "ProQuake"])
def test_a_servers_game_is_opened(more: bytes) -> None:
    done, (hole,) = carry(QUAKE, SERVER, (Side.OUTSIDE, CONNECT), (Side.INSIDE, accept(1515, more)))
    assert done == [CONNECT, accept(40000, more)]
    assert (hole.protocol, hole.internal) == ("udp", Endpoint(HOST, 1515))
    assert hole.external.address == GATEWAY
    assert (hole.remote, hole.remote_port, hole.sessions) == (REMOTE, None, 1)


LEFT = {
    "by the client": (CLIENT, Side.INSIDE, accept(1515)),
    "by the other client": (SERVER, Side.OUTSIDE, accept(1515)),
    "system port": (CLIENT, Side.OUTSIDE, accept(53)),
    "own system port": (SERVER, Side.INSIDE, accept(53)),
    "no such port": (SERVER, Side.INSIDE, accept(0x10000 + 1515)),
    "big-endian": (SERVER, Side.INSIDE, accept(int.from_bytes(struct.pack(">I", 1515), "little"))),
    "length": (SERVER, Side.INSIDE, accept(1515, length=10)),
    "cut": (SERVER, Side.INSIDE, accept(1515)[:8]),
    "cut, and says so": (SERVER, Side.INSIDE, accept(1515, length=8)[:8]),
    "behind something": (SERVER, Side.INSIDE, b"\0" + accept(1515)),
    "from a system port": (session(26000, "udp", internal_port=1000), Side.OUTSIDE, accept(1515)),
    "QuakeWorld": (CLIENT, Side.OUTSIDE, b"\xff\xff\xff\xffj"),
}


@pytest.mark.req("attacks-slipstream")
@pytest.mark.parametrize(("control", "side", "text"), LEFT.values(), ids=LEFT)
def test_nothing_is_opened(control: Control, side: Side, text: bytes) -> None:
    assert carry(QUAKE, control, (side, text)) == ([text], [])


# for test_alg_fuzz.py
CONVERSATIONS = [
    Talk("", said((one, CONNECT), (other, text)), port=26000, protocol="udp", from_outside=one is Side.OUTSIDE)
    for one, other in ((Side.INSIDE, Side.OUTSIDE), (Side.OUTSIDE, Side.INSIDE))
    for text in (accept(1515), accept(1515, b"\1\x1e\0"), *(text for _, _, text in LEFT.values()))
]


@pytest.mark.req("attacks-alg_fuzz")
@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=20) | st.builds(accept, st.integers(0, 2**32 - 1), st.binary(max_size=4)),
    st.sampled_from(Side),
    st.sampled_from([CLIENT, SERVER]),
)
def test_anything(text: bytes, side: Side, control: Control) -> None:
    harmless(QUAKE, control, (side, text))
