"""RTSP: SETUP and its answers. RFC 2326 sections 12.39 and 10.12."""

import functools

import pytest
from talks import Talk, cases, check, inside, outside

from xdpmasq.alg.rtsp import Rtsp

Client = functools.partial(Talk, port=554)
Server = functools.partial(Talk, port=554, from_outside=True)
PAIR = ["udp 4588+4589 at 40000+40001 for 198.51.100.7"]


def setup(transport: bytes) -> bytes:
    return (
        b"SETUP rtsp://198.51.100.7/film/streamid=0 RTSP/1.0\r\nCSeq: 2\r\nTransport: " + transport + b"\r\n"
        b"User-Agent: player\r\n\r\n"
    )


def answer(transport: bytes, code: int = 200) -> bytes:
    return b"RTSP/1.0 %d OK\r\nCSeq: 2\r\nTransport: " % code + transport + b"\r\nSession: 1\r\n\r\n"


DESCRIBED = (
    b"RTSP/1.0 200 OK\r\nCSeq: 1\r\nContent-Type: application/sdp\r\nContent-Length: 20\r\n\r\nm=audio 0 RTP/AVP 0\n"
)
SETUP = setup(b"RTP/AVP;unicast;client_port=4588-4589")
SETUP_OUTSIDE = setup(b"RTP/AVP;unicast;client_port=40000-40001")

CONVERSATIONS = [
    Client(
        "a film",
        [
            inside(b"DESCRIBE rtsp://198.51.100.7/film RTSP/1.0\r\nCSeq: 1\r\n\r\n"),
            outside(DESCRIBED),
            inside(SETUP, SETUP_OUTSIDE),
            outside(
                answer(b"RTP/AVP;unicast;client_port=40000-40001;server_port=6256-6257"),
                answer(b"RTP/AVP;unicast;client_port=4588-4589;server_port=6256-6257"),
            ),
            inside(b"PLAY rtsp://198.51.100.7/film RTSP/1.0\r\nCSeq: 3\r\nSession: 1\r\n\r\n"),
        ],
        PAIR,
    ),
    Client("repeated: the same text", [inside(SETUP, SETUP_OUTSIDE), inside(SETUP, SETUP_OUTSIDE)], PAIR),
    Client(
        "two streams",
        [
            inside(SETUP, SETUP_OUTSIDE),
            inside(
                setup(b"RTP/AVP/UDP;unicast;client_port=4590-4591"),
                setup(b"RTP/AVP/UDP;unicast;client_port=40002-40003"),
            ),
        ],
        [*PAIR, "udp 4590+4591 at 40002+40003 for 198.51.100.7"],
    ),
    Client(
        "one port",
        [
            inside(
                setup(b"x-real-rdt/udp;client_port=6971;mode=play"),
                setup(b"x-real-rdt/udp;client_port=40000;mode=play"),
            )
        ],
        ["udp 6971 at 40000 for 198.51.100.7"],
    ),
    Client(
        "several transports to choose from",
        [
            inside(
                setup(
                    b"x-real-rdt/mcast;client_port=6970;mode=play,x-real-rdt/udp;client_port=6970;mode=play,"
                    b"x-real-rdt/tcp;mode=play, RTP/AVP;unicast;client_port=6970-6971,"
                    b"RTP/AVP/TCP;unicast;interleaved=0-1"
                ),
                setup(
                    b"x-real-rdt/mcast;client_port=6970;mode=play,x-real-rdt/udp;client_port=40000;mode=play,"
                    b"x-real-rdt/tcp;mode=play, RTP/AVP;unicast;client_port=40000-40001,"
                    b"RTP/AVP/TCP;unicast;interleaved=0-1"
                ),
            )
        ],
        ["udp 6970+6971 at 40000+40001 for 198.51.100.7"],
    ),
    Client(
        "with the destination",
        [
            inside(
                setup(b"RTP/AVP;unicast;destination=192.168.1.10;client_port=4588-4589"),
                setup(b"RTP/AVP;unicast;destination=203.0.113.1;client_port=40000-40001"),
            ),
            outside(
                answer(b"RTP/AVP;unicast;destination=203.0.113.1;source=198.51.100.7;client_port=40000-40001"),
                answer(b"RTP/AVP;unicast;destination=192.168.1.10;source=198.51.100.7;client_port=4588-4589"),
            ),
        ],
        PAIR,
    ),
    Client(
        "another destination stays",
        [
            inside(
                setup(b"RTP/AVP;unicast;destination=192.168.1.11;client_port=4588-4589"),
                setup(b"RTP/AVP;unicast;destination=192.168.1.11;client_port=40000-40001"),
            )
        ],
        PAIR,
    ),
    Client(
        "a folded header",
        [
            inside(
                setup(b"RTP/AVP;unicast\r\n ;client_port=4588-4589"),
                setup(b"RTP/AVP;unicast\r\n ;client_port=40000-40001"),
            )
        ],
        PAIR,
    ),
    Client("multicast", [inside(setup(b"RTP/AVP;multicast;client_port=4588-4589"))]),
    Client("over the connection", [inside(setup(b"RTP/AVP/TCP;unicast;interleaved=0-1"))]),
    Client("nothing is read within the streams", [outside(b"$\0\0\x04abcd"), inside(SETUP)]),
    Client("ports that are no pair", [inside(setup(b"RTP/AVP;unicast;client_port=4588-4590"))]),
    Client("an odd pair", [inside(setup(b"RTP/AVP;unicast;client_port=4589-4590"))]),
    Client("below 1024", [inside(setup(b"RTP/AVP;unicast;client_port=1022-1023"))]),
    Client("port 65536", [inside(setup(b"RTP/AVP;unicast;client_port=65536-65537"))]),
    Client("forty digits", [inside(setup(b"RTP/AVP;unicast;client_port=" + b"4" * 40))]),
    Client("no SETUP", [inside(SETUP.replace(b"SETUP", b"PLAY"))]),
    Client("in a body", [inside(b"SET_PARAMETER * RTSP/1.0\r\nContent-Length: %d\r\n\r\n" % len(SETUP) + SETUP)]),
    Client("two lengths", [inside(b"OPTIONS * RTSP/1.0\r\nContent-Length: 0\r\nContent-Length: 1\r\n\r\n" + SETUP)]),
    Client("a browser's request: nothing is read", [inside(b"POST / HTTP/1.1\r\nHost: a\r\n\r\n" + SETUP)]),
    Client("NUL in a header", [inside(SETUP.replace(b"player", b"pla\0yer"))]),
    Client("an answer with others' ports", [outside(answer(b"RTP/AVP;unicast;client_port=5000-5001"))]),
    Client("too long", [inside(setup(b"RTP/AVP;" + b"x" * 20000 + b";client_port=4588-4589"))]),
    Server(
        "a server inside",
        [
            outside(SETUP),
            inside(
                answer(b"RTP/AVP;unicast;client_port=4588-4589;source=192.168.1.10;server_port=6256-6257"),
                answer(b"RTP/AVP;unicast;client_port=4588-4589;source=203.0.113.1;server_port=40000-40001"),
            ),
        ],
        ["udp 6256+6257 at 40000+40001 for 198.51.100.7"],
    ),
    Server("a server inside that refuses", [inside(answer(b"RTP/AVP;unicast;server_port=6256-6257", 461))]),
]


@pytest.mark.parametrize("talk", cases(CONVERSATIONS))
def test_what_is_heard_and_opened(talk: Talk) -> None:
    check(Rtsp(), talk)
