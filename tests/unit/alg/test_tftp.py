"""TFTP: requests, with and without options. RFC 1350, RFC 2347."""

import functools

import pytest
from fakes import FakeOpenings, session
from talks import Talk, check, inside, outside

from xdpmasq.alg.api import Refused, Side
from xdpmasq.alg.tftp import Tftp

Client = functools.partial(Talk, port=69, protocol="udp")
OPENED = ["udp 50000 at 30000 for 198.51.100.7"]

CONVERSATIONS = [
    Client("a file to read", [inside(b"\0\1boot/pxelinux.0\0octet\0")], OPENED),
    Client("a file to write", [inside(b"\0\2startup-config\0NETASCII\0")], OPENED),
    Client("with options", [inside(b"\0\1f\0octet\0tsize\x000\0blksize\x001428\0")], OPENED),
    Client("repeated", [inside(b"\0\1f\0octet\0"), inside(b"\0\1f\0octet\0")], OPENED),
    Client("a mode that there is not", [inside(b"\0\1f\0binary\0")]),
    Client("no name", [inside(b"\0\1\0octet\0")]),
    Client("cut off", [inside(b"\0\1f\0octet")]),
    Client("an option without its value", [inside(b"\0\1f\0octet\0tsize\0")]),
    Client("data", [inside(b"\0\3\0\1f\0octet\0")]),
    Client("an acknowledgement", [inside(b"\0\4\0\1")]),
    Client("nothing", [inside(b"")]),
    Client("said outside", [outside(b"\0\1f\0octet\0")]),
    Talk(
        "a server inside needs nothing",
        [outside(b"\0\1f\0octet\0"), inside(b"\0\5\0\1File not found\0")],
        port=69,
        protocol="udp",
        from_outside=True,
    ),
]


@pytest.mark.parametrize("talk", CONVERSATIONS, ids=lambda talk: talk.id)
def test_what_is_heard_and_opened(talk: Talk) -> None:
    check(Tftp(), talk)


def test_a_client_below_1024_gets_none() -> None:
    control = session(69, "udp", internal_port=1023)
    openings = FakeOpenings(control)
    with pytest.raises(Refused):
        Tftp().translate(b"\0\1f\0octet\0", Side.INSIDE, control, openings)
    assert openings.asked == 0


def test_the_server_answers_from_any_port() -> None:
    control = session(69, "udp")
    openings = FakeOpenings(control)
    Tftp().translate(b"\0\1f\0octet\0", Side.INSIDE, control, openings)
    assert openings.opened[0].remote_port is None
