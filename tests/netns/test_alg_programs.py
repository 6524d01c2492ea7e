"""ALGs end to end: what programs, and our own sockets where programs are too well-behaved, say through the gateway.

::

    a-box .2, b-box .3 ─ lan0 masq-gate wan0 203.0.113.1 ─ internet .10 and .11
                                                         ─ transit ─ far 198.51.100.10

Mode: tc. What an ALG reads never flies; that data connections do is test_algs.py's.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from netkit import Gateway, raw, read, soon
from scapy.layers.inet import IP, TCP
from test_algs import FtpServer

from xdpmasq import algs, bpf
from xdpmasq.alg import switches
from xdpmasq.lab import Lab
from xdpmasq.lab.servers import Server
from xdpmasq.lab.topology import INTERNET, INTERNET_TOO, PUBLIC

pytestmark = pytest.mark.xdist_group("alg-programs")

NAMES = ("ftp", "irc", "rtsp", "sip", "tftp")
A_BOX, B_BOX = "192.168.0.2", "192.168.0.3"
USES = tuple(algs.Use.parse(name) for name in NAMES)


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with Gateway.in_new_lab("tc", attach=False) as made:
        made.attach_with(algs=USES)
        yield made


def exchange(near: socket.socket, far: socket.socket) -> None:
    """Random bytes, to and fro."""
    for source, sink in ((near, far), (far, near)):
        text = os.urandom(100_000)
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(source.sendall, text)
            assert read(sink, len(text)) == text
            sending.result(timeout=5)


def refuses(gateway: Gateway, role: str, called: tuple[str, int], address: str = "") -> bool:
    """Whether a connection to there does not come about."""
    with gateway.lab.socket(role, socket.SOCK_STREAM) as stranger:
        stranger.settimeout(0.3)
        if address:
            stranger.bind((address, 0))
        try:
            stranger.connect(called)
        except OSError:
            return True
    return False


def pinholes(gateway: Gateway) -> set[bytes]:
    """Their keys."""
    return {key.tobytes() for keys, _ in gateway.tables.maps["pinholes"].items(chunk=16384) for key in keys}


# --- FTP, by hand ----------------------------------------------------------------------------------


class Talk:
    """A control connection from a-box to port 21 of internet's second address; both ends are ours."""

    def __init__(self, gateway: Gateway, host: str = INTERNET_TOO, port: int = 21) -> None:
        self.gateway = gateway
        with gateway.listen("internet", port, host) as listener:
            self.near = gateway.tcp("a-box", (host, port))
            self.far, _ = listener.accept()
        self.far.settimeout(5)
        self.lines = self.far.makefile("rb")

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.close()
        self.near.close()
        self.far.close()

    def says(self, text: bytes) -> bytes:
        """What the server reads of a line."""
        self.near.sendall(text)
        return self.lines.readline()

    def is_told(self, text: bytes) -> bytes:
        """What the client reads of an answer."""
        self.far.sendall(text)
        return read(self.near, len(text))


@pytest.fixture
def talk(gateway: Gateway) -> Iterator[Talk]:
    with Talk(gateway) as made:
        yield made


def port_command(port: int, host: str = A_BOX) -> bytes:
    return b"PORT %s,%d,%d\r\n" % (host.replace(".", ",").encode(), port >> 8, port & 255)


def opened_by(line: bytes) -> tuple[str, int]:
    """The endpoint of a PORT command or a 227 that has been translated."""
    found = re.fullmatch(rb"(?:PORT |227 [^(]*\()203,0,113,1,(\d+),(\d+)\)?\.?\r\n", line)
    assert found, line
    return PUBLIC, int(found[1]) << 8 | int(found[2])


def data_connection(gateway: Gateway, listener: socket.socket, called: tuple[str, int]) -> None:
    """The server comes from the address of the control connection; bytes flow."""
    with gateway.lab.socket("internet", socket.SOCK_STREAM) as far:
        far.settimeout(5)
        far.bind((INTERNET_TOO, 0))
        far.connect(called)
        near, _ = listener.accept()
        with near:
            near.settimeout(5)
            exchange(near, far)


@pytest.mark.parametrize("nodelay", [True, False], ids=["at-once", "nagle"])
def test_a_command_comes_byte_by_byte(gateway: Gateway, talk: Talk, nodelay: bool) -> None:
    talk.near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, nodelay)
    with gateway.listen("a-box") as listener:
        for byte in port_command(listener.getsockname()[1]):
            talk.near.sendall(bytes([byte]))
            time.sleep(0.005)
        started = time.monotonic()
        line = talk.lines.readline()
        assert time.monotonic() - started < 2
        assert talk.is_told(b"200 PORT command successful.\r\n") == b"200 PORT command successful.\r\n"
        data_connection(gateway, listener, opened_by(line))
    assert talk.says(b"QUIT\r\n") == b"QUIT\r\n"


def test_several_commands_come_in_a_segment(gateway: Gateway, talk: Talk) -> None:
    with gateway.listen("a-box") as listener:
        text = b"TYPE I\r\n" + port_command(listener.getsockname()[1]) + b"STOR a\r\nNO"
        talk.near.sendall(text)
        lines = [talk.lines.readline() for _ in range(3)]
        assert (lines[0], lines[2]) == (b"TYPE I\r\n", b"STOR a\r\n")
        assert talk.says(b"OP\r\n") == b"NOOP\r\n"
        data_connection(gateway, listener, opened_by(lines[1]))


def test_a_text_longer_than_a_packet_comes_at_once(gateway: Gateway, talk: Talk) -> None:
    """Its segments come as few to the gateway (GSO), and as themselves to the agent."""
    lines = [b"SITE %03d " % n + b"x" * 100 + b"\r\n" for n in range(300)]
    with gateway.listen("a-box") as listener:
        lines[30] = port_command(listener.getsockname()[1])
        with gateway.counting() as grown:
            talk.near.sendall(b"".join(lines))
            heard = [talk.lines.readline() for _ in lines]
        data_connection(gateway, listener, opened_by(heard[30]))
    assert heard[:30] + heard[31:] == lines[:30] + lines[31:]
    assert talk.is_told(b"200 so be it\r\n") == b"200 so be it\r\n"
    assert grown["alg_bypassed"] == 0
    assert grown["punt_alg"] < len(b"".join(lines)) // 1448


def test_shifts_add_up(gateway: Gateway, talk: Talk) -> None:
    """More edits than the kernel remembers, each of another length, and text between them."""
    for number in range(12):
        with gateway.listen("a-box") as listener:
            port = listener.getsockname()[1]
            spaces = b" " * (number * 7 % 5)
            line = talk.says(port_command(port)[:-2] + spaces + b"\r\n")
            assert line.endswith(spaces + b"\r\n")
            data_connection(gateway, listener, opened_by(line.replace(spaces + b"\r\n", b"\r\n")))
        text = b"SITE " + b"x" * (100 * number) + b"\r\n"
        assert talk.says(text) == text
        answer = b"200 " + b"y" * (100 * number) + b"\r\n"
        assert talk.is_told(answer) == answer
    talk.near.shutdown(socket.SHUT_WR)
    assert talk.lines.read() == b""


def test_an_answer_comes_in_pieces(gateway: Gateway, talk: Talk) -> None:
    """The client says with its next command only what it has received, and Nagle's algorithm keeps back the rest."""
    started = time.monotonic()
    for number in range(40):
        assert talk.says(b"NOOP\r\n") == b"NOOP\r\n"
        for piece in (b"200 ", b"%d" % number, b" times", b"\r\n"):
            talk.far.sendall(piece)
        assert read(talk.near, 12 + len(str(number))) == b"200 %d times\r\n" % number
    assert time.monotonic() - started < 10


LOSSES = """\
table ip losses {
    chain output { type filter hook output priority 0; numgen random mod 100 < 5 drop; };
    chain input { type filter hook input priority 0; numgen random mod 100 < 5 drop; };
}
"""


def test_segments_are_lost(gateway: Gateway) -> None:
    """One in ten in each direction, before or behind the gateway; edits are made again, and nothing is said twice."""
    numbers = random.Random(1)
    with Talk(gateway) as talk, contextlib.ExitStack() as stack:
        talk.near.settimeout(20)
        talk.far.settimeout(20)
        talk.near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        for role in ("a-box", "internet"):
            gateway.lab.exec(role, ["nft", "-f", "-"], input=LOSSES)
            stack.callback(gateway.lab.exec, role, ["nft", "delete", "table", "ip", "losses"])
        for number in range(10):
            first = b"SITE " + b"x" * numbers.randrange(3000) + b"\r\n"
            text = first + port_command(1024 + 6000 * number) + b"LIST\r\n"
            at = 0
            while at < len(text):
                size = numbers.choice([1, 2, 20, 500, 2000])
                talk.near.sendall(text[at : at + size])
                at += size
            lines = [talk.lines.readline() for _ in range(3)]
            assert (lines[0], lines[2]) == (first, b"LIST\r\n")
            assert opened_by(lines[1])
            answer = b"200 " + b"y" * numbers.randrange(3000) + b"\r\n"
            assert talk.is_told(answer) == answer


FIRST_SHORT_TEXT = """\
table ip losses {
    chain input {
        type filter hook input priority 0;
        tcp dport 21 meta length 53-60 limit rate 1/hour burst 1 packets counter drop;
    };
}
"""


def test_a_part_of_an_edit_is_lost(gateway: Gateway, talk: Talk) -> None:
    """Its text has grown beyond a packet, and the rest does not arrive: the sender is to send all of it again."""
    for port in range(1024, 1034):  # "4,0" to "4,9"
        line = talk.says(port_command(port))
        if len(line) - len(port_command(port)) > len(b"\r\n"):
            break
    segment = talk.near.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
    site = b"SITE " + b"x" * (segment - len(port_command(port)) - 7) + b"\r\n"
    gateway.lab.exec("internet", ["nft", "-f", "-"], input=FIRST_SHORT_TEXT)
    try:
        talk.near.sendall(site + port_command(port))
        assert [talk.lines.readline() for _ in range(2)] == [site, line]
        assert "packets 1 " in gateway.lab.exec("internet", ["nft", "list", "table", "ip", "losses"]).stdout
    finally:
        gateway.lab.exec("internet", ["nft", "delete", "table", "ip", "losses"])
    assert talk.says(b"QUIT\r\n") == b"QUIT\r\n"


@pytest.mark.parametrize(
    ("early", "rest"),
    [
        (b"NOOP\r\n", b""),
        (port_command(5000), b""),  # nobody is told of a pinhole
        (port_command(5000)[:9], port_command(5000)[9:]),  # what a line ends with is no command
    ],
    ids=["a line", "a command", "a part of one"],
)
def test_text_in_a_syn(gateway: Gateway, early: bytes, rest: bytes) -> None:
    """TCP Fast Open (RFC 7413), without its cookies. What follows is read, and arrives."""
    for role in ("a-box", "internet"):
        gateway.lab.exec(role, ["sysctl", "-q", "-w", "net.ipv4.tcp_fastopen=0x607"])
    before = pinholes(gateway)
    with (
        gateway.lab.socket("internet", socket.SOCK_STREAM) as door,
        gateway.lab.socket("a-box", socket.SOCK_STREAM) as near,
    ):
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.setsockopt(socket.SOL_TCP, socket.TCP_FASTOPEN, 5)
        door.bind((INTERNET_TOO, 21))
        door.listen()
        door.settimeout(5)
        near.settimeout(5)
        near.sendto(early, socket.MSG_FASTOPEN, (INTERNET_TOO, 21))
        far, _ = door.accept()
        assert far.getsockopt(socket.SOL_TCP, socket.TCP_INFO, 104)[5] & 32, "its text was in the SYN"
        with far, far.makefile("rb") as lines, gateway.listen("a-box") as listener:
            far.settimeout(5)
            near.sendall(rest)
            assert lines.readline() == early + rest
            assert not pinholes(gateway) - before
            near.sendall(port_command(listener.getsockname()[1]))
            data_connection(gateway, listener, opened_by(lines.readline()))
            far.sendall(b"200 so be it\r\n")
            assert read(near, 14) == b"200 so be it\r\n"


@pytest.mark.parametrize("role", ["internet", "a-box"])
def test_a_stray_syn_begins_nothing(gateway: Gateway, talk: Talk, role: str) -> None:
    """RFC 5961 section 4: the connection goes on, and so do its shifts."""
    assert opened_by(talk.says(port_command(5000)))
    ends = (talk.near.getsockname(), talk.near.getpeername())
    if role == "internet":
        ends = (talk.far.getsockname(), talk.far.getpeername())
    (source, sport), (destination, dport) = ends
    syn = IP(src=source, dst=destination) / TCP(sport=sport, dport=dport, seq=12345, flags="S")
    with raw(gateway, role, socket.IPPROTO_RAW) as stranger:
        stranger.sendto(bytes(syn), (destination, 0))
    for number in range(3):
        assert opened_by(talk.says(port_command(50000 + number)))
        assert talk.is_told(b"200 so be it\r\n") == b"200 so be it\r\n"


def test_a_connection_outlives_the_agent(gateway: Gateway) -> None:
    """Edits before it is killed and after it is started anew; between them the kernel shifts alone."""
    with Talk(gateway) as talk:
        with gateway.listen("a-box") as listener:
            assert talk.says(b"USER anonymous\r\n")
            line = talk.says(port_command(listener.getsockname()[1]))
            gateway.kill_agent()
            data_connection(gateway, listener, opened_by(line))
        tables = gateway.tables
        tables.set_settings(heartbeat=(bpf.jiffies() - 20 * int(tables.settings["hz"])) % 2**32)
        for size in (3, 2000):
            text = b"SITE " + b"x" * size + b"\r\n"
            assert talk.says(text) == text
            assert talk.is_told(b"200 " + text) == b"200 " + text
        unread = port_command(5000)
        assert talk.says(unread) == unread
        gateway.attach_with(algs=USES)
        for _ in range(2):
            with gateway.listen("a-box") as listener:
                line = talk.says(port_command(listener.getsockname()[1]))
                data_connection(gateway, listener, opened_by(line))
        assert talk.is_told(b"221 bye\r\n") == b"221 bye\r\n"
        talk.far.shutdown(socket.SHUT_WR)
        assert talk.near.recv(10) == b""


REGISTERS = """\
REGISTER sip:203.0.113.11 SIP/2.0
Via: SIP/2.0/UDP 192.168.0.2:5060;branch=z9hG4bK1
Call-ID: 1
CSeq: 1 REGISTER
Contact: <sip:alice@192.168.0.2:5060>
Content-Length: 0

"""
RINGS = """\
OPTIONS sip:alice@{} SIP/2.0
Via: SIP/2.0/UDP 203.0.113.11;branch=z9hG4bK2
Call-ID: 2
CSeq: 1 OPTIONS
Content-Length: 0

"""


def test_a_registration_outlives_the_agent(gateway: Gateway) -> None:
    """The next agent knows by the kernel's tables who is meant."""
    with gateway.udp("a-box", 5060) as near, gateway.lab.socket("internet", socket.SOCK_DGRAM) as far:
        far.settimeout(5)
        far.bind((INTERNET_TOO, 5060))
        near.sendto(REGISTERS.replace("\n", "\r\n").encode(), (INTERNET_TOO, 5060))
        heard, known_as = far.recvfrom(65535)
        contact = re.search(rb"Contact: <sip:alice@(203\.0\.113\.1:\d+)>", heard)
        assert contact, heard
        gateway.kill_agent()
        gateway.attach_with(algs=USES)
        rings = RINGS.replace("\n", "\r\n")
        far.sendto(rings.format(contact[1].decode()).encode(), known_as)
        assert near.recv(65535).decode() == rings.format("192.168.0.2:5060")


def test_a_server_inside_names_its_port(gateway: Gateway) -> None:
    with (
        gateway.forward("tcp", "2121", f"{A_BOX}:21"),
        gateway.listen("a-box", 21) as door,
        gateway.tcp("internet", (PUBLIC, 2121)) as client,
    ):
        server, peer = door.accept()
        with server, server.makefile("rb") as commands, client.makefile("rb") as answers:
            client.sendall(b"PASV\r\n")
            assert commands.readline() == b"PASV\r\n"
            with gateway.listen("a-box") as listener:
                port = listener.getsockname()[1]
                server.sendall(b"227 Entering Passive Mode (192,168,0,2,%d,%d).\r\n" % (port >> 8, port & 255))
                called = opened_by(answers.readline())
                assert refuses(gateway, "internet", called, INTERNET_TOO)
                with gateway.tcp("internet", called) as far:
                    near, there = listener.accept()
                    with near:
                        assert there[0] == peer[0] == INTERNET
                        exchange(near, far)
            client.sendall(b"QUIT\r\n")
            assert commands.readline() == b"QUIT\r\n"


BOUNCES = {
    "other-host": port_command(5000, B_BOX),
    "outside": port_command(5000, INTERNET),
    "gateway": port_command(5000, "192.168.0.1"),
    "system-port": port_command(80),
    "no-port": port_command(0),
    "eprt-other-host": b"EPRT |1|192.168.0.3|5000|\r\n",
    "eprt-system-port": b"EPRT |1|192.168.0.2|22|\r\n",
}


@pytest.mark.req("attacks-bounce")
@pytest.mark.parametrize("command", BOUNCES.values(), ids=BOUNCES)
def test_a_bounce_opens_nothing(gateway: Gateway, talk: Talk, command: bytes) -> None:
    """RFC 2577 section 3."""
    before = pinholes(gateway)
    assert talk.says(command) == command
    assert not pinholes(gateway) - before


def test_a_pinhole_is_for_one_session_of_the_server(gateway: Gateway, talk: Talk) -> None:
    with gateway.listen("a-box") as listener:
        called = opened_by(talk.says(port_command(listener.getsockname()[1])))
        assert refuses(gateway, "internet", called, INTERNET)
        assert refuses(gateway, "far", called)
        data_connection(gateway, listener, called)
        assert refuses(gateway, "internet", called, INTERNET_TOO)


def test_lftp_fetches_actively(gateway: Gateway, tmp_path: Path) -> None:
    server = FtpServer(gateway.lab)
    settings = "set ftp:passive-mode no; set net:max-retries 1; set net:timeout 5"
    script = f"{settings}; open {INTERNET}; get given -o {tmp_path}/x; mirror --parallel=3 / {tmp_path}/all"
    gateway.lab.exec("b-box", ["lftp", "-c", script])
    assert (tmp_path / "x").read_bytes() == server.given
    assert (tmp_path / "all/given").read_bytes() == server.given


# --- TFTP ------------------------------------------------------------------------------------------


class TftpServer(Server):
    """tftpd-hpa, where files may be put, too."""

    name = "tftpd"

    def __init__(self, lab: Lab, role: str = "internet", address: str = INTERNET) -> None:
        super().__init__(lab, role, address)
        self.files = self.directory / "files"
        self.files.mkdir()
        options = ["--foreground", "--create", "--permissive", "--user", "root", "--address", f"{address}:69"]
        self._start(["in.tftpd", *options, "--secure", self.files], "udp", 69)


TFTP_CLIENTS = {
    "tftp-hpa": ["tftp", "-m", "binary", "{host}", "-c", "{way}", "{one}", "{other}"],
    "curl": ["curl", "-sS", "--max-time", "10", "{way}", "{one}", "{other}"],
    "curl-1428": ["curl", "-sS", "--max-time", "10", "--tftp-blksize", "1428", "{way}", "{one}", "{other}"],
}


def tftp(gateway: Gateway, client: str, way: str, place: tuple[str, str, str], local: Path) -> None:
    """``place``: the client's box, the server as it calls it, and a file there."""
    role, host, remote = place
    own, url = client == "tftp-hpa", f"tftp://{host}/{remote}"
    words = {
        ("get", True): ("get", remote, str(local)),
        ("put", True): ("put", str(local), remote),
        ("get", False): ("-o", str(local), url),
        ("put", False): ("-T", str(local), url),
    }[way, own]
    fields = dict(zip(("way", "one", "other"), words, strict=True), host=host)
    gateway.lab.exec(role, [word.format(**fields) for word in TFTP_CLIENTS[client]])


@pytest.fixture(scope="module")
def tftp_server(gateway: Gateway) -> TftpServer:
    return TftpServer(gateway.lab)


@pytest.mark.parametrize("client", TFTP_CLIENTS)
def test_tftp_client_inside(gateway: Gateway, tftp_server: TftpServer, client: str, tmp_path: Path) -> None:
    given = os.urandom(30_000)
    (tftp_server.files / f"given-{client}").write_bytes(given)
    tftp(gateway, client, "get", ("a-box", INTERNET, f"given-{client}"), tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == given
    (tmp_path / "own").write_bytes(given[::-1])
    tftp(gateway, client, "put", ("a-box", INTERNET, f"taken-{client}"), tmp_path / "own")
    assert (tftp_server.files / f"taken-{client}").read_bytes() == given[::-1]


@pytest.fixture(scope="module")
def inner_tftp_server(gateway: Gateway) -> TftpServer:
    return TftpServer(gateway.lab, "b-box", B_BOX)


@pytest.mark.parametrize("client", TFTP_CLIENTS)
def test_tftp_server_inside(gateway: Gateway, inner_tftp_server: TftpServer, client: str, tmp_path: Path) -> None:
    given = os.urandom(30_000)
    (inner_tftp_server.files / f"given-{client}").write_bytes(given)
    with gateway.forward("udp", "69", f"{B_BOX}:69"):
        tftp(gateway, client, "get", ("internet", PUBLIC, f"given-{client}"), tmp_path / "fetched")
        assert (tmp_path / "fetched").read_bytes() == given
        (tmp_path / "own").write_bytes(given[::-1])
        tftp(gateway, client, "put", ("internet", PUBLIC, f"taken-{client}"), tmp_path / "own")
    assert (inner_tftp_server.files / f"taken-{client}").read_bytes() == given[::-1]


def test_tftp_fetches_twice_from_one_port(gateway: Gateway, tftp_server: TftpServer, tmp_path: Path) -> None:
    """Each answer comes from another port of the server's."""
    given = [os.urandom(2000), os.urandom(2000)]
    for number, text in enumerate(given):
        (tftp_server.files / f"twice-{number}").write_bytes(text)
    commands = "".join(f"get twice-{number} {tmp_path}/{number}\n" for number in range(2))
    gateway.lab.exec("a-box", ["tftp", "-m", "binary", INTERNET], input=commands + "quit\n")
    assert [(tmp_path / str(number)).read_bytes() for number in range(2)] == given


def test_a_tftp_pinhole_is_for_the_server(gateway: Gateway) -> None:
    with gateway.udp("a-box") as client, gateway.udp("internet", 69, address=INTERNET_TOO) as server:
        client.sendto(b"\0\1file\0octet\0", (INTERNET_TOO, 69))
        _, seen = server.recvfrom(100)
        with gateway.udp("far") as stranger, gateway.udp("internet", address=INTERNET_TOO) as data:
            stranger.sendto(b"stranger", seen)
            data.sendto(b"data", seen)
            assert client.recv(100) == b"data"
            client.sendto(b"ack", data.getsockname())
            assert data.recv(100) == b"ack"


# --- IRC -------------------------------------------------------------------------------------------

NGIRCD = """\
[Global]
Name = irc.lab.test
Info = lab
Listen = {address}
Ports = 6667
ServerUID = irc
ServerGID = irc
[Limits]
MaxConnectionsIP = 0
MaxPenaltyTime = 0
[Options]
DNS = no
Ident = no
PAM = no
SyslogFacility = local1
"""


class IrcServer(Server):
    """ngircd."""

    name = "ngircd"

    def __init__(self, lab: Lab, role: str = "internet", address: str = INTERNET) -> None:
        super().__init__(lab, role, address)
        config = self.directory / "config"
        config.write_text(NGIRCD.format(address=address))
        self._start(["ngircd", "--nodaemon", "--config", config], "tcp", 6667)


class IrcClient:
    """Enough of one to say something and to hear it."""

    def __init__(self, gateway: Gateway, role: str, nick: str) -> None:
        self.nick = nick
        self.socket = gateway.tcp(role, (INTERNET, 6667))
        self._lines = self.socket.makefile("rb")
        self.socket.sendall(b"NICK %s\r\nUSER %s 0 * :lab\r\n" % (nick.encode(), nick.encode()))
        self._until(b" 001 ")

    def close(self) -> None:
        self._lines.close()
        self.socket.close()

    def ctcp(self, peer: IrcClient, text: str) -> str:
        """Says it; returns what the other hears."""
        self.socket.sendall(b"PRIVMSG %s :\x01%s\x01\r\n" % (peer.nick.encode(), text.encode()))
        line = peer._until(b" PRIVMSG ")
        return line.partition(b" :")[2].strip(b"\x01\r\n").decode()

    def _until(self, what: bytes) -> bytes:
        while what not in (line := self._lines.readline()):
            assert line, "the server has hung up"
            if line.startswith(b"PING"):
                self.socket.sendall(line.replace(b"PING", b"PONG", 1))
        return line


@pytest.fixture(scope="module")
def irc_clients(gateway: Gateway) -> Iterator[dict[str, IrcClient]]:
    """One in each of a-box, b-box and internet."""
    IrcServer(gateway.lab)
    clients = {role: IrcClient(gateway, role, role[0] + "nick") for role in ("a-box", "b-box", "internet")}
    yield clients
    for client in clients.values():
        client.close()


def number_of(address: str) -> int:
    return int(IPv4Address(address))


def dcc(text: str) -> tuple[str, int]:
    """The endpoint that an offer names."""
    words = text.split()
    return str(IPv4Address(int(words[3]))), int(words[4])


@pytest.mark.parametrize("offer", ["SEND file {host} {port} 100000", "CHAT chat {host} {port}"], ids=["file", "chat"])
def test_dcc_is_offered_from_inside(gateway: Gateway, irc_clients: dict[str, IrcClient], offer: str) -> None:
    """To somebody anywhere: the file comes to who asks for it first."""
    with gateway.listen("a-box") as listener:
        text = offer.format(host=number_of(A_BOX), port=listener.getsockname()[1])
        heard = irc_clients["a-box"].ctcp(irc_clients["internet"], f"DCC {text}")
        called = dcc(heard)
        assert called[0] == PUBLIC
        assert heard.split()[5:] == f"DCC {text}".split()[5:]
        with gateway.tcp("far", called) as far:
            near, _ = listener.accept()
            with near:
                exchange(near, far)
        assert refuses(gateway, "far", called)


def test_dcc_resumes(gateway: Gateway, irc_clients: dict[str, IrcClient]) -> None:
    """Both messages name the port as their reader knows it."""
    inside, outside = irc_clients["a-box"], irc_clients["internet"]
    with gateway.listen("a-box") as listener:
        port = listener.getsockname()[1]
        called = dcc(inside.ctcp(outside, f"DCC SEND file {number_of(A_BOX)} {port} 100000"))
        assert outside.ctcp(inside, f"DCC RESUME file {called[1]} 5000") == f"DCC RESUME file {port} 5000"
        assert inside.ctcp(outside, f"DCC ACCEPT file {port} 5000") == f"DCC ACCEPT file {called[1]} 5000"
        with gateway.tcp("internet", called) as far:
            near, _ = listener.accept()
            with near:
                exchange(near, far)


def test_dcc_in_reverse(gateway: Gateway, irc_clients: dict[str, IrcClient]) -> None:
    """Who offers with port 0 is to be told where to connect to: outside as it is, inside by a pinhole."""
    inside, outside = irc_clients["a-box"], irc_clients["internet"]
    asks = f"DCC SEND file {number_of(A_BOX)} 0 100000 7"
    assert inside.ctcp(outside, asks) == asks
    with gateway.listen("internet", address=INTERNET) as listener:
        answer = f"DCC SEND file {number_of(INTERNET)} {listener.getsockname()[1]} 100000 7"
        assert outside.ctcp(inside, answer) == answer
        with gateway.tcp("a-box", dcc(answer)) as near:
            far, _ = listener.accept()
            with far:
                exchange(near, far)
    asks = f"DCC SEND file {number_of(INTERNET)} 0 100000 8"
    assert outside.ctcp(inside, asks) == asks
    with gateway.listen("a-box") as listener:
        heard = inside.ctcp(outside, f"DCC SEND file {number_of(A_BOX)} {listener.getsockname()[1]} 100000 8")
        with gateway.tcp("internet", dcc(heard)) as far:
            near, _ = listener.accept()
            with near:
                exchange(near, far)


def test_dcc_between_two_inside(gateway: Gateway, irc_clients: dict[str, IrcClient]) -> None:
    """b-box is told the external endpoint, and comes to it by hairpinning."""
    with gateway.listen("a-box") as listener:
        heard = irc_clients["a-box"].ctcp(
            irc_clients["b-box"], f"DCC SEND file {number_of(A_BOX)} {listener.getsockname()[1]} 100000"
        )
        with gateway.tcp("b-box", dcc(heard)) as other:
            near, peer = listener.accept()
            assert peer[0] == PUBLIC
            with near:
                exchange(near, other)


def test_eight_offers_stand_at_once(gateway: Gateway, irc_clients: dict[str, IrcClient]) -> None:
    """With a ninth the first is gone."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(gateway.listen("a-box")) for _ in range(9)]
        called = []
        for listener in listeners:
            offer = f"DCC CHAT chat {number_of(A_BOX)} {listener.getsockname()[1]}"
            called.append(dcc(irc_clients["a-box"].ctcp(irc_clients["internet"], offer)))
        assert len(set(called)) == 9
        assert refuses(gateway, "far", called[0])
        for there, listener in zip(called[1:], listeners[1:], strict=True):
            with gateway.tcp("far", there) as far:
                near, _ = listener.accept()
                near.close()
                assert far.recv(1) == b""


# --- SIP -------------------------------------------------------------------------------------------

REGISTER = """\
REGISTER sip:{registrar} SIP/2.0
Via: SIP/2.0/{upper} {own}:5060;branch=z9hG4bK1;rport
From: <sip:lab@lab.test>;tag=1
To: <sip:lab@lab.test>
Call-ID: 1@lab.test
CSeq: 1 REGISTER
Contact: <sip:lab@{own}:5060;transport={transport}>;expires=300
Content-Length: 0

"""
LOGGED = re.compile(rb"^-{20,}[^\n]*\n(TCP|UDP) message (sent|received) \[(\d+)\] bytes ?:?\s*\n\n", re.MULTILINE)


class Sipp(Server):
    """sipp with one call; when it is to be called, it is ready.

    Args:
        scenario: of sipp's own ones; but it leaves the ports for media to us.
        words: whom it calls, and how.
    """

    _numbers = itertools.count()

    def __init__(self, gateway: Gateway, role: str, scenario: str, media: int, *words: str) -> None:
        self.name = f"sipp-{next(self._numbers)}"
        super().__init__(gateway.lab, role, A_BOX if role == "a-box" else INTERNET)
        self._messages, file = self.directory / "messages", self.directory / "scenario.xml"
        steps = subprocess.run(["sipp", "-sd", scenario], capture_output=True, text=True, check=False).stdout
        # Who is called would wait in the end, and complain when the caller has hung up sooner.
        steps = re.sub(r"<timewait[^>]*>", "", steps.replace("[media_port]", str(media)))
        file.write_text(steps)
        options = ["-i", self.address, "-p", "5060", "-mp", "9000", "-bind_local", "-nostdin"]
        options += ["-m", "1", "-timeout", "12", "-timeout_error", "-trace_msg", "-message_file", str(self._messages)]
        argv = ["sipp", "-sf", file, *words, *options]
        if scenario == "uas":
            self._start(argv, "tcp" if "t1" in words else "udp", 5060)
        else:
            with self.log.open("wb") as log:
                self._process = gateway.lab.popen(role, argv, stdout=log, stderr=log)

    def __enter__(self) -> Sipp:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def received(self) -> list[bytes]:
        """Messages that have come so far, by sipp's own count of their bytes."""
        text = self._messages.read_bytes() if self._messages.exists() else b""
        heads = LOGGED.finditer(text)
        return [text[at.end() : at.end() + int(at[3])] for at in heads if at[2] == b"received"]

    def is_over(self) -> None:
        code = self._process.wait(timeout=15)
        assert code == 0, self.log.read_text(errors="replace")[-2000:]


def offered(messages: list[bytes]) -> tuple[str, int] | None:
    """Where the first SDP among them wants RTP; that its length is as said is checked, too."""
    for message in messages:
        head, _, body = message.replace(b"\r\n", b"\n").partition(b"\n\n")
        if b"\nm=audio" in body:
            length = re.search(rb"\nContent-Length: *(\d+)", head)
            assert length
            assert len(message.partition(b"\r\n\r\n")[2]) == int(length[1])
            found = re.search(rb"\nc=IN IP4 (\S+)\n(?:.*\n)*m=audio (\d+) ", body)
            assert found
            return found[1].decode(), int(found[2])
    return None


def private_lines(messages: list[bytes]) -> list[bytes]:
    """But for those that hold names."""
    lines = [line for each in messages for line in each.split(b"\n") if b"192.168." in line]
    return [line for line in lines if not line.startswith((b"From:", b"To:", b"Call-ID:"))]


def flows(one: socket.socket, other: socket.socket, to: tuple[str, int], comes_from: str) -> None:
    """A datagram from one socket to where the other is said to be, and its answer."""
    one.sendto(b"media", to)
    text, peer = other.recvfrom(100)
    assert (text, peer[0]) == (b"media", comes_from)
    other.sendto(b"answer", peer)
    assert one.recvfrom(100) == (b"answer", to)


def call(gateway: Gateway, inside: Sipp, outside: Sipp, *, inside_first: bool) -> None:
    """Each has heard where the other wants its media; RTP and RTCP flow there; the call ends as it should."""
    with contextlib.ExitStack() as stack:
        near = [stack.enter_context(gateway.udp("a-box", 7000 + nth, address=A_BOX)) for nth in range(2)]
        far = [stack.enter_context(gateway.udp("internet", 6000 + nth, address=INTERNET)) for nth in range(2)]
        soon(lambda: bool(offered(inside.received()) and offered(outside.received())), "both have heard", 5)
        theirs, ours = offered(inside.received()), offered(outside.received())
        assert theirs == (INTERNET, 6000)
        assert ours
        assert ours[0] == PUBLIC
        assert ours[1] % 2 == 0
        for nth in range(2):
            if inside_first:
                flows(near[nth], far[nth], (INTERNET, 6000 + nth), PUBLIC)
            flows(far[nth], near[nth], (PUBLIC, ours[1] + nth), INTERNET)
    inside.is_over()
    outside.is_over()
    assert not private_lines(outside.received())


@pytest.mark.parametrize("inside_first", [True, False], ids=["inside-first", "outside-first"])
@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_sip_call_from_inside(gateway: Gateway, transport: str, inside_first: bool) -> None:
    way = ("-t", f"{transport[0]}1")
    calls = ("-d", "700", *way, f"{INTERNET}:5060")
    with (
        Sipp(gateway, "internet", "uas", 6000, *way) as outside,
        Sipp(gateway, "a-box", "uac", 7000, *calls) as inside,
    ):
        call(gateway, inside, outside, inside_first=inside_first)


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_sip_call_to_who_has_registered(gateway: Gateway, transport: str) -> None:
    fields = {"registrar": INTERNET, "own": A_BOX, "transport": transport, "upper": transport.upper()}
    request = REGISTER.format(**fields).replace("\n", "\r\n").encode()
    with contextlib.ExitStack() as stack:
        if transport == "udp":
            registrar = stack.enter_context(gateway.udp("internet", 5060, address=INTERNET))
            phone = stack.enter_context(gateway.udp("a-box", 5060, address=A_BOX))
            phone.connect((INTERNET, 5060))
            phone.send(request)
            heard, seen = registrar.recvfrom(2000)
            registrar.connect(seen)
        else:
            with gateway.listen("internet", 5060, INTERNET) as listener:
                phone = stack.enter_context(gateway.tcp("a-box", (INTERNET, 5060)))
                registrar = stack.enter_context(listener.accept()[0])
            phone.sendall(request)
            heard = registrar.recv(2000)
        assert not private_lines([heard])
        contact = re.search(rb"Contact: <sip:lab@203\.0\.113\.1:(\d+);transport=", heard)
        assert contact, heard
        answer = heard.replace(b"REGISTER sip:203.0.113.10 SIP/2.0", b"SIP/2.0 200 OK")
        registrar.send(answer)
        assert phone.recv(2000) == request.replace(b"REGISTER sip:203.0.113.10 SIP/2.0", b"SIP/2.0 200 OK")
        if transport == "udp":
            stack.close()
        way = ("-t", f"{transport[0]}1")
        called = f"{PUBLIC}:{int(contact[1])}"
        inside = stack.enter_context(Sipp(gateway, "a-box", "uas", 7000, *way))
        outside = stack.enter_context(Sipp(gateway, "internet", "uac", 6000, "-d", "700", *way, called))
        call(gateway, inside, outside, inside_first=False)


# --- RTSP ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 7], ids=["whole", "in-pieces"])
def test_rtsp_client_inside(gateway: Gateway, pieces: int) -> None:
    """The server's streams, RTP and RTCP, come to the ports that SETUP has named."""
    with contextlib.ExitStack() as stack:
        client = [stack.enter_context(gateway.udp("a-box", 8000 + nth)) for nth in range(2)]
        server = [stack.enter_context(gateway.udp("internet", 9000 + nth, address=INTERNET)) for nth in range(2)]
        with gateway.listen("internet", 554, INTERNET) as listener:
            near = stack.enter_context(gateway.tcp("a-box", (INTERNET, 554)))
            far = stack.enter_context(listener.accept()[0])
        lines = stack.enter_context(far.makefile("rb"))
        request = f"SETUP rtsp://{INTERNET}/film/1 RTSP/1.0\r\nCSeq: 1\r\n"
        request += "Transport: RTP/AVP;unicast;client_port=8000-8001\r\n\r\n"
        size = -(-len(request) // pieces)
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        for at in range(0, len(request), size):
            near.sendall(request[at : at + size].encode())
            time.sleep(0.01)
        heard = "".join(iter(lambda: lines.readline().decode(), "\r\n"))
        ports = re.search(r"client_port=(\d+)-(\d+)\r\n", heard)
        assert ports
        rtp = int(ports[1])
        assert (rtp % 2, int(ports[2])) == (0, rtp + 1)
        assert heard == request[:-2].replace("8000-8001", ports[0].strip().partition("=")[2])
        answer = "RTSP/1.0 200 OK\r\nCSeq: 1\r\nSession: 7\r\n"
        answer += "Transport: RTP/AVP;unicast;client_port={};server_port=9000-9001\r\n\r\n"
        expected = answer.format("8000-8001").encode()
        far.sendall(answer.format(f"{rtp}-{rtp + 1}").encode())
        assert read(near, len(expected)) == expected
        for nth in range(2):
            flows(server[nth], client[nth], (PUBLIC, rtp + nth), INTERNET)
        near.sendall(b"TEARDOWN * RTSP/1.0\r\nCSeq: 2\r\n\r\n")
        assert lines.readline() == b"TEARDOWN * RTSP/1.0\r\n"


# --- others' ALGs ----------------------------------------------------------------------------------

# An agent that knows these, in place of the house's own.
PLUG_INS = """
import time
from xdpmasq import daemon
from xdpmasq.alg import registry
from xdpmasq.alg.api import Alg
from xdpmasq.algs import Use
from xdpmasq.config import Config

class Raising(Alg):
    name, ports = "raising", {"tcp": (2001,)}
    def translate(self, data, side, control, openings):
        raise RuntimeError("it was written so")

class Sleeping(Alg):
    name, ports = "sleeping", {"tcp": (2002,)}
    def translate(self, data, side, control, openings):
        time.sleep(0.2)
        return b"late"

class Looping(Alg):
    name, ports = "looping", {"tcp": (2003,)}
    def ready(self, data, side, control):
        while True:
            pass

class Lying(Alg):
    name, ports = "lying", {"tcp": (2004,)}
    def ready(self, data, side, control):
        return -len(data)
    def translate(self, data, side, control, openings):
        return "no bytes"

class Shouting(Alg):
    name, ports = "shouting", {"tcp": (2005,)}
    def translate(self, data, side, control, openings):
        return data.upper() * 2

plug_ins = {each.name: each() for each in (Raising, Sleeping, Looping, Lying, Shouting)}
registry.find = plug_ins.__getitem__
uses = tuple(Use(each.name, (("tcp", each.ports["tcp"][0]),)) for each in plug_ins.values())
daemon.run(Config(("wan0",), ("lan0",), mode="tc", algs=uses))
"""


@pytest.fixture(scope="module")
def plugged(gateway: Gateway) -> Iterator[Gateway]:
    """The agent is another one; then it is as it was."""
    gateway.kill_agent()
    log = gateway.lab.directory / "plug-ins.log"
    with log.open("wb") as output:
        agent = gateway.lab.popen("masq-gate", [sys.executable, "-c", PLUG_INS], stdout=output, stderr=output)
    soon(lambda: "shouting" in [each.name for each in switches.read(gateway.tables)], "the other agent is there")
    soon(lambda: int(gateway.tables.settings["punt"]) != 0, "it has its punt port")
    yield gateway
    assert gateway.agent_pid == agent.pid, log.read_text()
    gateway.lab.stop(agent)
    gateway.attach_with(algs=USES)


@pytest.mark.parametrize(
    ("port", "counted"),
    [
        pytest.param(2001, {"raising": {"messages": 2, "failed": 2}}, id="raises"),
        pytest.param(2002, {"sleeping": {"messages": 1, "late": 1}}, id="sleeps"),  # then its session is over
        pytest.param(2003, {"looping": {"late": 1}}, id="loops"),
        pytest.param(2004, {"lying": {"messages": 2, "failed": 4}}, id="lies"),
    ],
)
def test_a_plug_in_that_fails_changes_nothing(
    plugged: Gateway, port: int, counted: dict[str, dict[str, int]]
) -> None:
    with Talk(plugged, port=port) as talk:
        assert talk.says(b"over there\r\n") == b"over there\r\n"
        assert talk.is_told(b"and back\r\n") == b"and back\r\n"
    soon(lambda: counted.items() <= plugged.tables.manifest["algs"].items(), f"{counted}", 5)


def test_a_plug_in_that_works_beside_them(plugged: Gateway) -> None:
    with Talk(plugged, port=2005) as talk:
        assert talk.says(b"over there\r\n") + talk.lines.readline() == b"OVER THERE\r\n" * 2
