"""Real programs at work through masq-gate, each step with its check.

A step drives its programs, asks the servers whom they saw, and tells its outcome. It raises LabError, saying
what and why, when anything is not as on a network with a working masquerading router.
"""

import hashlib
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Self

from xdpmasq.lab.errors import LabError, wait_until
from xdpmasq.lab.lab import Lab
from xdpmasq.lab.servers import DOMAIN, DnsServer, SshServer, WebServer
from xdpmasq.lab.topology import FAR, HOSTS, INTERNET, INTERNET_TOO, PUBLIC, TRANSIT

# All hosts use this port and id, so that the gateway has to tell them apart.
_SAME_PORT = 40053
_SAME_ID = 77
_PING_COUNT = 3
_CURL = ["curl", "-sS", "--fail", "--connect-timeout", "4", "--max-time", "25"]
_ETHERNET_BYTES = 14


@dataclass(frozen=True)
class Contact:
    """Who used which program, from which internal endpoint, seen as which public one, to reach what."""

    who: str
    program: str
    internal: str
    public: str
    to: str


@dataclass(frozen=True)
class Outcome:
    """What a step found: in words, and whom the servers saw, where they can tell."""

    words: str
    contacts: Sequence[Contact] = ()


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

    def at_once(self, action: Callable[[Self, str], Contact]) -> list[Contact]:
        """Every host does the same at the same time."""
        hosts = self.lab.topology.hosts
        with ThreadPoolExecutor(len(hosts)) as pool:
            return list(pool.map(lambda host: action(self, host), hosts))


def fail_untranslated(scene: Scene) -> Outcome:
    """Before attach: the Internet has no way back to private addresses."""
    ping = ["ping", "-n", "-c1", "-W1", INTERNET]
    if scene.lab.exec("a-box", ping, check=False).returncode == 0:
        raise LabError("a-box reached the Internet without masquerading", "the lab leaks")
    return Outcome("no answer to a ping, as it should be")


def download(scene: Scene) -> Outcome:
    started = time.monotonic()
    contacts = scene.at_once(_download)
    seconds = time.monotonic() - started
    return Outcome(f"all content right, {seconds:.2f} s", contacts)


def _download(scene: Scene, host: str) -> Contact:
    uri = f"/big?{host}"
    report = "%{stderr}%{local_ip}:%{local_port}"
    curl = scene.lab.popen(
        host,
        [*_CURL, "--write-out", report, f"http://{INTERNET}{uri}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    content, words = curl.communicate()
    if curl.returncode != 0:
        raise LabError(f"{host} could not download from nginx", words.decode().strip())
    if hashlib.sha256(content).hexdigest() != scene.web.big_sha256:
        raise LabError(f"{host} downloaded something else than nginx served", f"{len(content)} bytes came")
    return Contact(host, "curl", words.decode(), _seen_as(scene.web, uri), f"{INTERNET}:80")


def resolve(scene: Scene) -> Outcome:
    return Outcome("all answers right", scene.at_once(_resolve))


def _resolve(scene: Scene, host: str) -> Contact:
    name = f"{host}.{DOMAIN}"
    own = HOSTS[host]
    options = ["+short", "+tries=2", "+time=2", f"-b{own}#{_SAME_PORT}", f"@{INTERNET}"]
    answer = scene.lab.exec(host, ["dig", *options, name]).stdout.strip()
    if answer != INTERNET:
        raise LabError(f"{host} resolved {name} wrongly", f"dig says {answer!r} where {INTERNET} was due")
    return Contact(host, "dig", f"{own}:{_SAME_PORT}", _seen_as(scene.dns, name), f"{INTERNET}:53")


def ping(scene: Scene) -> Outcome:
    """Three hosts with the same ICMP id; internet's wire tells as which id each of them came."""
    with scene.lab.capture("internet", "eth0", "icmp[icmptype] = icmp-echo") as requests:
        contacts = scene.at_once(_ping)
        seen = dict(_ping_seen(frame) for frame in requests.stop())
    if len(set(seen.values())) != len(contacts):
        raise LabError("the pinging hosts cannot be told apart outside", f"they appeared as {seen}")
    for endpoint in seen.values():
        _require_public("a ping", endpoint)
    return Outcome("all answered", [replace(contact, public=seen[contact.who[0]]) for contact in contacts])


def _ping(scene: Scene, host: str) -> Contact:
    mark = f"{ord(host[0]):x}"
    options = ["-n", "-q", f"-c{_PING_COUNT}", "-i0.1", "-W2", f"-e{_SAME_ID}", f"-p{mark}"]
    output = scene.lab.exec(host, ["ping", *options, INTERNET_TOO], check=False).stdout
    if f" {_PING_COUNT} received" not in output:
        raise LabError(f"{host} lost pings", output.strip())
    return Contact(host, "ping", f"{HOSTS[host]} id {_SAME_ID}", "", INTERNET_TOO)


def _ping_seen(frame: bytes) -> tuple[str, str]:
    """Who sent an echo request (its payload repeats the first letter of the name), as which endpoint."""
    ip = frame[_ETHERNET_BYTES:]
    icmp = ip[(ip[0] & 15) * 4 :]
    source = ".".join(map(str, ip[12:16]))
    return chr(frame[-1]), f"{source} id {int.from_bytes(icmp[4:6], 'big')}"


def trace(scene: Scene) -> Outcome:
    """Routers beyond the gateway answer with ICMP errors, which must find their way back in."""
    path = ["192.168.0.1", TRANSIT, FAR]
    for option in ("-I", "-U"):
        output = scene.lab.exec("a-box", ["traceroute", "-n", option, "-q1", "-N1", "-w2", "-m6", FAR]).stdout
        hops = re.findall(r"^ *\d+  (\S+)", output, re.MULTILINE)
        if hops != path:
            raise LabError(f"traceroute {option} does not see the path", output.strip())
    return Outcome(f"by echo and by UDP: {' → '.join(path)}")


def find_path_mtu(scene: Scene) -> Outcome:
    """The narrow link lies behind transit: its "fragmentation needed" has to come through."""
    mtu = scene.lab.topology.far_mtu
    output = scene.lab.exec("c-box", ["tracepath", "-n", FAR]).stdout
    if f"Resume: pmtu {mtu} " not in output:
        raise LabError(f"the path MTU of {mtu} is not found", output.strip())
    return Outcome(f"tracepath finds {mtu}")


def copy(scene: Scene) -> Outcome:
    source = scene.web.directory / "pages" / "big"
    target = scene.ssh.directory / "copy"
    remote = f"root@{INTERNET}:{target}"
    scene.lab.exec("b-box", ["rsync", "--whole-file", "-e", scene.ssh.remote_shell, source, remote])
    if hashlib.sha256(target.read_bytes()).hexdigest() != scene.web.big_sha256:
        raise LabError("b-box copied a file by rsync over ssh", "its content arrived changed")
    public = _seen_as(scene.ssh, "root")
    return Outcome("content right", [Contact("b-box", "rsync", HOSTS["b-box"], public, f"{INTERNET}:22")])


def leave_the_gateway_alone(scene: Scene) -> Outcome:
    """What masq-gate itself sends is not translated: nginx sees the very port that curl used.

    It is none that a host's kernel chooses by itself: what has taken the same may have made a translation necessary.
    """
    uri = "/?masq-gate"
    report = ["--local-port", "61000-62000", "--output", "/dev/null", "--write-out", "%{local_ip}:%{local_port}"]
    own = scene.lab.exec("masq-gate", [*_CURL, *report, f"http://{INTERNET}{uri}"]).stdout
    if (seen := _seen_as(scene.web, uri)) != own:
        raise LabError("masq-gate's own connection was translated", f"it used {own}, nginx saw {seen}")
    return Outcome("nginx saw curl's own port", [Contact("masq-gate", "curl", own, seen, f"{INTERNET}:80")])


def _seen_as(server: WebServer | DnsServer | SshServer, about: str) -> str:
    """The public endpoint of the client that asked `server` for `about`."""

    def endpoints() -> list[str]:
        return [client.endpoint for client in server.clients() if client.about == about]

    wait_until(lambda: bool(endpoints()), f"{server.name} logs {about}")
    _require_public(f"{server.name}'s client", endpoints()[-1])
    return endpoints()[-1]


def _require_public(whose: str, endpoint: str) -> None:
    if re.split("[: ]", endpoint)[0] != PUBLIC:
        raise LabError(f"{whose} came as {endpoint}", f"the gateway's public address is {PUBLIC}")


@dataclass(frozen=True)
class Step:
    title: str
    run: Callable[[Scene], Outcome]


BEFORE = Step("without masquerading nobody gets through", fail_untranslated)
STEPS: Sequence[Step] = (
    Step("three hosts download 20 MB each from nginx, at once", download),
    Step("three hosts ask dnsmasq from one and the same port, at once", resolve),
    Step("three hosts ping with one and the same id, at once", ping),
    Step("traceroute sees every router", trace),
    Step("path-MTU discovery works", find_path_mtu),
    Step("20 MB are copied by rsync over ssh", copy),
    Step("the gateway's own connections stay as they are", leave_the_gateway_alone),
)
