"""ICQ version 2: logins, one of them captured (its address and port are replaced)."""

import struct

import pytest
from carried import carry, harmless
from fakes import GATEWAY, HOST, session
from hypothesis import given, settings
from hypothesis import strategies as st
from talks import Talk, said

from xdpmasq.alg.api import Control, Endpoint, Side
from xdpmasq.alg.icq import Icq

ICQ = Icq()
CLIENT = session(4000, "udp")
KEEP_ALIVE = struct.pack("<HHHI", 2, 1070, 9, 0x20768F)


def login(
    port: int, address: bytes, password: bytes = b"[cePabC\0", version: int = 2, length: int | None = None
) -> bytes:
    return (
        struct.pack("<HHHI", version, 1000, 8, 0x20768F)
        + struct.pack("<IH", port, len(password) if length is None else length)
        + password
        + bytes.fromhex("72 00 04 00")
        + address
        + bytes.fromhex("04 00 00 00 00 03 00 00 00 02 00 00 00 00 00 04 00 72 00")
    )


def test_login_is_built_as_captured() -> None:
    assert login(0x4A34, bytes([127, 0, 0, 1])) == bytes.fromhex(
        "02 00 E8 03 08 00 8F 76 20 00 34 4A 00 00 08 00 5B 63 65 50 61 62 43 00 72 00 04 00 7F 00 00 01 04 00 00"
        "00 00 03 00 00 00 02 00 00 00 00 00 04 00 72 00"
    )


def test_contacts_may_connect() -> None:
    steps = [(Side.INSIDE, login(18996, HOST.packed)), (Side.INSIDE, KEEP_ALIVE)]
    done, (hole,) = carry(ICQ, CLIENT, *steps)
    assert done == [login(40000, GATEWAY.packed), KEEP_ALIVE]
    assert (hole.protocol, hole.internal, hole.remote) == ("tcp", Endpoint(HOST, 18996), None)
    assert (hole.lasts_s, hole.sessions) == (300, 0)


LEFT = {
    "another's address": (CLIENT, Side.INSIDE, login(18996, GATEWAY.packed)),
    "system port": (CLIENT, Side.INSIDE, login(1023, HOST.packed)),
    "no such port": (CLIENT, Side.INSIDE, login(0x14A34, HOST.packed)),
    "version 5": (CLIENT, Side.INSIDE, login(18996, HOST.packed, version=5)),
    "password without end": (CLIENT, Side.INSIDE, login(18996, HOST.packed, b"[cePabCD")),
    "no password": (CLIENT, Side.INSIDE, login(18996, HOST.packed, b"")),
    "long password": (CLIENT, Side.INSIDE, login(18996, HOST.packed, length=65535)),
    "cut": (CLIENT, Side.INSIDE, login(18996, HOST.packed)[:31]),
    "cut before the password": (CLIENT, Side.INSIDE, login(18996, HOST.packed)[:15]),
    "by the server": (CLIENT, Side.OUTSIDE, login(18996, HOST.packed)),
    "a server inside": (session(4000, "udp", from_outside=True), Side.INSIDE, login(18996, HOST.packed)),
    "alive without a login": (CLIENT, Side.INSIDE, KEEP_ALIVE),
}


@pytest.mark.req("attacks-slipstream")
@pytest.mark.parametrize(("control", "side", "text"), LEFT.values(), ids=LEFT)
def test_nothing_is_opened(control: Control, side: Side, text: bytes) -> None:
    assert carry(ICQ, control, (side, text), (Side.INSIDE, KEEP_ALIVE)) == ([text, KEEP_ALIVE], [])


# for test_alg_fuzz.py
CONVERSATIONS = [
    Talk(name, said((side, text), (Side.INSIDE, KEEP_ALIVE)), port=4000, protocol="udp")
    for name, (_, side, text) in {"login": (CLIENT, Side.INSIDE, login(18996, HOST.packed)), **LEFT}.items()
]


@pytest.mark.req("attacks-alg_fuzz")
@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=60)
    | st.builds(
        login,
        st.integers(0, 70000),
        st.sampled_from([HOST.packed, GATEWAY.packed, b"", b"ab"]),
        st.binary(max_size=9).map(lambda text: text + b"\0"),
        st.integers(1, 3),
        st.none() | st.integers(0, 65535),
    )
)
def test_anything(text: bytes) -> None:
    harmless(ICQ, CLIENT, (Side.INSIDE, text), (Side.INSIDE, KEEP_ALIVE))
