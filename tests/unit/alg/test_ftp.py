"""FTP: PORT, EPRT, PASV, EPSV, and what only looks like them. RFC 959, RFC 2428, RFC 2577, RFC 4217."""

import functools

import pytest
from fakes import HOST, REMOTE, FakeOpenings, session
from talks import Talk, cases, check, inside, outside

from xdpmasq.alg.api import Endpoint, Refused, Side
from xdpmasq.alg.ftp import Ftp

Client = functools.partial(Talk, port=21)
Server = functools.partial(Talk, port=21, from_outside=True)

PORT = b"PORT 192,168,1,10,200,21\r\n"  # 51221
PORT_OUTSIDE = b"PORT 203,0,113,1,156,64\r\n"  # 40000
OPENED = ["tcp 51221 at 40000 for 198.51.100.7"]

CONVERSATIONS = [
    Client(
        "a client's PORT",
        [
            outside(b"220 ready\r\n"),
            inside(b"USER anonymous\r\n"),
            outside(b"331 password\r\n"),
            inside(b"PASS a@b\r\n"),
            outside(b"230-Welcome\r\n 227 here\r\n230 logged in\r\n"),
            inside(PORT, PORT_OUTSIDE),
            outside(b"200 PORT command successful\r\n"),
            inside(b"RETR a,b\r\n"),
        ],
        OPENED,
    ),
    Client("a greeting in colour", [outside(b"220 \x1b[31mhi\x07\r\n"), inside(PORT, PORT_OUTSIDE)], OPENED),
    Client("in small letters", [inside(b"port 192,168,1,10,200,21\r\n", b"port 203,0,113,1,156,64\r\n")], OPENED),
    Client("without CR", [inside(b"PORT 192,168,1,10,200,21\n", b"PORT 203,0,113,1,156,64\n")], OPENED),
    Client("repeated: the same text", [inside(PORT, PORT_OUTSIDE), inside(PORT, PORT_OUTSIDE)], OPENED),
    Client(
        "EPRT",
        [inside(b"EPRT |1|192.168.1.10|51221|\r\n", b"EPRT |1|203.0.113.1|40000|\r\n")],
        OPENED,
    ),
    Client(
        "EPRT with another bar",
        [inside(b"eprt !1!192.168.1.10!51221!\r\n", b"eprt !1!203.0.113.1!40000!\r\n")],
        OPENED,
    ),
    Client("EPRT of IPv6", [inside(b"EPRT |2|2001:db8::1|51221|\r\n")]),
    Client("EPRT with bars that differ", [inside(b"EPRT |1|192.168.1.10|51221!\r\n")]),
    Client("EPRT of another host", [inside(b"EPRT |1|192.168.1.11|51221|\r\n")]),
    Client("EPRT of port 1023", [inside(b"EPRT |1|192.168.1.10|1023|\r\n")]),
    Client("EPRT of port 65536", [inside(b"EPRT |1|192.168.1.10|65536|\r\n")]),
    Client("EPRT of forty digits", [inside(b"EPRT |1|192.168.1.10|" + b"5" * 40 + b"|\r\n")]),
    Client("PORT with 256", [inside(b"PORT 192,168,1,10,256,21\r\n")]),
    Client("PORT with forty digits", [inside(b"PORT 192,168,1,10,200," + b"0" * 39 + b"1\r\n")]),
    Client("PORT with five numbers", [inside(b"PORT 192,168,1,10,200\r\n")]),
    Client("PORT with seven numbers", [inside(b"PORT 192,168,1,10,200,21,1\r\n")]),
    Client("PORT and more", [inside(b"PORT 192,168,1,10,200,21 x\r\n")]),
    Client("not at the beginning of a line", [inside(b" PORT 192,168,1,10,200,21\r\n")]),
    Client("in another command", [inside(b"SITE PORT 192,168,1,10,200,21\r\n")]),
    Client("a CR is no end of a line", [inside(b"NOOP\rPORT 192,168,1,10,200,21\r\n")]),
    Client("NUL: nothing is read again", [inside(b"NOOP\0\r\n" + PORT)]),
    Client("said by the server", [outside(PORT)]),
    Client("a server outside needs nothing", [inside(b"PASV\r\n"), outside(b"227 (198,51,100,7,200,21)\r\n")]),
    Client(
        "a server that names the client's port",
        [inside(b"PASV\r\n"), outside(b"227 (192,168,1,10,200,21)\r\n")],
    ),
    Client(
        "TLS: untouched after 234",
        [inside(b"AUTH TLS\r\n"), outside(b"234 go on\r\n"), inside(b"\x16\x03\x01\0\x05\n" + PORT), inside(PORT)],
    ),
    Client(
        "TLS refused: read on",
        [inside(b"AUTH TLS\r\n"), outside(b"502 no\r\n"), inside(PORT, PORT_OUTSIDE)],
        OPENED,
    ),
    Client("234 that nobody asked for", [outside(b"234 go on\r\n"), inside(PORT, PORT_OUTSIDE)], OPENED),
    Client("TLS that has begun before the agent", [inside(b"\x17\x03\x03\0\x05abc\nx"), inside(PORT)]),
    Client(
        "lines of a telnet client",
        [inside(b"\xff\xf4\xff\xf2ABOR\r\n" + PORT, b"\xff\xf4\xff\xf2ABOR\r\n" + PORT_OUTSIDE)],
        OPENED,
    ),
    Client(
        "a browser's request: nothing is read",
        [inside(b"POST / HTTP/1.1\r\nHost: attacker.example\r\nContent-Length: 26\r\n\r\n" + PORT)],
    ),
    Client(
        "after a line that is too long",
        [inside(b"STOR " + b"a" * 3000 + b"\r\n"), inside(PORT, PORT_OUTSIDE)],
        OPENED,
    ),
    Client("the rest of a line that is too long", [inside(b"STOR " + b"a" * 3000), inside(PORT)]),
    Server(
        "PASV of a server inside",
        [
            outside(b"PASV\r\n"),
            inside(
                b"227 Entering Passive Mode (192,168,1,10,200,21).\r\n",
                b"227 Entering Passive Mode (203,0,113,1,156,64).\r\n",
            ),
        ],
        OPENED,
    ),
    Server(
        "without brackets",
        [outside(b"pasv\r\n"), inside(b"227 =192,168,1,10,200,21\r\n", b"227 =203,0,113,1,156,64\r\n")],
        OPENED,
    ),
    Server(
        "EPSV of a server inside",
        [
            outside(b"EPSV 1\r\n"),
            inside(
                b"229 Entering Extended Passive Mode (|||51221|)\r\n",
                b"229 Entering Extended Passive Mode (|||40000|)\r\n",
            ),
        ],
        OPENED,
    ),
    Server("PASV without numbers", [outside(b"PASV\r\n"), inside(b"227 ok\r\n")]),
    Server("EPSV with an address", [outside(b"EPSV\r\n"), inside(b"229 ok (|1|192.168.1.10|51221|)\r\n")]),
    Server("EPSV below 1024", [outside(b"EPSV\r\n"), inside(b"229 ok (|||22|)\r\n")]),
    Server("EPSV ALL is no question", [outside(b"EPSV ALL\r\n"), inside(b"229 ok (|||51221|)\r\n")]),
    Server("an answer to no question", [inside(b"227 ok (192,168,1,10,200,21)\r\n229 ok (|||51221|)\r\n")]),
    Server("an answer to the other question", [outside(b"EPSV\r\n"), inside(b"227 (192,168,1,10,200,21)\r\n")]),
    Server(
        "one answer to a question",
        [
            outside(b"PASV\r\n"),
            inside(b"227 (192,168,1,10,200,21)\r\n", b"227 (203,0,113,1,156,64)\r\n"),
            inside(b"227 (192,168,1,10,200,22)\r\n"),
        ],
        OPENED,
    ),
    Server(
        "a question that was refused",
        [outside(b"PASV\r\n"), inside(b"500 no\r\n"), inside(b"227 (192,168,1,10,200,21)\r\n")],
    ),
    Server(
        "within an answer of several lines",
        [outside(b"PASV\r\n"), inside(b"211-files:\r\n227 (192,168,1,10,200,21)\r\n211 end\r\n")],
    ),
    Server(
        "several commands at once: each answer is its own's",
        [
            outside(b"CWD x\r\nRETR a\r\nPASV\r\nNOOP\r\nPASV\r\n"),
            inside(b"550 no\r\n150 here\r\n426 broken\r\n"),
            inside(b"227 (192,168,1,10,200,21)\r\n", b"227 (203,0,113,1,156,64)\r\n"),
            inside(b"200-so\r\n227 (192,168,1,10,200,21)\r\n200 ok\r\n"),
            inside(b"227 (192,168,1,10,200,21)\r\n", b"227 (203,0,113,1,156,64)\r\n"),
            inside(b"227 (192,168,1,10,200,21)\r\n"),
        ],
        OPENED,
    ),
    Server(
        "the first of two is refused",
        [
            outside(b"EPSV\r\nPASV\r\n"),
            inside(b"502 no\r\n227 (192,168,1,10,200,21)\r\n", b"502 no\r\n227 (203,0,113,1,156,64)\r\n"),
        ],
        OPENED,
    ),
    Server(
        "an answer of several lines",
        [
            outside(b"PASV\r\n"),
            inside(b"227-Entering\r\n 227 (192,168,1,10,200,22)\r\n"),
            inside(b"227 (192,168,1,10,200,21)\r\n", b"227 (203,0,113,1,156,64)\r\n"),
        ],
        OPENED,
    ),
    Server(
        "an answer of several lines, with the endpoint in the first",
        [
            outside(b"PASV\r\n"),
            inside(b"227-(192,168,1,10,200,21)\r\n", b"227-(203,0,113,1,156,64)\r\n"),
            inside(b"227 go on\r\n227 (192,168,1,10,200,21)\r\n"),
        ],
        OPENED,
    ),
    Server("another host", [outside(b"PASV\r\n"), inside(b"227 (192,168,1,11,200,21)\r\n")]),
    Server("below 1024", [outside(b"PASV\r\n"), inside(b"227 (192,168,1,10,0,22)\r\n")]),
    Server("a remote's PORT", [outside(b"PORT 192,168,1,10,200,21\r\n"), outside(b"PORT 198,51,100,7,200,21\r\n")]),
]


@pytest.mark.parametrize("talk", cases(CONVERSATIONS))
def test_what_is_heard_and_opened(talk: Talk) -> None:
    check(Ftp(), talk)


@pytest.mark.req("attacks-bounce")
@pytest.mark.parametrize(
    "command",
    [
        *(b"PORT 192,168,1,%d,200,21\r\n" % host for host in (0, 1, 9, 11, 255)),
        b"PORT 198,51,100,7,200,21\r\n",
        b"PORT 203,0,113,1,200,21\r\n",
        b"PORT 127,0,0,1,200,21\r\n",
        *(b"PORT 192,168,1,10,%d,%d\r\n" % divmod(port, 256) for port in (1, 20, 22, 25, 80, 445, 1023)),
        b"EPRT |1|192.168.1.11|51221|\r\n",
        b"EPRT |1|192.168.1.10|1023|\r\n",
    ],
)
def test_another_host_and_low_ports_open_nothing(command: bytes) -> None:
    control = session(21)
    openings = FakeOpenings(control)
    with pytest.raises(Refused):
        Ftp().translate(command, Side.INSIDE, control, openings)
    assert openings.asked == 0


def test_the_pinhole_is_for_the_remote_and_short() -> None:
    control = session(21)
    openings = FakeOpenings(control)
    Ftp().translate(PORT, Side.INSIDE, control, openings)
    [pinhole] = openings.opened
    assert (pinhole.internal, pinhole.remote, pinhole.sessions) == (Endpoint(HOST, 51221), REMOTE, 1)
    assert pinhole.lasts_s <= 300


def test_one_that_is_refused_keeps_no_other_from_being_changed() -> None:
    control = session(21)
    openings = FakeOpenings(control)
    bad = b"PORT 10,0,0,1,200,21\r\n"
    assert Ftp().translate(bad + PORT, Side.INSIDE, control, openings) == bad + PORT_OUTSIDE


def test_epsv_has_no_place_for_another_address() -> None:
    control = session(21, from_outside=True)
    openings = FakeOpenings(control)
    openings.mappings["tcp", Endpoint(HOST, 5000)] = Endpoint(REMOTE, 5000)
    Ftp().translate(b"EPSV\r\n", Side.OUTSIDE, control, openings)
    with pytest.raises(Refused, match="another address"):
        Ftp().translate(b"229 ok (|||5000|)\r\n", Side.INSIDE, control, openings)


def test_a_restarted_agent_reads_on() -> None:
    control = session(21)
    openings = FakeOpenings(control)
    Ftp().translate(b"USER a\r\n", Side.INSIDE, control, openings)
    control.memory.clear()
    assert Ftp().translate(PORT, Side.INSIDE, control, openings) == PORT_OUTSIDE
