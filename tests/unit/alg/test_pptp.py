"""PPTP call IDs: constructed control messages (RFC 2637 section 2), what becomes of them and what is opened."""

import struct

import pytest
from fakes import GATEWAY, HOST, REMOTE, FakeOpenings, session
from hypothesis import given, settings
from hypothesis import strategies as st
from talks import Talk, inside, outside, said

from xdpmasq.alg.api import Control, Endpoint, Refused, Side, Unparsed
from xdpmasq.alg.pptp import Pptp

PPTP = Pptp()
LENGTHS = {
    1: 156,
    2: 156,
    3: 16,
    5: 16,
    6: 20,
    7: 168,
    8: 32,
    9: 220,
    10: 24,
    11: 28,
    12: 16,
    13: 148,
    14: 40,
    15: 24,
}
CLIENTS, SERVERS = session(1723), session(1723, from_outside=True)


def message(kind: int, *fields: tuple[int, int]) -> bytes:
    """Control message ``kind``, with (offset, 16-bit number) fields; the rest counts up, so that a shift is seen."""
    length = LENGTHS[kind]
    text = bytearray(i % 251 for i in range(length))
    struct.pack_into("!HHIHH", text, 0, length, 1, 0x1A2B3C4D, kind, 0)
    for at, number in fields:
        struct.pack_into("!H", text, at, number)
    return bytes(text)


def fresh(control: Control) -> tuple[Control, FakeOpenings]:
    control = Control(control.protocol, control.internal, control.external, control.remote, control.from_outside)
    return control, FakeOpenings(control, Pptp.pinholes)


OK, BUSY = (16, 0x0100), (16, 0x0400)
KNOWN, OUTSIDE = 77, 40000  # the internal host's call, and its number outside

Fields = list[tuple[int, int]]
Case = tuple[Side, int, Fields, Fields, int | None]
# side, message, its fields before and after, the internal number that is opened
CASES: dict[str, Case] = {
    "outgoing call request": (Side.INSIDE, 7, [(12, 5)], [(12, 40001)], 5),
    "outgoing call reply": (Side.INSIDE, 8, [(12, 5), (14, 9), OK], [(12, 40001), (14, 9), OK], 5),
    "outgoing call refused": (Side.INSIDE, 8, [(12, 0), (14, 9), BUSY], [(12, 0), (14, 9), BUSY], None),
    "incoming call request": (Side.INSIDE, 9, [(12, 0)], [(12, 40001)], 0),
    "incoming call reply": (Side.INSIDE, 10, [(12, 65535), (14, 9), OK], [(12, 40001), (14, 9), OK], 65535),
    "connected, out": (Side.INSIDE, 11, [(12, KNOWN)], [(12, KNOWN)], None),
    "clear, out": (Side.INSIDE, 12, [(12, KNOWN)], [(12, OUTSIDE)], None),
    "clear of no call, out": (Side.INSIDE, 12, [(12, 6)], [(12, 6)], None),
    "disconnected, out": (Side.INSIDE, 13, [(12, KNOWN)], [(12, OUTSIDE)], None),
    "error, out": (Side.INSIDE, 14, [(12, KNOWN)], [(12, KNOWN)], None),
    "link, out": (Side.INSIDE, 15, [(12, KNOWN)], [(12, KNOWN)], None),
    "request, in": (Side.OUTSIDE, 7, [(12, OUTSIDE)], [(12, OUTSIDE)], None),
    "reply, in": (Side.OUTSIDE, 8, [(12, OUTSIDE), (14, OUTSIDE), OK], [(12, OUTSIDE), (14, KNOWN), OK], None),
    "reply that refuses, in": (Side.OUTSIDE, 8, [(12, 0), (14, OUTSIDE), BUSY], [(12, 0), (14, KNOWN), BUSY], None),
    "reply to no call, in": (Side.OUTSIDE, 8, [(12, 1), (14, 9), OK], [(12, 1), (14, 9), OK], None),
    "incoming reply, in": (Side.OUTSIDE, 10, [(12, 3), (14, OUTSIDE), OK], [(12, 3), (14, KNOWN), OK], None),
    "connected, in": (Side.OUTSIDE, 11, [(12, OUTSIDE)], [(12, KNOWN)], None),
    "clear, in": (Side.OUTSIDE, 12, [(12, OUTSIDE)], [(12, OUTSIDE)], None),
    "disconnected by the client's number, in": (Side.OUTSIDE, 13, [(12, OUTSIDE)], [(12, KNOWN)], None),
    "error, in": (Side.OUTSIDE, 14, [(12, OUTSIDE)], [(12, KNOWN)], None),
    "link, in": (Side.OUTSIDE, 15, [(12, OUTSIDE)], [(12, KNOWN)], None),
    "echo": (Side.INSIDE, 5, [(12, KNOWN)], [(12, KNOWN)], None),
    "start": (Side.OUTSIDE, 2, [(12, OUTSIDE)], [(12, OUTSIDE)], None),
}


@pytest.mark.parametrize("control", [CLIENTS, SERVERS], ids=["client inside", "server inside"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_call_ids(control: Control, case: Case) -> None:
    side, kind, before, after, opened = case
    control, openings = fresh(control)
    openings.open("gre", Endpoint(HOST, KNOWN), remote=REMOTE, sessions=0)
    assert PPTP.translate(message(kind, *before), side, control, openings) == message(kind, *after)
    assert [hole.internal for hole in openings.opened[1:]] == ([Endpoint(HOST, opened)] if opened is not None else [])
    for hole in openings.opened[1:]:
        assert (hole.protocol, hole.remote, hole.sessions) == ("gre", REMOTE, 0)


# for test_alg_fuzz.py
_CALL = [
    inside(message(1) + message(7, (12, 5))),
    outside(message(2) + message(8, (12, 9), (14, 40000), OK)),
    inside(message(12, (12, 5))),
    outside(message(13, (12, 40000))),
]
CONVERSATIONS = [
    Talk("a call", _CALL, port=1723),
    *(
        Talk(name, [*_CALL[:2], *said((side, message(kind, *fields)))], port=1723, from_outside=turned)
        for name, (side, kind, fields, _, _) in CASES.items()
        for turned in (False, True)
    ),
]


def test_disconnect_with_the_servers_own_number_is_left() -> None:
    control, openings = fresh(CLIENTS)
    request = PPTP.translate(message(7, (12, 5)), Side.INSIDE, control, openings)
    number = int.from_bytes(request[12:14], "big")
    PPTP.translate(message(8, (12, number), (14, number), OK), Side.OUTSIDE, control, openings)
    disconnect = message(13, (12, number))
    assert PPTP.translate(disconnect, Side.OUTSIDE, control, openings) == disconnect
    control.memory.clear()
    assert PPTP.translate(disconnect, Side.OUTSIDE, control, openings) == message(13, (12, 5))


def test_a_request_repeated_has_the_same_number() -> None:
    control, openings = fresh(CLIENTS)
    request = message(7, (12, 5))
    assert len({PPTP.translate(request, Side.INSIDE, control, openings) for _ in range(3)}) == 1


def test_calls_are_bounded_and_the_others_are_translated() -> None:
    control, openings = fresh(CLIENTS)
    calls = [message(7, (12, number)) for number in range(Pptp.pinholes + 1)]
    done = PPTP.translate(b"".join(calls), Side.INSIDE, control, openings)
    assert done == b"".join(message(7, (12, 40000 + i)) for i in range(Pptp.pinholes)) + calls[-1]
    with pytest.raises(Refused):
        PPTP.translate(calls[-1], Side.INSIDE, control, openings)


WRONG = {
    "http": b"POST / HTTP/1.1\r\nHost: x\r\n\r\n" + message(7, (12, 5)),
    "cookie": message(7).replace(b"\x1a\x2b", b"\x1a\x2c"),
    "management message": message(7)[:2] + b"\0\2" + message(7)[4:],
    "too short": b"\0\x0b" + message(7)[2:],
    "too long": b"\0\xdd" + message(7)[2:],
    "length of another message": b"\0\x20" + message(7)[2:],
}


@pytest.mark.req("attacks-slipstream")
@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_after_something_else_nothing_is_believed(text: bytes) -> None:
    control, openings = fresh(CLIENTS)
    assert PPTP.ready(text, Side.INSIDE, session(21)) == len(text)
    for data in (text, message(7, (12, 5))):
        with pytest.raises(Unparsed):
            PPTP.translate(data, Side.INSIDE, control, openings)
    assert not openings.asked


def test_ready_waits_for_whole_messages() -> None:
    stream = message(1) + message(7, (12, 5))
    for cut in range(len(stream) + 1):
        whole = 0 if cut < 156 else 156 if cut < 324 else 324
        assert PPTP.ready(stream[:cut], Side.INSIDE, session(21)) == whole


@pytest.mark.req("attacks-alg_fuzz")
@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.binary(max_size=40)
        | st.builds(
            lambda kind, a, b: message(kind, (12, a), (14, b)),
            st.sampled_from(sorted(LENGTHS)),
            st.integers(0, 65535),
            st.integers(0, 65535),
        ),
        max_size=6,
    ),
    st.sampled_from(Side),
    st.integers(0, 2000),
)
def test_anything(parts: list[bytes], side: Side, cut: int) -> None:
    control, openings = fresh(CLIENTS)
    data = b"".join(parts)[: max(cut, 40)]
    whole = PPTP.ready(data, side, session(21))
    assert 0 <= whole <= len(data)
    try:
        done = PPTP.translate(data[:whole], side, control, openings)
    except Unparsed:
        done = data[:whole]
    assert len(done) == whole
    assert {hole.internal.address for hole in openings.opened} <= {HOST}
    assert {hole.external.address for hole in openings.opened} <= {GATEWAY}
    if not openings.opened:
        assert done == data[:whole]
