"""Real programs at work through masq-gate, each step with its check.

A step drives its programs, asks the servers whom they saw, and returns a line for each program. It raises
LabError, saying what and why, when anything is not as on a network with a working masquerading router.
"""

import hashlib
import re
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from xdpmasq.lab.errors import LabError, wait_until
from xdpmasq.lab.lab import Lab
from xdpmasq.lab.servers import DOMAIN, DnsServer, Server, SshServer, WebServer
from xdpmasq.lab.topology import FAR, INTERNET, INTERNET_TOO, PUBLIC, TRANSIT

# All three ping with this id, so that the gateway has to tell them apart.
_PING_ID = 77
_PING_COUNT = 3
_ETHERNET_BYTES = 14


@dataclass(frozen=True)
class Line:
    """Who did what with whom, as which public endpoint, and how it went."""

    who: str
    program: str
    to: str
    seen_as: str
    result: str


@dataclass(frozen=True)
class Scene:
    """A lab with its servers running."""

    lab: Lab
    web: WebServer
    dns: DnsServer
    ssh: SshServer

    @classmethod
    def set(cls, lab: Lab) -> Self:
        return cls(lab, WebServer(lab), DnsServer(lab), SshServer(lab))

    def at_once(self, action: Callable[[Self, str], Line]) -> list[Line]:
        """Every host does the same at the same time."""
        hosts = self.lab.topology.hosts
        with ThreadPoolExecutor(len(hosts)) as pool:
            return list(pool.map(lambda host: action(self, host), hosts))


def nothing_gets_through(scene: Scene) -> list[Line]:
    """Before attach: the Internet has no way back to private addresses."""
    ping = ["ping", "-n", "-c1", "-W1", INTERNET]
    if scene.lab.exec("a-box", ping, check=False).returncode == 0:
        raise LabError("a-box reached the Internet without masquerading", "the lab leaks")
    return [Line("a-box", "ping", INTERNET, "", "no answer, as it should be")]


def download(scene: Scene) -> list[Line]:
    return scene.at_once(_download)


def _download(scene: Scene, host: str) -> Line:
    uri = f"/big?{host}"
    report = "%{stderr}%{local_ip}:%{local_port} %{size_download} %{time_total}"
    curl = scene.lab.popen(
        host,
        ["curl", "-sS", "--fail", "--max-time", "25", "--write-out", report, f"http://{INTERNET}{uri}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert curl.stdout
    assert curl.stderr
    digest = hashlib.file_digest(curl.stdout, "sha256").hexdigest()
    words = curl.stderr.read().decode().strip()
    if curl.wait() != 0:
        raise LabError(f"{host} could not download from nginx", words)
    if digest != scene.web.big_sha256:
        raise LabError(f"{host} downloaded something else than nginx served", f"its SHA-256 is {digest}")
    endpoint, size, seconds = words.split()
    result = f"{int(size) / 1e6:.0f} MB in {float(seconds):.2f} s, content right"
    return Line(f"{host} {endpoint}", "curl", f"{INTERNET}:80", _seen_as(scene.web, uri), result)


def resolve(scene: Scene) -> list[Line]:
    return scene.at_once(_resolve)


def _resolve(scene: Scene, host: str) -> Line:
    name = f"{host}.{DOMAIN}"
    answer = scene.lab.exec(
        host, ["dig", "+short", "+tries=2", "+time=2", f"@{INTERNET}", name]
    ).stdout.strip()
    if answer != INTERNET:
        raise LabError(f"{host} resolved {name} wrongly", f"dig says {answer!r} where {INTERNET} was due")
    return Line(host, "dig", f"{INTERNET}:53/udp", _seen_as(scene.dns, name), f"{name} is {answer}")


def ping(scene: Scene) -> list[Line]:
    """Three hosts with the same ICMP id; internet's wire tells as which id each of them came."""
    with scene.lab.capture("internet", "eth0", "icmp[icmptype] = icmp-echo") as requests:
        lines = scene.at_once(_ping)
        seen = dict(_ping_seen(frame) for frame in requests.stop())
    if len(set(seen.values())) != len(lines):
        raise LabError("the pinging hosts cannot be told apart outside", f"they appeared as {seen}")
    for endpoint in seen.values():
        _require_public("a ping", endpoint)
    return [Line(line.who, line.program, line.to, seen[line.who[0]], line.result) for line in lines]


def _ping(scene: Scene, host: str) -> Line:
    mark = f"{ord(host[0]):x}"
    options = ["-n", "-q", f"-c{_PING_COUNT}", "-i0.1", "-W2", f"-e{_PING_ID}", f"-p{mark}"]
    output = scene.lab.exec(host, ["ping", *options, INTERNET_TOO], check=False).stdout
    if not (found := re.search(rf"{_PING_COUNT} received.*\n.*= [\d.]+/([\d.]+)", output)):
        raise LabError(f"{host} lost pings", output.strip())
    result = f"{_PING_COUNT} of {_PING_COUNT} answered, {found[1]} ms"
    return Line(f"{host} id {_PING_ID}", "ping", INTERNET_TOO, "", result)


def _ping_seen(frame: bytes) -> tuple[str, str]:
    """Who sent an echo request (the payload is the first letter of its name), and as which endpoint."""
    ip = frame[_ETHERNET_BYTES:]
    icmp = ip[(ip[0] & 15) * 4 :]
    source = ".".join(map(str, ip[12:16]))
    return chr(frame[-1]), f"{source} id {int.from_bytes(icmp[4:6], 'big')}"


def trace(scene: Scene) -> list[Line]:
    """Routers beyond the gateway answer with ICMP errors, which must find their way back in."""
    path = ["192.168.0.1", TRANSIT, FAR]
    lines = []
    for option, kind in (("-I", "echo"), ("-U", "UDP")):
        output = scene.lab.exec("a-box", ["traceroute", "-n", option, "-q1", "-N1", "-w2", "-m6", FAR]).stdout
        hops = re.findall(r"^ *\d+  (\S+)", output, re.MULTILINE)
        if hops != path:
            raise LabError(f"traceroute {option} does not see the path", output.strip())
        lines.append(Line("a-box", f"traceroute {option}", FAR, "", f"{len(hops)} hops by {kind}, all seen"))
    return lines


def find_path_mtu(scene: Scene) -> list[Line]:
    """The narrow link lies behind transit: its "fragmentation needed" has to come through."""
    mtu = scene.lab.topology.far_mtu
    output = scene.lab.exec("c-box", ["tracepath", "-n", FAR]).stdout
    if f"Resume: pmtu {mtu} " not in output:
        raise LabError(f"the path MTU of {mtu} is not found", output.strip())
    return [Line("c-box", "tracepath", FAR, "", f"path MTU {mtu} found")]


def copy(scene: Scene) -> list[Line]:
    source = scene.web.directory / "pages" / "big"
    target = scene.ssh.directory / "copy"
    remote = f"root@{INTERNET}:{target}"
    scene.lab.exec("b-box", ["rsync", "--whole-file", "-e", scene.ssh.remote_shell, source, remote])
    with target.open("rb") as copied:
        if hashlib.file_digest(copied, "sha256").hexdigest() != scene.web.big_sha256:
            raise LabError("b-box copied a file by rsync over ssh", "its content arrived changed")
    result = f"{target.stat().st_size / 1e6:.0f} MB copied, content right"
    return [Line("b-box", "rsync over ssh", f"{INTERNET}:22", _seen_as(scene.ssh, "root"), result)]


def leave_the_gateway_alone(scene: Scene) -> list[Line]:
    """What masq-gate itself sends is not translated: nginx sees the very port that curl used."""
    uri = "/?masq-gate"
    report = ["--output", "/dev/null", "--write-out", "%{local_ip}:%{local_port}"]
    curl = ["curl", "-sS", "--fail", "--max-time", "5", *report, f"http://{INTERNET}{uri}"]
    own = scene.lab.exec("masq-gate", curl).stdout
    if (seen := _seen_as(scene.web, uri)) != own:
        raise LabError("masq-gate's own connection was translated", f"it used {own}, nginx saw {seen}")
    return [Line(f"masq-gate {own}", "curl", f"{INTERNET}:80", seen, "its own traffic is untouched")]


def _seen_as(server: Server, about: str) -> str:
    """The public endpoint of the client that asked `server` for `about`."""

    def endpoints() -> list[str]:
        return [contact.endpoint for contact in server.contacts() if contact.about == about]

    wait_until(lambda: bool(endpoints()), f"{server.name} logs {about}")
    _require_public(f"{server.name}'s client", endpoints()[-1])
    return endpoints()[-1]


def _require_public(whose: str, endpoint: str) -> None:
    if not re.match(rf"{re.escape(PUBLIC)}\b(?!\.)", endpoint):
        raise LabError(f"{whose} came as {endpoint}", f"the gateway's public address is {PUBLIC}")


@dataclass(frozen=True)
class Step:
    title: str
    run: Callable[[Scene], list[Line]]


STEPS: Sequence[Step] = (
    Step("three hosts download 20 MB each from nginx, at once", download),
    Step("three hosts ask dnsmasq, at once", resolve),
    Step("three hosts ping with one and the same id", ping),
    Step("traceroute sees every router on the way", trace),
    Step("path-MTU discovery works", find_path_mtu),
    Step("a file is copied by rsync over ssh", copy),
    Step("the gateway's own connections stay as they are", leave_the_gateway_alone),
)
