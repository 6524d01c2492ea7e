"""ALGs end to end: what programs, and our own sockets where programs are too well-behaved, say through the gateway.

::

    a-box .2, b-box .3 ─ lan0 masq-gate wan0 203.0.113.1 ─ internet .10 and .11
                                                         ─ transit ─ far 198.51.100.10

Mode: tc. What an ALG reads never flies; that data connections do is test_algs.py's.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from netkit import Gateway, read, soon

from test_algs import FtpServer

from xdpmasq import algs, bpf
from xdpmasq.lab import Lab
from xdpmasq.lab.servers import Server
from xdpmasq.lab.topology import FAR, INTERNET, INTERNET_TOO, PUBLIC

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


def test_a_connection_outlives_the_agent(gateway: Gateway) -> None:
    """Edits before it is killed and after it is started anew; between them the kernel shifts alone."""
    with Talk(gateway) as talk:
        with gateway.listen("a-box") as listener:
            assert talk.says(b"USER anonymous\r\n")
            line = talk.says(port_command(listener.getsockname()[1]))
            gateway.kill_agent()
            data_connection(gateway, listener, opened_by(line))
        tables = gateway.tables
        tables.set_settings(heartbeat=(bpf.jiffies() - 10 * int(tables.settings["hz"])) % 2**32)
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
    script = f"set ftp:passive-mode no; set net:max-retries 1; set net:timeout 5; open {INTERNET}; get given -o {tmp_path}/x"
    gateway.lab.exec("b-box", ["lftp", "-c", script + f"; mirror --parallel=3 / {tmp_path}/all"])
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


def tftp(gateway: Gateway, role: str, client: str, host: str, way: str, remote: str, local: Path) -> None:
    own = client == "tftp-hpa"
    url = f"tftp://{host}/{remote}"
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
    tftp(gateway, "a-box", client, INTERNET, "get", f"given-{client}", tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == given
    (tmp_path / "own").write_bytes(given[::-1])
    tftp(gateway, "a-box", client, INTERNET, "put", f"taken-{client}", tmp_path / "own")
    assert (tftp_server.files / f"taken-{client}").read_bytes() == given[::-1]


@pytest.fixture(scope="module")
def inner_tftp_server(gateway: Gateway) -> TftpServer:
    return TftpServer(gateway.lab, "b-box", B_BOX)


@pytest.mark.parametrize("client", TFTP_CLIENTS)
def test_tftp_server_inside(gateway: Gateway, inner_tftp_server: TftpServer, client: str, tmp_path: Path) -> None:
    given = os.urandom(30_000)
    (inner_tftp_server.files / f"given-{client}").write_bytes(given)
    with gateway.forward("udp", "69", f"{B_BOX}:69"):
        tftp(gateway, "internet", client, PUBLIC, "get", f"given-{client}", tmp_path / "fetched")
        assert (tmp_path / "fetched").read_bytes() == given
        (tmp_path / "own").write_bytes(given[::-1])
        tftp(gateway, "internet", client, PUBLIC, "put", f"taken-{client}", tmp_path / "own")
    assert (inner_tftp_server.files / f"taken-{client}").read_bytes() == given[::-1]


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
