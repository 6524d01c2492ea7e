"""How much goes on at once: what is held might matter, and what cannot matter is not held."""

import time
from collections.abc import Callable

import pytest
from fakes import FakeOpenings, session

from xdpmasq.alg.api import Alg, Side, Unparsed
from xdpmasq.alg.ftp import Ftp
from xdpmasq.alg.irc import Irc
from xdpmasq.alg.pna import Pna
from xdpmasq.alg.rtsp import Rtsp
from xdpmasq.alg.sip import Sip

ACK = b"ACK sip:b@c SIP/2.0\r\nContent-Length: 0\r\n\r\n"
BODY = b"ACK sip:b@c SIP/2.0\r\nl: 5\r\n\r\n"

CASES = {
    "ftp: whole lines": (Ftp(), b"USER a\r\nPOR", 8),
    "ftp: a line that is too long": (Ftp(), b"STOR " + b"a" * 2048, 2053),
    "ftp: a line that is not": (Ftp(), b"STOR " + b"a" * 2043, 0),
    "ftp: TLS": (Ftp(), b"\x16\x03\x01", 3),
    "ftp: the middle of a TLS record": (Ftp(), b"abc\ndef\x02gh", 10),
    "irc: whole lines": (Irc(), b":irc 001 a :hi\r\nPRIVMSG b :\x01DCC", 16),
    "irc: TLS after a line": (Irc(), b"STARTTLS\r\n\x16\x03\x01", 13),
    "irc: NUL": (Irc(), b"PRIVMSG\0", 8),
    "pna: the beginning of one": (Pna(), b"PN", 0),
    "pna: none": (Pna(), b"PNG", 3),
    "pna: whole chunks": (Pna(), b"PNA\0\x0a\0\x14\0\2\0\1\0\1\0\2\x1b", 11),
    "pna: a chunk of later": (Pna(), b"\0\1\0\2\x1b", 0),
    "pna: what the client says of its buffer": (Pna(), b"!", 1),
    "pna: a chunk that is too long": (Pna(), b"PNA\0\x0a\0\3\xff\xff", 9),
    "pna: the path": (Pna(), b"PNA\0\x0a\0\x52\0\3abcyB", 14),
    "sip: a keep-alive": (Sip(), b"\r\n\r\n", 4),
    "sip: half a keep-alive": (Sip(), b"\r\n\r", 2),
    "sip: the beginning of a request": (Sip(), b"INV", 0),
    "sip: the beginning of a version": (Sip(), b"ACK sip:b@c SIP/", 0),
    "sip: another version": (Sip(), b"ACK sip:b@c HT", 14),
    "sip: the beginning of an answer": (Sip(), b"SIP/2.0 2", 0),
    "sip: HTTP": (Sip(), b"POST /", 6),
    "sip: TLS": (Sip(), b"\x16\x03\x01", 3),
    "sip: a message, and the beginning of another": (Sip(), ACK + b"ACK", len(ACK)),
    "sip: a body that is not whole": (Sip(), BODY + b"1234", 0),
    "sip: a body that is": (Sip(), BODY + b"12345", len(BODY) + 5),
    "sip: a body that will be too long": (Sip(), BODY.replace(b"5", b"16384"), len(BODY) + 4),
    "sip: no length": (Sip(), b"ACK sip:b@c SIP/2.0\r\n\r\n", 23),
    "rtsp: no length": (Rtsp(), b"OPTIONS * RTSP/1.0\r\n\r\n", 22),
    "rtsp: streams": (Rtsp(), b"$\0\x05\x78abc", 7),
    "rtsp: a tunnel through HTTP": (Rtsp(), b"GET /film HTTP/1.0\r\n", 20),
    "rtsp: the beginning of a request": (Rtsp(), b"SETUP rtsp://a RTSP/1", 0),
    "rtsp: headers that have no end": (Rtsp(), b"OPTIONS * RTSP/1.0\r\nA: " + b"a" * 16384, 16407),
}


@pytest.mark.parametrize(("alg", "data", "ready"), CASES.values(), ids=CASES)
def test_how_much_is_ready(alg: Alg, data: bytes, ready: int) -> None:
    assert alg.ready(data, Side.INSIDE, session(21)) == ready


def test_what_a_server_of_pna_says_is_never_held() -> None:
    assert Pna().ready(b"PNA\0\x0a\0\x14", Side.OUTSIDE, session(21)) == 7


SIP, RTSP = b"OPTIONS sip:a SIP/2.0\r\n", b"OPTIONS * RTSP/1.0\r\n"
NO_LENGTH: dict[str, tuple[Alg, Callable[[int], bytes]]] = {
    "sip: blanks": (Sip(), lambda n: SIP + b"A:" + b" " * 4 * n + b"\0\r\n\r\n"),
    "rtsp: blanks": (Rtsp(), lambda n: RTSP + b"A:" + b" " * 4 * n + b"\0\r\n\r\n"),
    "sip: folds": (Sip(), lambda n: SIP + b"A:" + b"\r\n " * n + b"\0\r\n\r\n"),
    "sip: quotes": (Sip(), lambda n: SIP + b'Contact: "' + b'\\"' * 2 * n + b"\r\nl: 0\r\n\r\n"),
    "sip: Via": (Sip(), lambda n: SIP + b"Via: " + b'SIP/2.0/UDP 1.2.3.4;\\",' * (n // 6) + b"\r\nl: 0\r\n\r\n"),
    "sip: keep-alives": (Sip(), lambda n: b"\r\n" * 8 * n),
}


@pytest.mark.parametrize(("alg", "text"), NO_LENGTH.values(), ids=NO_LENGTH)
def test_a_long_text_takes_no_more_than_its_length(alg: Alg, text: Callable[[int], bytes]) -> None:
    """Four times as long, about four times the time: the square would be sixteen."""

    def takes(data: bytes) -> float:
        control = session(5060)
        began = time.process_time()
        try:
            alg.ready(data, Side.INSIDE, session(21))
            alg.translate(data, Side.INSIDE, control, FakeOpenings(control, 16))
        except Unparsed:
            pass
        return time.process_time() - began

    short, long = text(900), text(3600)
    assert min(takes(long) for _ in range(7)) < 8 * min(takes(short) for _ in range(7))
