"""ALGs with programs by other hands than those of test_algs.py: pyftpdlib and tnftp, atftp, irssi at both ends.

::

    a-box .2, b-box .3 ─ lan0 masq-gate wan0 203.0.113.1 ─ internet .10 and .11

What the kernel's NAT and helpers do as well is asked of them, too, with the same programs. Mode: tc.
"""

from __future__ import annotations

import functools
import os
import pty
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from netkit import Gateway, soon
from test_alg_programs import IrcServer, TftpServer
from test_algs import FtpServer

from xdpmasq import algs
from xdpmasq.lab import Lab
from xdpmasq.lab.servers import Server
from xdpmasq.lab.topology import HOSTS, INTERNET, INTERNET_TOO, PUBLIC

USES = tuple(algs.Use.parse(name) for name in ("ftp", "irc", "tftp"))

KERNELS = """
table ip xdpmasq_test {
    ct helper ftp { type "ftp" protocol tcp; }
    ct helper irc { type "irc" protocol tcp; }
    ct helper tftp { type "tftp" protocol udp; }
    chain marked {
        type filter hook prerouting priority filter;
        tcp dport 21 ct helper set "ftp"; tcp dport 6667 ct helper set "irc"; udp dport 69 ct helper set "tftp";
    }
    chain out { type nat hook postrouting priority srcnat; oifname "wan0" masquerade; }
}
"""


class Site:
    """A gateway; in internet pyftpdlib, tftpd-hpa and ngircd."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway, self.lab = gateway, gateway.lab
        self.ftp = PyFtpServer(gateway.lab, "internet", INTERNET)
        self.tftp = TftpServer(gateway.lab)
        IrcServer(gateway.lab)

    @functools.cached_property
    def irssi(self) -> dict[str, Irssi]:
        """In a-box and in internet, once they are needed: each test with a forward ends all sessions."""
        return {role: Irssi(self.lab, role, f"{role[0]}nick") for role in ("a-box", "internet")}


@pytest.fixture(scope="module")
def ours() -> Iterator[Site]:
    with Gateway.in_new_lab("tc", attach=False) as made:
        made.attach_with(algs=USES)
        yield Site(made)


@pytest.fixture(scope="module")
def kernels() -> Iterator[Site]:
    """xdpmasq is not attached."""
    with Gateway.in_new_lab("tc", attach=False) as made:
        made.sysctl("net.ipv4.ip_forward", 1)
        made.lab.exec("masq-gate", ["nft", "-f", "-"], input=KERNELS)
        yield Site(made)


@pytest.fixture(
    params=[pytest.param(nat, marks=pytest.mark.xdist_group(f"alg-{nat}")) for nat in ("ours", "kernels")]
)
def site(request: pytest.FixtureRequest) -> Site:
    """By one NAT and the other."""
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


@pytest.fixture
def gateway(ours: Site) -> Gateway:
    """xdpmasq only."""
    return ours.gateway


without_the_kernel = pytest.mark.xdist_group("alg-ours")


# --- FTP -------------------------------------------------------------------------------------------


class PyFtpServer(Server):
    """pyftpdlib for anonymous users. It refuses endpoints of other hosts, and thus an address that was not edited."""

    name = "pyftpdlib"

    def __init__(self, lab: Lab, role: str, address: str) -> None:
        super().__init__(lab, role, address)
        self.files = self.directory / "files"
        self.files.mkdir()
        self.given = os.urandom(1_000_000)
        (self.files / "given").write_bytes(self.given)
        options = ["--interface", address, "--port", "21", "--write", "--directory", self.files]
        self._start(["/usr/bin/python3", "-W", "ignore", "-m", "pyftpdlib", *options], "tcp", 21)


# What tnftp is told, and what it says then.
FTP_WAYS = {
    "PORT": ("passive off", "epsv4 off", "PORT "),
    "EPRT": ("passive off", "epsv4 on", "EPRT |1|"),
    "PASV": ("passive on", "epsv4 off", "PASV"),
    "EPSV": ("passive on", "epsv4 on", "EPSV"),
}


def tnftp(place: tuple[Lab, str], called: tuple[str, int], server: PyFtpServer, way: str, local: Path) -> None:
    """Fetches a file and puts another, and says what it was told to."""
    lab, role = place
    passive, extended, said = FTP_WAYS[way]
    own = os.urandom(500_000)
    (local / "own").write_bytes(own)
    commands = ["user anonymous x", "binary", passive, extended]
    commands += [f"get given {local}/fetched", f"put {local}/own taken-{way}", "quit"]
    argv = ["tnftp", "-dinV", called[0], str(called[1])]
    output = lab.exec(role, argv, input="\n".join(commands) + "\n").stdout
    assert output.count(f"---> {said}") == 2, output
    assert (local / "fetched").read_bytes() == server.given
    assert (server.files / f"taken-{way}").read_bytes() == own


@pytest.mark.parametrize("way", FTP_WAYS)
def test_tnftp_inside(site: Site, way: str, tmp_path: Path) -> None:
    tnftp((site.lab, "a-box"), (INTERNET, 21), site.ftp, way, tmp_path)


@pytest.fixture(scope="module")
def inner_ftp_server(ours: Site) -> PyFtpServer:
    return PyFtpServer(ours.lab, "b-box", HOSTS["b-box"])


@without_the_kernel
@pytest.mark.parametrize("way", FTP_WAYS)
def test_pyftpdlib_inside(gateway: Gateway, inner_ftp_server: PyFtpServer, way: str, tmp_path: Path) -> None:
    """Behind a forward from another port."""
    with gateway.forward("tcp", "2121", f"{HOSTS['b-box']}:21"):
        tnftp((gateway.lab, "internet"), (PUBLIC, 2121), inner_ftp_server, way, tmp_path)


# --- FTP in TLS ------------------------------------------------------------------------------------

VSFTPD_TLS = """\
ssl_enable=YES
allow_anon_ssl=YES
force_anon_logins_ssl=YES
force_anon_data_ssl=YES
require_ssl_reuse=NO
rsa_cert_file={folder}/cert.pem
rsa_private_key_file={folder}/key.pem
pasv_min_port=5000
pasv_max_port=5009
"""
FTPS = ["curl", "-sS", "--ssl-reqd", "--insecure"]


def ftps(gateway: Gateway, role: str, url: str, server: FtpServer, local: Path) -> None:
    gateway.lab.exec(role, [*FTPS, "-o", local, f"{url}/given"])
    assert local.read_bytes() == server.given
    gateway.lab.exec(role, [*FTPS, "-T", local, f"{url}/in/taken"])
    assert server.taken.read_bytes() == server.given


@without_the_kernel
def test_ftp_in_tls_passes(gateway: Gateway, tls: Path, tmp_path: Path) -> None:
    """A passive client inside needs no ALG."""
    server = FtpServer(gateway.lab, "internet", INTERNET_TOO, VSFTPD_TLS.format(folder=tls))
    ftps(gateway, "a-box", f"ftp://{INTERNET_TOO}", server, tmp_path / "fetched")
    server.stop()


@without_the_kernel
def test_an_ftp_server_inside_in_tls_needs_forwards(gateway: Gateway, tls: Path, tmp_path: Path) -> None:
    """What it says cannot be read, so its ports are forwarded as they are."""
    server = FtpServer(gateway.lab, "c-box", HOSTS["c-box"], VSFTPD_TLS.format(folder=tls))
    with (
        gateway.forward("tcp", "2122", f"{HOSTS['c-box']}:21"),
        gateway.forward("tcp", "5000-5009", HOSTS["c-box"]),
    ):
        ftps(gateway, "internet", f"ftp://{PUBLIC}:2122", server, tmp_path / "fetched")


@without_the_kernel
def test_ftp_goes_on_where_tls_was_refused(ours: Site, tmp_path: Path) -> None:
    """AUTH is not the end of what can be read until the server agrees."""
    fetched = tmp_path / "fetched"
    argv = ["curl", "-sSv", "--ssl", "--ftp-port", "-", "-o", fetched, f"ftp://{INTERNET}/given"]
    assert "> AUTH " in ours.lab.exec("a-box", argv).stderr
    assert fetched.read_bytes() == ours.ftp.given


# --- TFTP ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [[], ["--option", "blksize 1428", "--option", "tsize 0"]], ids=["plain", "options"]
)
def test_atftp_inside(site: Site, options: list[str], tmp_path: Path) -> None:
    argv, taken = ["atftp", *options, INTERNET], f"taken-{len(options)}"
    given = os.urandom(200_000)
    (site.tftp.files / "given").write_bytes(given)
    site.lab.exec("a-box", [*argv, "--get", "--remote-file", "given", "--local-file", tmp_path / "fetched"])
    assert (tmp_path / "fetched").read_bytes() == given
    site.lab.exec("a-box", [*argv, "--put", "--remote-file", taken, "--local-file", tmp_path / "fetched"])
    assert (site.tftp.files / taken).read_bytes() == given


# --- IRC -------------------------------------------------------------------------------------------

# All that is said comes in one window.
IRSSI = """\
settings = {{
  core = {{ real_name = "lab"; user_name = "lab"; settings_autosave = "no"; }};
  "fe-text" = {{ term_force_colors = "no"; }};
  "fe-common/core" = {{ autocreate_query_level = "none"; autocreate_own_query = "no"; }};
  "irc/dcc" = {{ dcc_download_path = "{home}"; dcc_autorename = "no"; dcc_upload_path = "{home}"; }};
  "irc/core" = {{ cmds_max_at_once = "100"; }};
}};
"""


class Irssi:
    """At a terminal of its own, to which commands are typed; its screen goes into a file.

    Attributes:
        home: its files, sent and received.
    """

    def __init__(self, lab: Lab, role: str, nick: str) -> None:
        self.nick, self.home = nick, lab.directory / f"irssi-{nick}"
        self.home.mkdir()
        (self.home / "config").write_text(IRSSI.format(home=self.home))
        self._page, self._screen = 0, self.home / "screen"
        self._keys, terminal = pty.openpty()
        command = 'export TERM=vt100 LC_ALL=C.UTF-8; exec irssi --home="$1" -n "$2" -c "$3" <"$4" >"$1/screen" 2>&1'
        words = [self.home, nick, INTERNET, os.ttyname(terminal)]
        lab.popen(role, ["sh", "-c", command, "irssi", *words])
        self.sees("End of MOTD")
        os.close(terminal)

    def does(self, *commands: str) -> None:
        for command in commands:
            os.write(self._keys, command.encode() + b"\n")

    def turns_a_page(self) -> None:
        """What has been seen so far does not count."""
        self._page = self._screen.stat().st_size

    def sees(self, pattern: str) -> None:
        soon(lambda: re.search(pattern, self._seen()) is not None, f"{self.nick} sees {pattern}")

    def _seen(self) -> str:
        return self._screen.read_bytes()[self._page :].decode(errors="replace") if self._screen.exists() else ""

    def received(self, name: str) -> bytes:
        """What there is of a file by now."""
        file = self.home / name
        return file.read_bytes() if file.exists() else b""


OTHER = {"a-box": "internet", "internet": "a-box"}


@pytest.mark.parametrize("resumes", [False, True], ids=["whole", "resumed"])
@pytest.mark.parametrize("option", ["", "-passive "], ids=["active", "passive"])
@pytest.mark.parametrize("offers", OTHER)
def test_irssi_sends_a_file(site: Site, offers: str, option: str, resumes: bool) -> None:
    """Of a file that is resumed only the rest is sent: what is there already differs, and stays."""
    sender, receiver = site.irssi[offers], site.irssi[OTHER[offers]]
    name, text, begun = f"file-{option.strip()}-{resumes}", os.urandom(300_000), bytes(100_000 * resumes)
    (sender.home / name).write_bytes(text)
    if resumes:
        (receiver.home / name).write_bytes(begun)
    sender.does(f"/dcc send {option}{receiver.nick} {name}")
    receiver.sees(rf"DCC SEND from[^:]*: {name} ")
    receiver.does(f"/dcc {'resume' if resumes else 'get'} {sender.nick} {name}")
    soon(lambda: receiver.received(name) == begun + text[len(begun) :], "all of it is there")


@pytest.mark.parametrize("offers", OTHER)
def test_irssi_chats(site: Site, offers: str) -> None:
    """Passive chats do not come about between two irssi, NAT or not: who asked takes the answer for a question."""
    one, other = site.irssi[offers], site.irssi[OTHER[offers]]
    for client in (one, other):
        client.turns_a_page()
    one.does(f"/dcc chat {other.nick}")
    other.sees("DCC CHAT from")
    other.does(f"/dcc chat {one.nick}")
    other.sees("established")
    for source, sink in ((one, other), (other, one)):
        source.does(f"/msg ={sink.nick} greetings from {source.nick}")
        sink.sees(f"greetings from {source.nick}")
    one.does(f"/dcc close chat {other.nick}")
    other.sees("DCC lost chat")
