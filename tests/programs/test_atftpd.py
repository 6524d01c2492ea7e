"""TFTP with atftpd at the other end of atftp and curl, outside and inside, with and without options.

::

    a-box, b-box ─ lan0 masq-gate wan0 203.0.113.1 ─ internet .10

atftpd and tftpd-hpa cannot both be installed, so it is fetched and unpacked only. Mode: tc.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from netkit import Gateway

from xdpmasq import algs
from xdpmasq.lab import Lab
from xdpmasq.lab.servers import Server
from xdpmasq.lab.topology import HOSTS, INTERNET, PUBLIC

CLIENTS = {
    "atftp": ["atftp", "{host}", "{atftp}", "--remote-file", "{remote}", "--local-file", "{local}"],
    "atftp, 1428": [
        *("atftp", "--option", "blksize 1428", "{host}"),
        *("{atftp}", "--remote-file", "{remote}", "--local-file", "{local}"),
    ],
    "curl": ["curl", "-sS", "--max-time", "10", "{curl}", "{local}", "tftp://{host}/{remote}"],
    "curl, 1428": [
        *("curl", "-sS", "--max-time", "10", "--tftp-blksize", "1428"),
        *("{curl}", "{local}", "tftp://{host}/{remote}"),
    ],
}
WAYS = {"get": {"atftp": "--get", "curl": "-o"}, "put": {"atftp": "--put", "curl": "-T"}}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("atftpd")
    fetch = "apt-get download -qq atftpd || { apt-get update -qq && apt-get download -qq atftpd; }"
    subprocess.run(["sh", "-c", fetch], cwd=folder, check=True, capture_output=True)
    (package,) = folder.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    return folder / "usr/sbin/atftpd"


class AtftpServer(Server):
    name = "atftpd"

    def __init__(self, lab: Lab, program: Path, role: str, address: str) -> None:
        super().__init__(lab, role, address)
        self.files = self.directory / "files"
        self.files.mkdir()
        options = ["--daemon", "--no-fork", "--user", "root.root", "--logfile", "-", "--bind-address", address]
        self._start([program, *options, self.files], "udp", 69)


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with Gateway.in_new_lab("tc", attach=False) as made:
        made.attach_with(algs=(algs.Use.parse("tftp"),))
        yield made


def both_ways(place: tuple[Lab, str], client: str, host: str, files: Path, folder: Path) -> None:
    """Fetches a file and puts it there again."""
    lab, role = place
    given = os.urandom(200_000)
    (files / "given").write_bytes(given)
    for way, remote in (("get", "given"), ("put", f"taken-{client[:4]}-{client[-4:]}")):
        words = {"host": host, "remote": remote, "local": folder / "local", **WAYS[way]}
        lab.exec(role, [word.format(**words) for word in CLIENTS[client]])
        assert ((folder if way == "get" else files) / ("local" if way == "get" else remote)).read_bytes() == given


@pytest.fixture(scope="module")
def outside(gateway: Gateway, program: Path) -> AtftpServer:
    return AtftpServer(gateway.lab, program, "internet", INTERNET)


@pytest.fixture(scope="module")
def inside(gateway: Gateway, program: Path) -> AtftpServer:
    return AtftpServer(gateway.lab, program, "b-box", HOSTS["b-box"])


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_inside(
    gateway: Gateway, outside: AtftpServer, client: str, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    both_ways((gateway.lab, "a-box"), client, INTERNET, outside.files, tmp_path)
    tell(f"TFTP, {client} inside with atftpd outside: 200000 bytes fetched and put")


@pytest.mark.parametrize("client", CLIENTS)
def test_a_server_inside(
    gateway: Gateway, inside: AtftpServer, client: str, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    with gateway.forward("udp", "69", f"{HOSTS['b-box']}:69"):
        both_ways((gateway.lab, "internet"), client, PUBLIC, inside.files, tmp_path)
    tell(f"TFTP, {client} outside with atftpd inside: 200000 bytes fetched and put")
