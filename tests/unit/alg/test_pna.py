"""PNA: the client's UDP port among its first chunks."""

import functools

import pytest
from talks import Talk, check, inside, outside

from xdpmasq.alg.pna import Pna

Client = functools.partial(Talk, port=7070)
HEADER = b"PNA\0\x0a"
VERSION = b"\0\x14\0\2\0\1"
PATH = b"\0\x52\0\x0daudio/song.rayB"
OPENED = ["udp 6970 at 40000 for 198.51.100.7"]


def port(number: int) -> bytes:
    return b"\0\1\0\2" + number.to_bytes(2, "big")


CONVERSATIONS = [
    Client(
        "audio over UDP",
        [
            inside(HEADER + VERSION + port(6970) + PATH, HEADER + VERSION + port(40000) + PATH),
            outside(b"PNA\0\x0a\0\x14\0\2\0\1"),
            inside(b"!"),
        ],
        OPENED,
    ),
    Client(
        "in two segments, the second a chunk",
        [inside(HEADER + VERSION), inside(port(6970) + PATH, port(40000) + PATH)],
        OPENED,
    ),
    Client("audio over TCP", [inside(HEADER + VERSION + PATH), inside(b"\0\1\0\2\x1b\x3a")]),
    Client("port 1023", [inside(HEADER + VERSION + port(1023) + PATH)]),
    Client("port 0", [inside(HEADER + VERSION + port(0) + PATH)]),
    Client("a port of three bytes", [inside(HEADER + b"\0\1\0\3\1\2\3" + PATH)]),
    Client("after the path", [inside(HEADER + PATH + port(6970))]),
    Client("a chunk of 65535 bytes", [inside(HEADER + b"\0\3\xff\xff" + port(6970))]),
    Client("an empty chunk ends it", [inside(HEADER + b"\0\3\0\0" + port(6970))]),
    Client("once", [inside(HEADER + port(6970) + port(6972), HEADER + port(40000) + port(6972))], OPENED),
    Client("not at the beginning", [inside(b"x" + HEADER + port(6970))]),
    Client("in the middle of a session", [inside(b"GET / HTTP/1.0\r\n\r\n"), inside(HEADER + port(6970))]),
    Client("said outside", [outside(HEADER + port(6970))]),
    Talk("a server inside", [outside(HEADER + port(6970))], port=7070, from_outside=True),
]


@pytest.mark.parametrize("talk", CONVERSATIONS, ids=lambda talk: talk.id)
def test_what_is_heard_and_opened(talk: Talk) -> None:
    check(Pna(), talk)
