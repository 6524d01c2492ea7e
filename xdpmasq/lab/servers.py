"""Real servers in the lab: nginx, dnsmasq, OpenSSH, iperf3 and a UDP echo, ready when a call returns.

Each tells afterwards whom it talked to, as it saw them: that is how anybody learns as which public
endpoint a host appeared. Their files are in the lab's directory and go with the lab.
"""

import hashlib
import os
import re
import shlex
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xdpmasq.lab import netns
from xdpmasq.lab.errors import LabError, wait_until
from xdpmasq.lab.lab import Lab
from xdpmasq.lab.topology import INTERNET

ECHO_PORT = 7
IPERF_PORT = 5201
DOMAIN = "lab.test"

_BIG_FILE_BYTES = 20 << 20
_LISTEN_STATE = {"tcp": "0A", "udp": "07"}  # as /proc/net/tcp and udp write it

_NGINX = """\
daemon off;
worker_processes 1;
user root;
pid {directory}/nginx.pid;
error_log stderr;
events {{ worker_connections 1024; }}
http {{
    log_format seen '$remote_addr:$remote_port $request_uri $status';
    access_log {directory}/access.log seen;
    client_body_temp_path {directory}/tmp; proxy_temp_path {directory}/tmp;
    fastcgi_temp_path {directory}/tmp; uwsgi_temp_path {directory}/tmp; scgi_temp_path {directory}/tmp;
    sendfile on;
    server {{ listen {address}:80; root {directory}/pages; }}
}}
"""

_SSHD = """\
Port 22
ListenAddress {address}
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/key.pub
AuthenticationMethods publickey
PermitRootLogin prohibit-password
UsePAM no
StrictModes no
PidFile none
LogLevel VERBOSE
"""
# sshd wants /run/sshd to exist, refuses a root account whose password is locked (as Debian's installer
# leaves it), and runs root's shell with whatever its start-up files print. `ip netns exec` has given this
# shell mounts of its own, so all three are put right for this sshd alone.
_START_SSHD = """\
mount -t tmpfs -o mode=755 tmpfs /run && mkdir /run/sshd &&
mount --bind "$1/passwd" /etc/passwd && mount --bind "$1/shadow" /etc/shadow &&
exec /usr/sbin/sshd -D -e -f "$1/config"
"""
_PASSWD = "root:x:0:0:root:{directory}:/bin/sh\nsshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n"
_SHADOW = "root:*:19000:0:99999:7:::\nsshd:*:19000:0:99999:7:::\n"


@dataclass(frozen=True)
class Client:
    """One client as a server saw it."""

    endpoint: str  # "203.0.113.1:40000"
    about: str  # what it asked for: a URI, a name, a user

    @property
    def address(self) -> str:
        return self.endpoint.rpartition(":")[0]


class Server:
    """A program that serves on one address of one role, with a directory for its files and its log."""

    name = ""

    def __init__(self, lab: Lab, role: str = "internet", address: str = INTERNET) -> None:
        self.address = address
        self.directory = lab.directory / f"{self.name}-{role}-{address}"
        self.directory.mkdir()
        self._lab = lab
        self._role = role

    def stop(self) -> None:
        self._lab.stop(self._process)

    @property
    def log(self) -> Path:
        """What the program wrote to its terminal."""
        return self.directory / "log"

    def _start(self, argv: Sequence[str | Path], protocol: str, port: int) -> None:
        """Start the program and return when it listens.

        Raises:
            LabError: it ended instead, or took more than five seconds.
        """
        with self.log.open("wb") as log:
            self._process = self._lab.popen(self._role, argv, stdout=log, stderr=log)
        wait_until(lambda: self._listens(protocol, port), f"{self.name} listens on port {port}")

    def _listens(self, protocol: str, port: int) -> bool:
        if self._process.poll() is not None:
            raise LabError(f"{self.name} did not start", self.log.read_text().strip())
        # Columns: number, local endpoint in hexadecimal (the address in host order), remote, state.
        (host_order,) = struct.unpack("=I", socket.inet_aton(self.address))
        local = f"{host_order:08X}:{port:04X}"
        with netns.entered(self._lab.namespace(self._role)):
            table = Path("/proc/thread-self/net", protocol).read_text()
        return any(row.split()[1::2][:2] == [local, _LISTEN_STATE[protocol]] for row in table.splitlines())

    def _clients(self, log: Path, pattern: re.Pattern[str]) -> list[Client]:
        return [
            Client(f"{row['address']}:{row['port']}", row["about"])
            for row in pattern.finditer(log.read_text(errors="replace"))
        ]


class WebServer(Server):
    """nginx with a page at :attr:`url` and 20 MB of random bytes at :attr:`big_url`.

    Any query string may be added to tell requests apart in :meth:`clients`.
    """

    name = "nginx"
    _SEEN = re.compile(r"^(?P<address>[\d.]+):(?P<port>\d+) (?P<about>\S+)", re.MULTILINE)

    def __init__(self, lab: Lab, role: str = "internet", address: str = INTERNET) -> None:
        super().__init__(lab, role, address)
        self.url = f"http://{address}/"
        self.big_url = f"http://{address}/big"
        self.big_sha256 = self._write_pages()
        config = self.directory / "nginx.conf"
        config.write_text(_NGINX.format(directory=self.directory, address=address))
        self._start(["nginx", "-e", "stderr", "-p", self.directory, "-c", config], "tcp", 80)

    def _write_pages(self) -> str:
        pages = self.directory / "pages"
        pages.mkdir()
        (pages / "index.html").write_text(f"<h1>Hello from {self._role}, {self.address}</h1>\n")
        content = os.urandom(_BIG_FILE_BYTES)
        (pages / "big").write_bytes(content)
        return hashlib.sha256(content).hexdigest()

    def clients(self) -> list[Client]:
        """Every request answered so far: who asked for which URI."""
        return self._clients(self.directory / "access.log", self._SEEN)


class DnsServer(Server):
    """dnsmasq, which answers for every name below lab.test with its own address, and for nothing else."""

    name = "dnsmasq"
    _SEEN = re.compile(
        r" (?P<address>[\d.]+)/(?P<port>\d+) query\[\w+\] (?P<about>\S+) from ",
    )

    def __init__(self, lab: Lab, role: str = "internet", address: str = INTERNET) -> None:
        super().__init__(lab, role, address)
        options = [
            *("--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--user=root"),
            *("--no-resolv", "--no-hosts", "--log-facility=-", "--log-queries=extra"),
            *("--bind-interfaces", f"--listen-address={address}", f"--address=/{DOMAIN}/{address}"),
        ]
        self._start(["dnsmasq", *options], "udp", 53)

    def clients(self) -> list[Client]:
        """Every query so far: who asked for which name."""
        return self._clients(self.log, self._SEEN)


class SshServer(Server):
    """OpenSSH with keys of its own; root may log in with :attr:`client`."""

    name = "sshd"
    _SEEN = re.compile(
        r"^Accepted publickey for (?P<about>\S+) from (?P<address>[\d.]+) port (?P<port>\d+)", re.MULTILINE
    )

    def __init__(self, lab: Lab, role: str = "internet", address: str = INTERNET) -> None:
        super().__init__(lab, role, address)
        for key in ("host_key", "key"):
            make_key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f"]
            subprocess.run([*make_key, str(self.directory / key)], check=True, capture_output=True)
        host_key = (self.directory / "host_key.pub").read_text()
        for file, text in {
            "known_hosts": f"{address} {host_key}",
            "config": _SSHD.format(directory=self.directory, address=address),
            "passwd": _PASSWD.format(directory=self.directory),
            "shadow": _SHADOW,
        }.items():
            (self.directory / file).write_text(text)
        self._start(["sh", "-c", _START_SSHD, "sh", self.directory], "tcp", 22)

    @property
    def client(self) -> list[str]:
        """The ssh command line up to the destination, which checks the host key and asks nothing."""
        known_hosts = f"UserKnownHostsFile={self.directory}/known_hosts"
        options = [known_hosts, "BatchMode=yes", "IdentitiesOnly=yes", "ConnectTimeout=5"]
        flags = [word for option in options for word in ("-o", option)]
        return ["ssh", "-F", "/dev/null", "-i", str(self.directory / "key"), *flags]

    @property
    def remote_shell(self) -> str:
        """:attr:`client` as rsync's ``-e`` takes it."""
        return shlex.join(self.client)

    def clients(self) -> list[Client]:
        """Every login so far."""
        return self._clients(self.log, self._SEEN)


class EchoServer(Server):
    """The UDP echo of `echo.py` on port 7."""

    name = "echo"

    def __init__(self, lab: Lab, role: str = "internet", address: str = INTERNET) -> None:
        super().__init__(lab, role, address)
        self._start([sys.executable, "-m", "xdpmasq.lab.echo", address, str(ECHO_PORT)], "udp", ECHO_PORT)


class IperfServer(Server):
    """iperf3, for one client at a time."""

    name = "iperf3"

    def __init__(self, lab: Lab, role: str = "internet", address: str = INTERNET) -> None:
        super().__init__(lab, role, address)
        self._start(["iperf3", "-s", "-B", address, "-p", str(IPERF_PORT)], "tcp", IPERF_PORT)
