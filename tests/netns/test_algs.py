"""ALGs with real programs: vsftpd, ngircd, tftpd-hpa and sipp outside or inside, their clients on the other side.

::

    a-box .2, b-box .3 ─ lan0 masq-gate wan0 203.0.113.1 ─ internet .10 and .11

Modes: both, since what an ALG reads never flies.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from netkit import Gateway

from xdpmasq.lab import Lab
from xdpmasq.lab.servers import Server
from xdpmasq.lab.topology import INTERNET, INTERNET_TOO, PUBLIC

VSFTPD = """\
listen=YES
listen_address={address}
background=NO
anonymous_enable=YES
anon_root={files}
anon_upload_enable=YES
write_enable=YES
anon_mkdir_write_enable=YES
anon_other_write_enable=YES
no_anon_password=YES
local_enable=NO
seccomp_sandbox=NO
secure_chroot_dir={empty}
ftp_username=ftp
connect_from_port_20=YES
port_enable=YES
pasv_enable=YES
"""


class FtpServer(Server):
    """vsftpd for anonymous users, with a file to fetch and a place to put one.

    Args:
        more: lines of its configuration.
    """

    name = "vsftpd"

    def __init__(self, lab: Lab, role: str = "internet", address: str = INTERNET, more: str = "") -> None:
        super().__init__(lab, role, address)
        files, empty = self.directory / "files", self.directory / "empty"
        (files / "in").mkdir(parents=True)
        empty.mkdir()
        (files / "in").chmod(0o777)
        files.chmod(0o755)
        self.directory.chmod(0o755)
        self.given = os.urandom(3_000_000)
        (files / "given").write_bytes(self.given)
        self.taken = files / "in" / "taken"
        config = self.directory / "config"
        config.write_text(VSFTPD.format(address=address, files=files, empty=empty) + more)
        self._start(["/usr/sbin/vsftpd", config], "tcp", 21)


@pytest.fixture(
    scope="module",
    params=[pytest.param(mode, marks=pytest.mark.xdist_group(f"algs-{mode}")) for mode in ("tc", "xdp")],
)
def gateway(request: pytest.FixtureRequest) -> Iterator[Gateway]:
    with Gateway.in_new_lab(request.param) as made:
        yield made


@pytest.fixture(scope="module")
def ftp(gateway: Gateway) -> FtpServer:
    return FtpServer(gateway.lab)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


WAYS = {
    "PORT": ["--ftp-port", "-", "--disable-eprt"],
    "EPRT": ["--ftp-port", "-"],
    "PASV": ["--disable-epsv"],
    "EPSV": [],
}


@pytest.mark.parametrize("way", WAYS)
def test_ftp_client_inside(gateway: Gateway, ftp: FtpServer, way: str, tmp_path: Path) -> None:
    """Active and passive, both directions, with curl."""
    fetched = tmp_path / "fetched"
    gateway.lab.exec("a-box", ["curl", "-sS", *WAYS[way], "-o", fetched, f"ftp://{INTERNET}/given"])
    assert fetched.read_bytes() == ftp.given
    gateway.lab.exec("a-box", ["curl", "-sS", *WAYS[way], "-T", fetched, f"ftp://{INTERNET}/in/taken-{way}"])
    assert digest(ftp.taken.with_name(f"taken-{way}")) == digest(fetched)


def test_ftp_clients_at_once(gateway: Gateway, ftp: FtpServer, tmp_path: Path) -> None:
    """Active ones, of two hosts."""

    def fetch(number: int) -> bytes:
        to, way = tmp_path / str(number), ("PORT", "EPRT")[number % 3 % 2]
        gateway.lab.exec(
            ("a-box", "b-box")[number % 2], ["curl", "-sS", *WAYS[way], "-o", to, f"ftp://{INTERNET}/given"]
        )
        return to.read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(fetch, range(16))) == {ftp.given}


def test_ftp_resumes_and_appends(gateway: Gateway, ftp: FtpServer, tmp_path: Path) -> None:
    """REST and APPE, active."""
    fetched, put = tmp_path / "fetched", tmp_path / "put"
    curl = ["curl", "-sS", *WAYS["PORT"]]
    fetched.write_bytes(ftp.given[:1_000_000])
    gateway.lab.exec("a-box", [*curl, "-C", "-", "-o", fetched, f"ftp://{INTERNET}/given"])
    assert fetched.read_bytes() == ftp.given
    put.write_bytes(os.urandom(500))
    for _ in range(2):
        gateway.lab.exec("a-box", [*curl, "--append", "-T", put, f"ftp://{INTERNET}/in/twice"])
    assert ftp.taken.with_name("twice").read_bytes() == put.read_bytes() * 2


@pytest.fixture(scope="module")
def inner(gateway: Gateway) -> FtpServer:
    return FtpServer(gateway.lab, "b-box", "192.168.0.3")


@pytest.mark.parametrize("way", WAYS)
def test_ftp_server_inside(gateway: Gateway, inner: FtpServer, way: str, tmp_path: Path) -> None:
    """Behind a forward from another port; clients outside."""
    with gateway.forward("tcp", "2121", "192.168.0.3:21"):
        fetched = tmp_path / "fetched"
        gateway.lab.exec("internet", ["curl", "-sS", *WAYS[way], "-o", fetched, f"ftp://{PUBLIC}:2121/given"])
        assert fetched.read_bytes() == inner.given
        gateway.lab.exec("internet", ["curl", "-sS", *WAYS[way], "-T", fetched, f"ftp://{PUBLIC}:2121/in/{way}"])
        assert digest(inner.taken.with_name(way)) == digest(fetched)


KERNELS = """
table ip xdpmasq_test {
    ct helper ftp { type "ftp" protocol tcp; }
    chain marked { type filter hook prerouting priority filter; tcp dport 21 ct helper set "ftp"; }
    chain out { type nat hook postrouting priority srcnat; oifname "wan0" masquerade; }
}
"""


@pytest.mark.parametrize("way", ["PORT", "EPRT"])
def test_the_kernels_helper_does_the_same(way: str, tmp_path: Path) -> None:
    """nf_conntrack_ftp and nf_nat_ftp, in the same lab with the same programs."""
    with Gateway.in_new_lab("tc", attach=False) as bare:
        bare.gate("sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
        bare.lab.exec("masq-gate", ["nft", "-f", "-"], input=KERNELS)
        server = FtpServer(bare.lab)
        fetched = tmp_path / "fetched"
        bare.lab.exec("a-box", ["curl", "-sS", *WAYS[way], "-o", fetched, f"ftp://{INTERNET}/given"])
        assert fetched.read_bytes() == server.given


FIREWALL = """
table ip xdpmasq_test {
    ct helper ftp { type "ftp" protocol tcp; }
    chain marked { type filter hook prerouting priority filter; tcp dport 21 ct helper set "ftp"; }
    chain forward {
        type filter hook forward priority filter; policy drop;
        ct state established,related accept
        iifname "lan0" accept
    }
}
"""


def test_behind_a_firewall_that_lets_only_related_connections_in(
    gateway: Gateway, ftp: FtpServer, tmp_path: Path
) -> None:
    """Conntrack sees the text as the host wrote it, and who comes as the host does: so its helper fits."""
    fetched = tmp_path / "fetched"
    gateway.lab.exec("masq-gate", ["nft", "-f", "-"], input=FIREWALL)
    try:
        gateway.lab.exec("a-box", ["curl", "-sS", *WAYS["PORT"], "-o", fetched, f"ftp://{INTERNET}/given"])
    finally:
        gateway.gate("nft", "delete", "table", "ip", "xdpmasq_test")
    assert fetched.read_bytes() == ftp.given


# --- switching them


def listed(gateway: Gateway) -> dict[str, list[str]]:
    """What is on, and the ports that it reads."""
    rows = json.loads(gateway.masq("alg", "--json").stdout)["algs"]
    return {row["name"]: row["ports"] for row in rows if row["enabled"]}


@pytest.mark.req("4787-10")
@pytest.mark.req("5382-6")
def test_each_is_switched_by_itself(gateway: Gateway) -> None:
    """By default only FTP's is on, and none that reads UDP."""
    assert listed(gateway) == {"ftp": ["tcp 21"]}
    said = gateway.masq("alg", "enable", "sip", "--internal", "192.168.0.3", "--port", "udp 5060").stdout
    assert said == "sip reads udp 5060 of 192.168.0.3/32\n"
    gateway.masq("alg", "enable", "ftp", "--port", "tcp 21", "--port", "tcp 2121")
    assert listed(gateway) == {"ftp": ["tcp 21", "tcp 2121"], "sip": ["udp 5060"]}
    gateway.masq("alg", "disable", "sip")
    gateway.masq("alg", "disable", "ftp")
    assert listed(gateway) == {}
    assert gateway.masq("alg", "disable", "ftp").stdout == "ftp was not on\n"
    gateway.masq("alg", "enable", "ftp")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["enable", "nonsense"], "there is no ALG nonsense"),
        (["disable", "nonsense"], "there is no ALG nonsense"),
        (["enable", "irc", "--port", "tcp 21"], "the ALGs ftp and irc both read tcp port 21"),
        (["enable", "irc", "--port", "udp 6667"], "the ALG irc does not read udp"),
        (["enable", "irc", "--port", "tcp 0"], "the ALG irc cannot read port 0"),
        (["enable", "irc", "--port", "6667"], "no port: 6667"),
        (["enable", "irc", "--internal", "192.168.0.3/24"], "no prefix: 192.168.0.3/24"),
    ],
)
def test_what_cannot_be_meant(gateway: Gateway, words: list[str], why: str) -> None:
    refused = gateway.masq("alg", *words, check=False)
    assert (refused.returncode, why in refused.stderr) == (2, True), refused.stderr
    assert listed(gateway) == {"ftp": ["tcp 21"]}


def test_a_switch_outlives_the_agent(gateway: Gateway) -> None:
    gateway.masq("alg", "enable", "irc")
    gateway.kill_agent()
    assert set(listed(gateway)) == {"ftp", "irc"}
    gateway.masq("alg", "disable", "irc")
    gateway.attach()
    assert set(listed(gateway)) == {"ftp"}


def test_what_is_expected_is_shown(gateway: Gateway, ftp: FtpServer) -> None:
    """Until it comes, or the pinhole's time is over."""
    with gateway.tcp("a-box", (INTERNET, 21)) as talk, talk.makefile("rwb", buffering=0) as lines:
        for said in (b"USER anonymous", b"PASS x", b"PORT 192,168,0,2,200,21"):
            lines.readline()
            lines.write(said + b"\r\n")
        assert lines.readline().startswith(b"200")
        (hole,) = json.loads(gateway.masq("alg", "--json").stdout)["pinholes"]
        assert hole["internal"] == {"address": "192.168.0.2", "port": 51221}
        assert (hole["remote"]["address"], hole["sessions_left"]) == (INTERNET, 1)
        (row,) = json.loads(gateway.masq("sessions", "--state", "expected", "--json").stdout)
        assert (row["external"], row["remote"]["address"]) == (hole["external"], INTERNET)


def test_it_reads_what_hosts_of_its_prefix_say(gateway: Gateway) -> None:
    """And nothing of others."""
    gateway.masq("alg", "enable", "ftp", "--internal", "192.168.0.3")
    try:
        for role, host, is_edited in (("a-box", b"192,168,0,2", False), ("b-box", b"192,168,0,3", True)):
            said = b"PORT " + host + b",200,21\r\n"
            with gateway.listen("internet", 21, INTERNET_TOO) as door, gateway.tcp(role, (INTERNET_TOO, 21)) as near:
                far, _ = door.accept()
                with far:
                    near.sendall(said)
                    assert (far.recv(100) != said) == is_edited
    finally:
        gateway.masq("alg", "enable", "ftp")
