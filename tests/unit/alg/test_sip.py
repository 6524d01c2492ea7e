"""SIP and SDP. Messages are written with LF, and sent with CRLF; their lengths are counted here."""

import functools

import pytest
from fakes import FakeOpenings, session
from talks import Said, Talk, cases, check, inside, outside

from xdpmasq.alg.api import Refused, Side
from xdpmasq.alg.sip import Sip

Phone = functools.partial(Talk, port=5060, protocol="udp", internal_port=5060)  # known outside as 30000
PhoneOverTcp = functools.partial(Talk, port=5060)  # connects from 50000, known outside as 30000
Server = functools.partial(Talk, port=5060, protocol="udp", from_outside=True)  # known outside as 5060, too

REQUEST = """\
INVITE sip:bob@example.com SIP/2.0
Via: SIP/2.0/UDP 192.168.1.10:5060;branch=z9hG4bK1;rport
From: "Alice" <sip:alice@192.168.1.10>;tag=1
To: <sip:bob@example.com>
Call-ID: 1@192.168.1.10
CSeq: 1 INVITE
Contact: <sip:alice@192.168.1.10:5060>
"""
REQUEST_OUTSIDE = """\
INVITE sip:bob@example.com SIP/2.0
Via: SIP/2.0/UDP 203.0.113.1:30000;branch=z9hG4bK1;rport
From: "Alice" <sip:alice@192.168.1.10>;tag=1
To: <sip:bob@example.com>
Call-ID: 1@192.168.1.10
CSeq: 1 INVITE
Contact: <sip:alice@203.0.113.1:30000>
"""
SDP = """\
v=0
o=alice 1 1 IN IP4 192.168.1.10
s=-
c=IN IP4 192.168.1.10
t=0 0
m=audio 5004 RTP/AVP 0 8
a=rtpmap:0 PCMU/8000
"""
SDP_OUTSIDE = """\
v=0
o=alice 1 1 IN IP4 203.0.113.1
s=-
c=IN IP4 203.0.113.1
t=0 0
m=audio 40000 RTP/AVP 0 8
a=rtpmap:0 PCMU/8000
"""
REQUEST_TCP = REQUEST.replace("UDP", "TCP").replace("192.168.1.10:5060", "192.168.1.10:50000")
REQUEST_TCP_OUTSIDE = REQUEST_OUTSIDE.replace("UDP", "TCP")
SDP_BOB = SDP.replace("192.168.1.10", "198.51.100.7")
SDP_OVERTAKEN = SDP_OUTSIDE.replace("40000", "40777")
OVERTAKEN = ["udp 5004 at 40777 for 198.51.100.7", "udp 5005 at 40000 for 198.51.100.7"]
AUDIO = ["udp 5004+5005 at 40000+40001 for 198.51.100.7"]


def sip(head: str, body: str = "", length: str = "Content-Length", kind: str = "application/sdp") -> bytes:
    crlf = body.replace("\n", "\r\n")
    kind = f"Content-Type: {kind}\n" if body else ""
    return (head + kind + f"{length}: {len(crlf)}\n\n").replace("\n", "\r\n").encode() + crlf.encode()


def says(given: str, becomes: str) -> Said:
    """A request of the host, with other lines of SDP."""
    return inside(sip(REQUEST, given), sip(REQUEST_OUTSIDE, becomes))


def header(given: str, becomes: str | None = None, start: str = "OPTIONS sip:example.com SIP/2.0") -> Said:
    return inside(sip(f"{start}\n{given}\n"), sip(f"{start}\n{given if becomes is None else becomes}\n"))


def header_back(given: str, becomes: str | None = None, start: str = "SIP/2.0 200 OK") -> Said:
    return outside(sip(f"{start}\n{given}\n"), sip(f"{start}\n{given if becomes is None else becomes}\n"))


REGISTER = """\
REGISTER sip:example.com SIP/2.0
Via: SIP/2.0/UDP {at};branch=z9hG4bK2
From: <sip:alice@example.com>;tag=2
To: <sip:alice@example.com>
Call-ID: 2
CSeq: 1 REGISTER
Contact: <sip:alice@{at}>;expires=3600
"""
REGISTERED = """\
SIP/2.0 200 OK
Via: SIP/2.0/UDP {at};branch=z9hG4bK2{seen}
From: <sip:alice@example.com>;tag=2
To: <sip:alice@example.com>;tag=3
Call-ID: 2
CSeq: 1 REGISTER
Contact: <sip:alice@{at}>;expires=3600, <sip:alice@192.0.2.9>;expires=60
"""
RINGS = """\
INVITE sip:alice@{at} SIP/2.0
Via: SIP/2.0/UDP 198.51.100.7;branch=z9hG4bK3
Record-Route: <sip:198.51.100.7;lr>
From: <sip:bob@example.com>;tag=4
To: <sip:alice@example.com>
Call-ID: 3
CSeq: 1 INVITE
Contact: <sip:bob@198.51.100.7>
"""
ANSWERED = """\
SIP/2.0 200 OK
Via: SIP/2.0/UDP 198.51.100.7;branch=z9hG4bK3
Record-Route: <sip:198.51.100.7;lr>
From: <sip:bob@example.com>;tag=4
To: <sip:alice@example.com>;tag=5
Call-ID: 3
CSeq: 1 INVITE
Contact: <sip:alice@{at}>
"""
INSIDE, OUTSIDE = "192.168.1.10:5060", "203.0.113.1:30000"

CONVERSATIONS = [
    Phone(
        "registers, and is called",
        [
            inside(sip(REGISTER.format(at=INSIDE)), sip(REGISTER.format(at=OUTSIDE))),
            outside(
                sip(REGISTERED.format(at=OUTSIDE, seen=";received=203.0.113.1;rport=30000")),
                sip(REGISTERED.format(at=INSIDE, seen=";received=192.168.1.10;rport=5060")),
            ),
            outside(sip(RINGS.format(at=OUTSIDE), SDP_BOB), sip(RINGS.format(at=INSIDE), SDP_BOB)),
            inside(sip(ANSWERED.format(at=INSIDE), SDP), sip(ANSWERED.format(at=OUTSIDE), SDP_OUTSIDE)),
        ],
        AUDIO,
    ),
    Phone("calls, twice the same", [says(SDP, SDP_OUTSIDE), says(SDP, SDP_OUTSIDE)], AUDIO),
    Phone(
        "is given its name back without the port that it has left out",
        [
            header("Via: SIP/2.0/UDP 192.168.1.10;branch=1", "Via: SIP/2.0/UDP 203.0.113.1:30000;branch=1"),
            header_back("Via: SIP/2.0/UDP 203.0.113.1:30000;branch=1", "Via: SIP/2.0/UDP 192.168.1.10;branch=1"),
            header_back("Via: SIP/2.0/UDP 203.0.113.1 :\t30000;branch=1", "Via: SIP/2.0/UDP 192.168.1.10;branch=1"),
        ],
    ),
    Phone(
        "compact forms",
        [
            header("v: SIP/2.0/UDP 192.168.1.10:5060", "v: SIP/2.0/UDP 203.0.113.1:30000"),
            header("m: sip:alice@192.168.1.10:5060;q=1", "m: sip:alice@203.0.113.1:30000;q=1"),
            inside(sip("SIP/2.0 200 OK\nc: application/sdp\n", "") + b"", None),
        ],
    ),
    Phone(
        "a body, its length in compact form",
        [inside(sip(REQUEST, SDP, "l"), sip(REQUEST_OUTSIDE, SDP_OUTSIDE, "l"))],
        AUDIO,
    ),
    Phone(
        "folded headers",
        [
            header(
                "Via: SIP/2.0/UDP\n 192.168.1.10:5060\n\t;branch=1",
                "Via: SIP/2.0/UDP\n 203.0.113.1:30000\n\t;branch=1",
            ),
            header("Contact:\n <sip:a@192.168.1.10:5060>", "Contact:\n <sip:a@203.0.113.1:30000>"),
        ],
    ),
    Phone(
        "spaces in Via",
        [
            header(
                "Via : SIP / 2.0 / UDP 192.168.1.10 : 5060 ; branch=1, SIP/2.0/UDP 192.168.1.10:5060",
                "Via : SIP / 2.0 / UDP 203.0.113.1 : 30000 ; branch=1, SIP/2.0/UDP 203.0.113.1:30000",
            ),
            header("Via: SIP/2.0/UDP 192.168.1.11 : 5060"),
        ],
    ),
    Phone(
        "Contact: several, in any writing",
        [
            header(
                'Contact: "A, <sip:a@192.168.1.10:5060>" <sip:a@192.168.1.10:5060;ob>;q=1, <sip:b@192.0.2.1>',
                'Contact: "A, <sip:a@192.168.1.10:5060>" <sip:a@203.0.113.1:30000;ob>;q=1, <sip:b@192.0.2.1>',
            ),
            header("CONTACT: SIP:192.168.1.10:5060", "CONTACT: SIP:203.0.113.1:30000"),
            header("Contact: *"),
            header("Contact: <tel:+15550100>, <sip:a@example.com>, <sip:a@192.168.1.10.example.com>"),
            header("Contact: <sip:a@b?Route=%3Csip:192.168.1.10:5060%3E>"),
            header("Contact: <sips:a@192.168.1.10>, <sip:a@192.168.1.10;transport=ws>"),
        ],
    ),
    Phone(
        "routes",
        [
            header("Record-Route: <sip:192.168.1.10:5060;lr>", "Record-Route: <sip:203.0.113.1:30000;lr>"),
            header_back(
                "Route: <sip:203.0.113.1:30000;lr>, <sip:192.0.2.1;lr>",
                "Route: <sip:192.168.1.10:5060;lr>, <sip:192.0.2.1;lr>",
                "BYE sip:b@example.com SIP/2.0",
            ),
        ],
    ),
    Phone(
        "names stay",
        [
            header("From: <sip:a@192.168.1.10:5060>;tag=1"),
            header("To: <sip:a@192.168.1.10:5060>"),
            header("Call-ID: 7@192.168.1.10"),
            header("User-Agent: 192.168.1.10:5060"),
            header_back("To: <sip:a@203.0.113.1:30000>"),
        ],
    ),
    Phone(
        "others' Via: requests from outside, and answers to them",
        [
            header_back("Via: SIP/2.0/UDP 203.0.113.1:30000", start="BYE sip:b@example.com SIP/2.0"),
            header("Via: SIP/2.0/UDP 192.168.1.10:5060", start="SIP/2.0 200 OK"),
        ],
    ),
    Phone(
        "another port of the host's: a pinhole for the remote",
        [header("Contact: <sip:a@192.168.1.10:5070>", "Contact: <sip:a@203.0.113.1:40000>")],
        ["udp 5070 at 40000 for 198.51.100.7"],
    ),
    Phone("below 1024", [header("Contact: <sip:a@192.168.1.10:1023>")]),
    Phone(
        "no ports",
        [
            header("Contact: <sip:a@192.168.1.10:0>, <sip:a@192.168.1.10:65536>"),
            header("Contact: <sip:a@192.168.1.10:" + "5" * 40 + ">"),
            header("Contact: <sip:a@192.168.1.010:5060>, <sip:a@999.168.1.10:5060>"),
            header("Via: SIP/2.0/UDP 192.168.1.10:65536"),
        ],
    ),
    Phone("keep-alives", [inside(b"\r\n\r\n"), outside(b"\r\n"), inside(b"\0\0\0\0"), inside(b"")]),
    Phone("not at the beginning", [inside(b"x" + sip(REQUEST, SDP)), inside(b"\r\n" + sip(REQUEST, SDP))]),
    Phone(
        "a body that ends with the datagram",
        [
            inside(
                sip(REQUEST, SDP).replace(b"Content-Length", b"Not-the-Length"),
                sip(REQUEST_OUTSIDE, SDP_OUTSIDE)
                .replace(b"Content-Length", b"Not-the-Length")
                .replace(b": %d" % (len(SDP_OUTSIDE) + 7), b": %d" % (len(SDP) + 7)),
            )
        ],
        AUDIO,
    ),
    Phone("bare LF", [inside(sip(REQUEST, SDP).replace(b"\r\n", b"\n"))]),
    Phone("NUL in a header", [inside(sip(REQUEST.replace("Alice", "Al\0ice"), SDP))]),
    Phone("cut off", [inside(sip(REQUEST, SDP)[:-1])]),
    Phone("two lengths", [inside(sip(REQUEST + "l: 0\n", SDP))]),
    Phone("a length of forty digits", [inside(sip(REQUEST + "Content-Length: " + "1" * 40 + "\n"))]),
    Phone(
        "what follows the body",
        [
            inside(
                sip(REQUEST, SDP) + b"m=audio 6000 RTP/AVP 0\r\n",
                sip(REQUEST_OUTSIDE, SDP_OUTSIDE) + b"m=audio 6000 RTP/AVP 0\r\n",
            )
        ],
        AUDIO,
    ),
    Phone(
        "audio and video; what is not wanted has port 0",
        [
            says(
                SDP + "m=video 5006 RTP/AVP 31\nm=audio 0 RTP/AVP 0\n",
                SDP_OUTSIDE + "m=video 40002 RTP/AVP 31\nm=audio 0 RTP/AVP 0\n",
            )
        ],
        [*AUDIO, "udp 5006+5007 at 40002+40003 for 198.51.100.7"],
    ),
    Phone(
        "addresses of media",
        [
            says(
                "v=0\nc=IN IP4 192.0.2.1\nm=audio 5004 RTP/AVP 0\nm=video 5006 RTP/AVP 31\nc=IN IP4 192.168.1.10\n",
                "v=0\nc=IN IP4 192.0.2.1\nm=audio 5004 RTP/AVP 0\nm=video 40000 RTP/AVP 31\nc=IN IP4 203.0.113.1\n",
            )
        ],
        ["udp 5006+5007 at 40000+40001 for 198.51.100.7"],
    ),
    Phone(
        "RTCP next to RTP",
        [
            says(
                SDP + "a=rtcp:5005 IN IP4 192.168.1.10\n",
                SDP_OUTSIDE + "a=rtcp:40001 IN IP4 203.0.113.1\n",
            )
        ],
        AUDIO,
    ),
    Phone(
        "RTCP elsewhere",
        [says(SDP + "a=rtcp:5999\n", SDP_OUTSIDE + "a=rtcp:40001\n")],
        ["udp 5004 at 40000 for 198.51.100.7", "udp 5999 at 40001 for 198.51.100.7"],
    ),
    Phone(
        "RTCP with RTP",
        [says(SDP + "a=rtcp:5004\n", SDP_OUTSIDE + "a=rtcp:40000\n")],
        ["udp 5004 at 40000 for 198.51.100.7"],
    ),
    *(
        Phone(f"sound overtakes what is said of it, {name}", [said] * times, opens, mapped=mapped)
        for name, times, said, mapped, opens in [
            (
                "and again",
                2,
                says(SDP, SDP_OVERTAKEN + "a=rtcp:40000\n"),
                {5004: 40777},
                OVERTAKEN,
            ),
            (
                "and so does RTCP",
                1,
                says(SDP, SDP_OVERTAKEN.replace("40777", "40776") + "a=rtcp:40888\n"),
                {5004: 40776, 5005: 40888},
                ["udp 5004 at 40776 for 198.51.100.7", "udp 5005 at 40888 for 198.51.100.7"],
            ),
            (
                "whose RTCP has its line",
                1,
                says(
                    SDP + "a=rtcp:5005 IN IP4 192.168.1.10\n",
                    SDP_OVERTAKEN + "a=rtcp:40000 IN IP4 203.0.113.1\n",
                ),
                {5004: 40777},
                OVERTAKEN,
            ),
            (
                "in two media, and the text has no end of line",
                1,
                says(
                    SDP + "m=video 5006 RTP/AVP 31",
                    SDP_OVERTAKEN + "a=rtcp:40000\nm=video 40999 RTP/AVP 31\na=rtcp:40001",
                ),
                {5004: 40777, 5006: 40999},
                [*OVERTAKEN, "udp 5006 at 40999 for 198.51.100.7", "udp 5007 at 40001 for 198.51.100.7"],
            ),
        ]
    ),
    Phone(
        "a fax",
        [
            says(
                "v=0\nc=IN IP4 192.168.1.10\nm=image 5005 udptl t38\n",
                "v=0\nc=IN IP4 203.0.113.1\nm=image 40000 udptl t38\n",
            )
        ],
        ["udp 5005 at 40000 for 198.51.100.7"],
    ),
    Phone(
        "hundreds of media, most of which are over",
        [says(SDP + "m=audio 0 RTP/AVP 0\n" * 300, SDP_OUTSIDE + "m=audio 0 RTP/AVP 0\n" * 300)],
        AUDIO,
    ),
    Phone(
        "on hold",
        [
            says(
                "o=- 1 2 IN IP4 192.168.1.10\nc=IN IP4 0.0.0.0\nm=audio 5004 RTP/AVP 0\n",
                "o=- 1 2 IN IP4 203.0.113.1\nc=IN IP4 0.0.0.0\nm=audio 5004 RTP/AVP 0\n",
            )
        ],
    ),
    *(
        Phone(f"a body that stays: {name}", [says(body, body)])
        for name, body in {
            "another host's": SDP.replace("192.168.1.10", "192.168.1.11"),
            "below 1024": SDP.replace("5004", "1022"),
            "port 65536": SDP.replace("5004", "65536"),
            "forty digits": SDP.replace("5004", "5" * 40),
            "RTCP of another host": SDP + "a=rtcp:5999 IN IP4 192.168.1.11\n",
            "more media than there may be": SDP + "m=audio 6000 RTP/AVP 0\n" * 16,
            "several pairs": SDP.replace("5004", "5004/2"),
            "NUL": SDP.replace("0 8", "0 \0"),
        }.items()
    ),
    Phone(
        "a medium over TCP stays, audio beside it does not",
        [
            says(
                SDP + "m=message 2855 TCP/MSRP *\na=accept-types:text/plain\n",
                SDP_OUTSIDE + "m=message 2855 TCP/MSRP *\na=accept-types:text/plain\n",
            )
        ],
        AUDIO,
    ),
    Phone("not SDP", [inside(sip(REQUEST, SDP, kind="text/plain"), sip(REQUEST_OUTSIDE, SDP, kind="text/plain"))]),
    Phone(
        "SDP from outside stays",
        [outside(sip(RINGS.format(at=OUTSIDE), SDP_OUTSIDE), sip(RINGS.format(at=INSIDE), SDP_OUTSIDE))],
    ),
    Server(
        "a server inside",
        [
            outside(sip(RINGS.format(at="203.0.113.1")), sip(RINGS.format(at="192.168.1.10"))),
            inside(sip(ANSWERED.format(at=INSIDE), SDP), sip(ANSWERED.format(at="203.0.113.1:5060"), SDP_OUTSIDE)),
        ],
        AUDIO,
    ),
    PhoneOverTcp(
        "over TCP, messages behind each other",
        [
            inside(
                b"\r\n\r\n" + sip(REQUEST_TCP, SDP) + sip("ACK sip:b@c SIP/2.0\n"),
                b"\r\n\r\n" + sip(REQUEST_TCP_OUTSIDE, SDP_OUTSIDE) + sip("ACK sip:b@c SIP/2.0\n"),
            ),
            outside(b"\r\n"),
            header_back("Via: SIP/2.0/TCP 203.0.113.1:30000", "Via: SIP/2.0/TCP 192.168.1.10:50000"),
        ],
        AUDIO,
    ),
    PhoneOverTcp(
        "over TCP: where it listens is not where it connects from",
        [header("Contact: <sip:a@192.168.1.10;transport=tcp>", "Contact: <sip:a@203.0.113.1:40000;transport=tcp>")],
        ["tcp 5060 at 40000 for 198.51.100.7"],
    ),
    PhoneOverTcp(
        "over TCP: a message in the body of another",
        [inside(sip("MESSAGE sip:b@c SIP/2.0\n", (REQUEST + "Content-Length: 0\n\n"), kind="message/sip"))],
    ),
    PhoneOverTcp(
        "over TCP: a browser's request; nothing is read",
        [inside(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\n\r\n"), inside(sip(REQUEST, SDP))],
    ),
    PhoneOverTcp(
        "over TCP: no length; nothing is read", [inside(b"OPTIONS sip:c SIP/2.0\r\n\r\n" + sip(REQUEST, SDP))]
    ),
    PhoneOverTcp("over TCP: too long", [inside(sip(REQUEST, "a=" + "x" * 20000)), inside(sip(REQUEST, SDP))]),
    PhoneOverTcp("over TCP: TLS", [inside(b"\x16\x03\x01\r\n\r\n"), inside(sip(REQUEST, SDP))]),
]


@pytest.mark.parametrize("talk", cases(CONVERSATIONS))
def test_what_is_heard_and_opened(talk: Talk) -> None:
    check(Sip(), talk)


def test_ports_run_out() -> None:
    control = session(5060, "udp", internal_port=5060)
    openings = FakeOpenings(control, 0)
    message = sip("SIP/2.0 200 OK\n", SDP)
    with pytest.raises(Refused):
        Sip().translate(message, Side.INSIDE, control, openings)


def test_headers_are_changed_though_a_medium_is_refused() -> None:
    control = session(5060, "udp", internal_port=5060)
    changed = Sip().translate(sip(REQUEST, SDP), Side.INSIDE, control, FakeOpenings(control, 0))
    assert changed == sip(REQUEST_OUTSIDE, SDP)


def test_the_session_s_own_endpoints_are_known_whatever_the_table_says() -> None:
    control = session(5060, "udp", internal_port=5060)
    openings = FakeOpenings(control, 0)
    openings.mappings.clear()
    for side, given, expected in [
        (Side.INSIDE, sip(REQUEST), sip(REQUEST_OUTSIDE)),
        (Side.OUTSIDE, sip(RINGS.format(at=OUTSIDE)), sip(RINGS.format(at=INSIDE))),
    ]:
        assert Sip().translate(given, side, control, openings) == expected


def test_a_restarted_agent_reads_on() -> None:
    control = session(5060, "udp", internal_port=5060)
    openings = FakeOpenings(control, 16)
    for _ in range(2):
        assert Sip().translate(sip(REQUEST, SDP), Side.INSIDE, control, openings) == sip(REQUEST_OUTSIDE, SDP_OUTSIDE)
        control.memory.clear()
