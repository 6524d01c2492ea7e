"""SNMP: addresses as values, in messages built value by value."""

import pytest
from carried import carry, harmless
from fakes import GATEWAY, HOST, REMOTE, session
from hypothesis import given, settings
from hypothesis import strategies as st
from talks import Talk, said

from xdpmasq.alg.api import Side
from xdpmasq.alg.snmp import Snmp

SNMP = Snmp()
AGENT = session(162, "udp")
OID = bytes.fromhex("06 07 2b 06 01 02 01 04 14")


def value(tag: int, *parts: bytes, long: bool = False) -> bytes:
    contents = b"".join(parts)
    length = bytes([0x82, *len(contents).to_bytes(2, "big")]) if long else bytes([len(contents)])
    return bytes([tag]) + length + contents


def number(text: int) -> bytes:
    return value(0x02, bytes([text]))


def address(text: bytes) -> bytes:
    return value(0x40, text)


def message(kind: int, *body: bytes, version: int = 1, long: bool = False) -> bytes:
    return value(0x30, number(version), value(0x04, b"public"), value(kind, *body, long=long), long=long)


def bindings(*values: bytes, long: bool = False) -> bytes:
    return value(0x30, *(value(0x30, OID, one, long=long) for one in values), long=long)


def response(at: bytes, kind: int = 0xA2, version: int = 1, long: bool = False) -> bytes:
    others = bindings(value(0x04, at), address(at), number(5), address(REMOTE.packed), address(at), long=long)
    return message(kind, number(9), number(0), number(0), others, version=version, long=long)


def trap(agent: bytes, at: bytes) -> bytes:
    ticks = value(0x43, b"\1\2\3")
    return message(0xA4, OID, address(agent), number(6), number(1), ticks, bindings(address(at)), version=0)


def only(text: bytes, old: bytes, new: bytes) -> bytes:
    """The addresses of a response replaced, but not the same bytes in an octet string."""
    return text.replace(b"\x40\x04" + old, b"\x40\x04" + new)


H, G, R = HOST.packed, GATEWAY.packed, REMOTE.packed
CASES = {
    "trap, out": (Side.INSIDE, trap(H, H), trap(G, G)),
    "trap of another's, out": (Side.INSIDE, trap(R, H), trap(R, G)),
    "trap, in": (Side.OUTSIDE, trap(R, G), trap(R, H)),
    "trap with the address inside, in": (Side.OUTSIDE, trap(H, H), trap(H, H)),
    **{
        f"{name}, out": (Side.INSIDE, response(H, kind, version), only(response(H, kind, version), H, G))
        for name, kind, version in [
            ("response 1", 0xA2, 0),
            ("response", 0xA2, 1),
            ("inform", 0xA6, 1),
            ("trap 2", 0xA7, 1),
        ]
    },
    "response, in": (Side.OUTSIDE, response(G), only(response(G), G, H)),
    "long lengths": (Side.INSIDE, response(H, long=True), only(response(H, long=True), H, G)),
    "request": (Side.INSIDE, response(H, 0xA0), response(H, 0xA0)),
    "set": (Side.INSIDE, response(H, 0xA3), response(H, 0xA3)),
    "version 3": (Side.INSIDE, response(H, version=3), response(H, version=3)),
    "more behind it": (Side.INSIDE, response(H) + b"\0", response(H) + b"\0"),
    "no end": (Side.INSIDE, response(H)[:-1], response(H)[:-1]),
    "address of five bytes": (Side.INSIDE, trap(H, H + b"x"), trap(H, H + b"x")),
    "indefinite length": (Side.INSIDE, b"\x30\x80" + trap(H, H)[2:], b"\x30\x80" + trap(H, H)[2:]),
    "reserved length": (Side.INSIDE, b"\x30\xff" + trap(H, H)[2:], b"\x30\xff" + trap(H, H)[2:]),
}


@pytest.mark.parametrize(("side", "before", "after"), CASES.values(), ids=CASES)
def test_addresses(side: Side, before: bytes, after: bytes) -> None:
    assert carry(SNMP, AGENT, (side, before)) == ([after], [])


# for test_alg_fuzz.py
CONVERSATIONS = [
    Talk(name, said((side, text)), port=162, protocol="udp", from_outside=turned)
    for name, (side, text, _) in CASES.items()
    for turned in (False, True)
]


@pytest.mark.req("attacks-alg_fuzz")
@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=60)
    | st.tuples(
        st.sampled_from([trap(H, H), response(H)]), st.integers(0, 80), st.binary(min_size=1, max_size=2)
    ).map(lambda hit: hit[0][: hit[1]] + hit[2] + hit[0][hit[1] + len(hit[2]) :]),
    st.sampled_from(Side),
)
def test_anything(text: bytes, side: Side) -> None:
    harmless(SNMP, AGENT, (side, text))
    done, _ = carry(SNMP, AGENT, (side, text))
    assert len(done[0]) == len(text)
