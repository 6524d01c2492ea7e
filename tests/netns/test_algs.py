"""ALGs with real programs: vsftpd, ngircd, tftpd-hpa and sipp outside or inside, their clients on the other side.

::

    a-box .2, b-box .3 ─ lan0 masq-gate wan0 203.0.113.1 ─ internet .10 and .11

Modes: both, since what an ALG reads never flies.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from netkit import Gateway

from xdpmasq.lab import Lab
from xdpmasq.lab.servers import Server
from xdpmasq.lab.topology import INTERNET, PUBLIC

VSFTPD = """\
listen=YES
listen_address={address}
background=NO
anonymous_enable=YES
anon_root={files}
anon_upload_enable=YES
write_enable=YES
anon_mkdir_write_enable=YES
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
    """vsftpd for anonymous users, with a file to fetch and a place to put one."""

    name = "vsftpd"

    def __init__(self, lab: Lab, role: str = "internet", address: str = INTERNET) -> None:
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
        config.write_text(VSFTPD.format(address=address, files=files, empty=empty))
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
