"""H.323 calls: a captured Setup, and messages built by hand around logical channels as terminals send them."""

import sys
from dataclasses import replace
from ipaddress import IPv4Address

import pytest
from carried import carry, fresh, harmless
from fakes import GATEWAY, HOST, REMOTE, FakeOpenings, session
from h323_messages import GUID, acknowledged, at, connect, q931, sent, setup, system, tpkt, wanted
from hypothesis import given, settings
from hypothesis import strategies as st
from talks import Talk, said

from xdpmasq.alg.api import Control, Endpoint, Refused, Side, Unparsed
from xdpmasq.alg.h323 import H323 as H323Alg
from xdpmasq.errors import ConfigError

H323 = H323Alg()
CALLER, CALLED = session(1720), session(1720, from_outside=True)
IN, OUT = Side.INSIDE, Side.OUTSIDE
OTHER = IPv4Address("198.51.100.99")

# Setup of Intel's Internet Video Phone, from its notes for those who make firewalls (1997): it calls 134.134.213.21
CAPTURED = bytes.fromhex(
    "08 02 00 d6 05 04 03 88 c0 a5 28 09 72 65 76 65 69 6c 6c 65 00 7e 00 db 05 10 18 06 00 08 91 4a 00 01 22 c0"
    "b5 00 80 80 14 49 6e 74 65 6c 20 49 6e 74 65 72 6e 65 74 20 50 68 6f 6e 65 00 03 31 2e 30 00 00 01 40 05 00"
    "74 00 77 00 65 00 65 00 62 00 31 00 86 86 d5 15 06 b8 00 b3 91 4e fb e2 21 d0 11 8f a3 00 aa 00 af 38 21 01"
    "00 b5 00 80 80 80 80 72 65 76 65 69 6c 6c 65 40 62 6f 67 75 73 2e 63 6f 6d 00 00 00 00 00 00 00 00 00 00 00"
    "00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 68"
    "74 74 70 3a 2f 2f 67 64 61 6e 6e 65 65 6c 2e 6a 66 2e 69 6e 74 65 6c 2e 63 6f 6d 2f 63 67 69 2d 62 69 6e 2f"
    "75 6c 73 31 30 2e 62 61 74 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00"
)


def opened(control: Control, side: Side, text: bytes) -> tuple[bytes, FakeOpenings]:
    control = fresh(control)
    openings = FakeOpenings(control, H323.pinholes)
    assert H323.ready(text, side, session(21)) == len(text)
    return H323.translate(text, side, control, openings), openings


OWN, OWN_OUTSIDE, PEER = at(HOST, 50000), at(GATEWAY, 30000), at(REMOTE, 1720)


@pytest.mark.parametrize("kind", ["as captured", "answered"])
def test_captured_setup(kind: str) -> None:
    text = tpkt(CAPTURED)
    if kind == "as captured":
        assert opened(CALLED, OUT, text)[0] == text
        return
    control = replace(CALLED, external=Endpoint(IPv4Address("134.134.213.21"), 1720))
    done, openings = opened(control, OUT, text)
    assert done == text.replace(bytes.fromhex("86 86 d5 15 06 b8"), at(HOST, 1720))
    assert not openings.opened


def test_a_call_that_begins_fast() -> None:
    text = setup(PEER, OWN, sent(HOST, 5001), wanted(HOST, 5000, 5001))
    done, openings = opened(CALLER, IN, text)
    assert done == setup(PEER, OWN_OUTSIDE, sent(GATEWAY, 40001), wanted(GATEWAY, 40000, 40001))
    (hole,) = openings.opened
    assert (hole.protocol, hole.internal, hole.remote) == ("udp", Endpoint(HOST, 5000), REMOTE)
    assert (hole.pair, hole.sessions, hole.lasts_s) == (True, 1, 300)


def test_tunnelled_control() -> None:
    text = setup(PEER, OWN, tunnelled=(system(wanted(HOST, 5000, 5001)), system(sent(HOST, 6001))))
    done, openings = opened(CALLER, IN, text)
    outside = system(wanted(GATEWAY, 40000, 40001)), system(sent(GATEWAY, 40003))
    assert done == setup(PEER, OWN_OUTSIDE, tunnelled=outside)
    assert [hole.internal.port for hole in openings.opened] == [5000, 6000]


CHANNELS = {
    "pair": (wanted(HOST, 5000, 5001), wanted(GATEWAY, 40000, 40001), [(5000, True)]),
    "reports": (sent(HOST, 5001), sent(GATEWAY, 40001), [(5000, True)]),
    "reports on an even port": (sent(HOST, 5002), sent(GATEWAY, 40000), [(5002, False)]),
    "media on an odd port": (wanted(HOST, 5001, 5003), wanted(GATEWAY, 40000, 40003), [(5001, False), (5002, True)]),
    "media of another's": (wanted(OTHER, 5000, 5001), wanted(OTHER, 5000, 5001), []),
    "reports to another": (
        wanted(HOST, 5000, 7001).replace(at(HOST, 7001), at(OTHER, 7001)),
        wanted(GATEWAY, 40000, 7001).replace(at(GATEWAY, 7001), at(OTHER, 7001)),
        [(5000, True)],
    ),
}


@pytest.mark.parametrize(("before", "after", "holes"), CHANNELS.values(), ids=CHANNELS)
def test_channels(before: bytes, after: bytes, holes: list[tuple[int, bool]]) -> None:
    done, openings = opened(CALLER, IN, tpkt(system(before)))
    assert done == tpkt(system(after))
    assert [(hole.internal.port, hole.pair) for hole in openings.opened] == holes


def test_acknowledgement() -> None:
    done, openings = opened(CALLER, IN, acknowledged(HOST, 5000, 5001))
    assert done == acknowledged(GATEWAY, 40000, 40001)
    assert [hole.internal.port for hole in openings.opened] == [5000]
    assert opened(CALLER, OUT, acknowledged(REMOTE, 5000, 5001))[0] == acknowledged(REMOTE, 5000, 5001)


def test_t120() -> None:
    head, last = bytes.fromhex("22 c0 00 06 07 00 09 08 00"), b"\0"
    done, openings = opened(CALLED, IN, tpkt(head + at(HOST, 1503) + last))
    assert done == tpkt(head + at(GATEWAY, 40000) + last)
    (hole,) = openings.opened
    assert (hole.protocol, hole.internal, hole.remote, hole.sessions) == ("tcp", Endpoint(HOST, 1503), REMOTE, 1)


def test_what_the_peer_repeats_is_the_hosts_again() -> None:
    control = fresh(CALLER)
    openings = FakeOpenings(control, H323.pinholes)
    H323.translate(setup(PEER, OWN, wanted(HOST, 5000, 5001)), IN, control, openings)
    answer = setup(OWN_OUTSIDE, PEER, wanted(GATEWAY, 40000, 40001), sent(REMOTE, 9001))
    assert H323.translate(answer, OUT, control, openings) == setup(
        OWN, PEER, wanted(HOST, 5000, 5001), sent(REMOTE, 9001)
    )
    assert len(openings.opened) == 1


def test_h245_of_a_host_inside() -> None:
    text = connect(at(HOST, 5500))
    done, openings = opened(CALLED, IN, text)
    assert done == connect(at(GATEWAY, 40000))
    (hole,) = openings.opened
    assert (hole.protocol, hole.internal, hole.remote, hole.sessions) == ("tcp", Endpoint(HOST, 5500), REMOTE, 1)
    assert openings.followed == [Endpoint(HOST, 5500)]


@pytest.mark.parametrize(
    ("address", "port", "followed"), [(REMOTE, 5500, True), (OTHER, 5500, False), (REMOTE, 22, False)]
)
def test_h245_of_the_peer(address: IPv4Address, port: int, followed: bool) -> None:
    done, openings = opened(CALLER, OUT, connect(at(address, port)))
    assert done == connect(at(address, port))
    assert not openings.opened
    assert openings.followed == ([Endpoint(address, port)] if followed else [])


FAST = setup(PEER, OWN, wanted(HOST, 5000, 5001))
REFUSED = {
    "h245 at a system port": (IN, connect(at(HOST, 1023))),
    "media at a system port": (IN, setup(PEER, at(OTHER, 1), wanted(HOST, 1022, 1023))),
    "reports whose pair is a system port's": (IN, setup(PEER, at(OTHER, 1), sent(HOST, 1))),
    "not Q.931": (IN, tpkt(b"\7" + FAST[5:])),
    "two of user information": (IN, tpkt(FAST[4:] + FAST[14:])),
    "an element that does not end": (IN, tpkt(FAST[4:-1])),
    "user information of another kind": (IN, FAST.replace(b"\5\x20\x88", b"\4\x20\x88")),
    "more behind it": (IN, q931(5, FAST[17:] + b"\0")),
    "cut": (IN, q931(5, FAST[17:-1])),
}


@pytest.mark.req("attacks-slipstream")
@pytest.mark.parametrize(("side", "text"), REFUSED.values(), ids=REFUSED)
def test_nothing_is_opened(side: Side, text: bytes) -> None:
    assert carry(H323, CALLER, (side, text)) == ([text], [])
    with pytest.raises(Unparsed):
        opened(CALLER, side, text)


def test_more_messages_than_a_terminal_has_codecs_are_not_read() -> None:
    text = setup(PEER, at(OTHER, 1), *[b""] * 65)
    assert carry(H323, CALLER, (IN, text)) == ([text], [])


def test_others_go_on_beside_one_that_is_refused() -> None:
    text = setup(PEER, OWN, wanted(HOST, 1022, 1023), wanted(HOST, 5000, 5001))
    done, openings = opened(CALLER, IN, text)
    assert done == setup(PEER, OWN_OUTSIDE, wanted(HOST, 1022, 1023), wanted(GATEWAY, 40000, 40001))
    assert len(openings.opened) == 1


def test_reports_have_no_neighbours_port() -> None:
    control = fresh(CALLER)
    openings = FakeOpenings(control, H323.pinholes)
    H323.translate(tpkt(system(sent(HOST, 5000))), IN, control, openings)
    with pytest.raises(Refused):
        H323.translate(tpkt(system(wanted(HOST, 5000, 5001))), IN, control, openings)
    assert len(openings.opened) == 1


@pytest.mark.req("attacks-pinholes")
def test_pinholes_are_bounded() -> None:
    control = fresh(CALLER)
    openings = FakeOpenings(control, H323.pinholes)
    for port in range(5000, 5000 + H323.pinholes, 2):
        H323.translate(tpkt(system(wanted(HOST, port, port + 1))), IN, control, openings)
    with pytest.raises(Refused):
        H323.translate(tpkt(system(wanted(HOST, 6000, 6001))), IN, control, openings)


@pytest.mark.req("attacks-slipstream")
@pytest.mark.parametrize(
    "text", [b"POST / HTTP/1.1\r\n\r\n", b"\0\3\0\x54!\x12\xa4\x42" + b"username", b"\3\0\xff\xff", b"\3\0\0\3"]
)
def test_after_something_else_nothing_is_believed(text: bytes) -> None:
    control = fresh(CALLER)
    openings = FakeOpenings(control, H323.pinholes)
    assert H323.ready(text, IN, session(21)) == len(text)
    for data in (text, FAST):
        with pytest.raises(Unparsed):
            H323.translate(data, IN, control, openings)
    assert not openings.asked


def test_ready_waits_for_whole_messages() -> None:
    stream = tpkt(b"") + FAST
    for cut in range(len(stream) + 1):
        assert H323.ready(stream[:cut], IN, session(21)) == (0 if cut < 4 else 4 if cut < len(stream) else cut)


IPV6 = (
    bytes.fromhex("06 c0 06 00 08 91 4a 00 04")
    + b"1234567890123456"
    + bytes.fromhex("06 b8 23 e0 30 00 11 00")
    + GUID
)
OTHERS = {
    "request of a later version": tpkt(bytes.fromhex("17 e0 01 aa")),
    "message of a later version": tpkt(bytes.fromhex("80 01 aa")),
    "terminal capabilities": tpkt(
        bytes.fromhex("02 40 01 06 00 08 81 75 00 03 80 0d 00 00 3c 00 01 00 00 01 00 00 01 00 00")
    ),
    "an alternative address of IPv6": q931(0x62, IPV6 + bytes.fromhex("01 00 01 00")),
    "without user information": tpkt(bytes.fromhex("08 02 00 01 5a 08 02 80 90")),
    "empty": q931(0x62, bytes.fromhex("28 10 01 00 10 c0 01 80 05 01 03 61 62 63")),
}


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("text", OTHERS.values(), ids=OTHERS)
def test_others_pass(text: bytes, side: Side) -> None:
    assert carry(H323, CALLER, (side, text)) == ([text], [])


def test_without_pycrate_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycrate_asn1dir.H225", None)
    monkeypatch.delitem(sys.modules, "xdpmasq.alg.per")
    with pytest.raises(ConfigError, match="pycrate"):
        import xdpmasq.alg.per  # noqa: F401, PLC0415


# for test_alg_fuzz.py
CONVERSATIONS = [
    Talk("", said((one, text), (other, answer)), port=1720, from_outside=one is OUT)
    for one, other in ((IN, OUT), (OUT, IN))
    for text, answer in [
        (FAST, setup(OWN_OUTSIDE, PEER, wanted(GATEWAY, 40000, 40001), sent(REMOTE, 9001))),
        (connect(at(HOST, 5500)), tpkt(CAPTURED)),
        (acknowledged(HOST, 5000, 5001), acknowledged(GATEWAY, 40000, 40001)),
        (setup(PEER, OWN, tunnelled=(system(wanted(HOST, 5000, 5001)), system(sent(HOST, 6001)))), tpkt(b"")),
        *((tpkt(system(before)), tpkt(system(after))) for before, after, _ in CHANNELS.values()),
        *((text, tpkt(b"")) for text in OTHERS.values()),
        *((text, FAST) for _, text in REFUSED.values()),
    ]
]


def mended(text: bytes) -> bytes:
    """With the lengths that its contents have."""
    if text[4:5] == b"\10":
        return q931(text[8], text[17:]) if len(text) > 17 else text
    return tpkt(text[4:])


SEEDS = [FAST, connect(at(HOST, 5500)), setup(PEER, OWN, tunnelled=(system(sent(HOST, 5001)),)), tpkt(CAPTURED)]


@pytest.mark.req("attacks-alg_fuzz")
@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=60).map(lambda text: q931(5, text))
    | st.tuples(st.sampled_from(SEEDS), st.integers(4, 260), st.binary(min_size=1, max_size=2)).map(
        lambda hit: hit[0][: hit[1]] + hit[2] + hit[0][hit[1] + len(hit[2]) :]
    )
    | st.binary(max_size=20),
    st.sampled_from(Side),
)
def test_anything(text: bytes, side: Side) -> None:
    harmless(H323, CALLER, (side, text))
    harmless(H323, CALLER, (side, tpkt(text[17:])))
