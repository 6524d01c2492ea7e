"""DCC: offers, their resumption, reverse DCC, and what only looks like them."""

import functools

import pytest
from fakes import REMOTE, FakeOpenings, session
from talks import Talk, cases, check, inside, outside

from xdpmasq.alg.api import Side
from xdpmasq.alg.irc import Irc

Client = functools.partial(Talk, port=6667)
OURS = b"3232235786"  # 192.168.1.10
OUTSIDE = b"3405803777"  # 203.0.113.1
OPENED = ["tcp 5000 at 40000 for anybody"]


def dcc(text: bytes, before: bytes = b"PRIVMSG bob :") -> bytes:
    return before + b"\x01DCC " + text + b"\x01\r\n"


OFFER = dcc(b"SEND song.mp3 " + OURS + b" 5000 1234")
OFFERED = dcc(b"SEND song.mp3 " + OUTSIDE + b" 40000 1234")
FROM_BOB = b":bob!b@host.example PRIVMSG alice :"

CONVERSATIONS = [
    Client(
        "an offer", [inside(b"NICK alice\r\n"), outside(b":irc 001 alice :hi\r\n"), inside(OFFER, OFFERED)], OPENED
    ),
    Client("repeated: the same text", [inside(OFFER, OFFERED), inside(OFFER, OFFERED)], OPENED),
    *(
        Client(
            f"{kind.decode()}",
            [inside(dcc(kind + b" " + OURS + b" 5000"), dcc(kind + b" " + OUTSIDE + b" 40000"))],
            OPENED,
        )
        for kind in (b"CHAT chat", b"SCHAT chat", b"TSEND f", b"SSEND f", b"send f")
    ),
    Client(
        "a name in quotes, with spaces",
        [
            inside(
                dcc(b'SEND "my song 1 2.mp3" ' + OURS + b" 5000 9"),
                dcc(b'SEND "my song 1 2.mp3" ' + OUTSIDE + b" 40000 9"),
            )
        ],
        OPENED,
    ),
    Client(
        "NOTICE, in small letters, with a prefix",
        [
            inside(
                dcc(b"SEND f " + OURS + b" 5000", b":alice!a@h notice bob :"),
                dcc(b"SEND f " + OUTSIDE + b" 40000", b":alice!a@h notice bob :"),
            )
        ],
        OPENED,
    ),
    Client(
        "with tags, without the last colon",
        [
            inside(
                dcc(b"SEND f " + OURS + b" 5000", b"@a=b PRIVMSG bob "),
                dcc(b"SEND f " + OUTSIDE + b" 40000", b"@a=b PRIVMSG bob "),
            )
        ],
        OPENED,
    ),
    Client(
        "resumed by the peer",
        [
            inside(OFFER, OFFERED),
            outside(dcc(b"RESUME song.mp3 40000 500", FROM_BOB), dcc(b"RESUME song.mp3 5000 500", FROM_BOB)),
            inside(dcc(b"ACCEPT song.mp3 5000 500"), dcc(b"ACCEPT song.mp3 40000 500")),
        ],
        OPENED,
    ),
    Client(
        "resumed by us: the port is the peer's",
        [
            outside(dcc(b"SEND f 3325256711 5000 9", FROM_BOB)),
            inside(dcc(b"RESUME f 5000 5")),
            outside(dcc(b"ACCEPT f 5000 5", FROM_BOB)),
        ],
    ),
    Client(
        "nothing was offered",
        [outside(dcc(b"RESUME f 40000 5", FROM_BOB)), inside(dcc(b"ACCEPT f 5000 5"))],
    ),
    Client(
        "reverse DCC: the peer listens",
        [
            inside(dcc(b"SEND f " + OURS + b" 0 9 77")),
            outside(dcc(b"SEND f 3325256711 6000 9 77", FROM_BOB)),
            outside(dcc(b"RESUME f 0 5 77", FROM_BOB)),
            inside(dcc(b"ACCEPT f 0 5 77")),
        ],
    ),
    Client(
        "reverse DCC: we listen",
        [
            outside(dcc(b"SEND f 3325256711 0 9 77", FROM_BOB)),
            inside(dcc(b"SEND f " + OURS + b" 5000 9 77"), dcc(b"SEND f " + OUTSIDE + b" 40000 9 77")),
        ],
        OPENED,
    ),
    Client(
        "eight, and no ninth",
        [
            inside(dcc(b"SEND f " + OURS + b" %d" % (5000 + n)), dcc(b"SEND f " + OUTSIDE + b" %d" % (40000 + n)))
            for n in range(8)
        ]
        + [inside(dcc(b"SEND f " + OURS + b" 5008"))],
        [f"tcp {5000 + n} at {40000 + n} for anybody" for n in range(8)],
    ),
    Client("another host", [inside(dcc(b"SEND f 3232235787 5000"))]),
    Client("port 1023", [inside(dcc(b"SEND f " + OURS + b" 1023"))]),
    Client("port 65536", [inside(dcc(b"SEND f " + OURS + b" 65536"))]),
    Client("forty digits", [inside(dcc(b"SEND f " + OURS + b" " + b"5" * 40))]),
    Client("an address of 33 bits", [inside(dcc(b"SEND f 7527203082 5000"))]),
    Client("a dotted address", [inside(dcc(b"SEND f 192.168.1.10 5000"))]),
    Client("no message: a topic", [inside(dcc(b"SEND f " + OURS + b" 5000", b"TOPIC #a :"))]),
    Client("no CTCP: quoted by somebody", [inside(dcc(b"SEND f " + OURS + b" 5000", b"PRIVMSG bob :he said "))]),
    Client("said outside", [outside(dcc(b"SEND f " + OURS + b" 5000", FROM_BOB))]),
    Client("NUL: nothing is read again", [inside(b"PRIVMSG a :\0\r\n" + OFFER)]),
    Client("a browser's request: nothing is read", [inside(b"POST / HTTP/1.1\r\nHost: a.example\r\n\r\n" + OFFER)]),
    Client(
        "what anybody says through the server ends nothing",
        [
            outside(FROM_BOB + b"x\x06y\r\n\x16\x03\x01\r\n"),
            inside(OFFER, OFFERED),
            outside(dcc(b"RESUME song.mp3 40000 500", FROM_BOB), dcc(b"RESUME song.mp3 5000 500", FROM_BOB)),
        ],
        OPENED,
    ),
    Client(
        "colours and bells",
        [inside(b"PRIVMSG #a :\x02\x0304hi\x0f\x07\r\n" + OFFER, b"PRIVMSG #a :\x02\x0304hi\x0f\x07\r\n" + OFFERED)],
        OPENED,
    ),
    Talk("a server inside tells what others say", [inside(OFFER)], port=6667, from_outside=True),
]


@pytest.mark.parametrize("talk", cases(CONVERSATIONS))
def test_what_is_heard_and_opened(talk: Talk) -> None:
    check(Irc(), talk)


def test_a_restarted_agent_knows_the_offers_still() -> None:
    control = session(6667)
    openings = FakeOpenings(control, 8)
    Irc().translate(OFFER, Side.INSIDE, control, openings)
    control.memory.clear()
    resume = dcc(b"RESUME song.mp3 %d 5", FROM_BOB)
    assert Irc().translate(resume % 40000, Side.OUTSIDE, control, openings) == resume % 5000
    accept = dcc(b"ACCEPT song.mp3 %d 5")
    assert Irc().translate(accept % 5000, Side.INSIDE, control, openings) == accept % 40000


def test_offers_that_are_remembered_are_as_many_as_pinholes() -> None:
    control = session(6667)
    for n in range(20):
        offer = dcc(b"SEND f " + OURS + b" %d" % (5000 + n))
        Irc().translate(offer, Side.INSIDE, control, FakeOpenings(control, 8, first=40000 + n))
    forgotten = FakeOpenings(control, 8)
    resume = dcc(b"RESUME f %d 5", FROM_BOB)
    assert Irc().translate(resume % 40019, Side.OUTSIDE, control, forgotten) == resume % 5019
    assert Irc().translate(resume % 40011, Side.OUTSIDE, control, forgotten) == resume % 40011


def test_a_pinhole_serves_once_and_is_not_only_for_the_server() -> None:
    control = session(6667)
    openings = FakeOpenings(control, 8)
    Irc().translate(OFFER, Side.INSIDE, control, openings)
    [pinhole] = openings.opened
    assert (pinhole.remote, pinhole.sessions) == (None, 1)
    assert control.remote.address == REMOTE
