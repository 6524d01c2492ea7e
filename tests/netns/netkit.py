"""What the end-to-end tests share: xdpmasq in a lab's masq-gate, sockets in the boxes, the wire looked over.

The gateway is driven through its command line, as a user does; tables and counters are read in this process,
because starting a program for each look would make the suite slow.
"""

import contextlib
import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import zygote

from xdpmasq import attachment, bpf, datapath, forwarding, forwards, hooks, presence, tcx
from xdpmasq.config import Config, as_fields
from xdpmasq.hooks import Hook
from xdpmasq.lab import Capture, Lab, netns
from xdpmasq.lab.errors import LabError, wait_until
from xdpmasq.lab.servers import ECHO_PORT, DnsServer, IperfServer, SshServer, WebServer
from xdpmasq.lab.topology import HOSTS, INTERNET, PUBLIC, TRANSIT
from xdpmasq.net import clsact, netdev

GATE = "masq-gate"
ECHO = (INTERNET, ECHO_PORT)
CURL = ["curl", "-sS", "--fail", "--connect-timeout", "4", "--max-time", "25"]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PATIENCE_S = 90  # to attach is to compile, which takes its time when all tests do so at once

_numbers = itertools.count()
_BIG_DATAGRAM = 65535


def new_prefix() -> str:
    return f"e{os.getpid()}-{next(_numbers)}"


@dataclass(frozen=True)
class Servers:
    """In internet, on .10; an echo server also on .11 and far."""

    web: WebServer
    dns: DnsServer
    ssh: SshServer
    iperf: IperfServer


# --- the gateway -----------------------------------------------------------------------------------


class Gateway:
    """xdpmasq in masq-gate.

    Args:
        mode: "tc" or "xdp"; the lab is to be built for it.
    """

    python = sys.executable

    def __init__(self, lab: Lab, mode: str) -> None:
        self.lab, self.mode = lab, mode
        self._namespace = Path("/run/netns", lab.namespace(GATE)).stat().st_ino

    @classmethod
    @contextlib.contextmanager
    def in_new_lab(cls, mode: str, *, attach: bool = True, **topology: Any) -> Iterator[Self]:
        with Lab(new_prefix(), offloads=mode != "xdp", **topology) as lab:
            gateway = cls(lab, mode)
            try:
                if attach:
                    gateway.attach()
                yield gateway
            finally:
                # What a killed agent leaves on a real machine, where its namespace lives on, is reused.
                lab.down()
                for lock in gateway.locks:
                    lock.unlink(missing_ok=True)

    # the command line

    def masq(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """``xdpmasq …`` in masq-gate.

        Raises:
            LabError: it failed and ``check`` is set, or it took too long.
        """
        done = zygote.run(self.lab.namespace(GATE), words, PATIENCE_S)
        if check and done.returncode != 0:
            raise LabError(f"xdpmasq {' '.join(words)} failed", (done.stderr or done.stdout).strip())
        return done

    def attach(self, *options: str, lans: Sequence[str] | None = None, check: bool = True) -> str:
        """``xdpmasq attach``; returns what it said, on stderr where it failed."""
        wanted = [word for lan in lans or self.lab.topology.lan_interfaces for word in ("--lan", lan)]
        wanted += [word for wan in self.lab.topology.wan_interfaces for word in ("--wan", wan)]
        mode = () if "--mode" in options else ("--mode", self.mode)
        done = self.masq("attach", *wanted, *mode, *options, check=check)
        return done.stdout or done.stderr

    def attach_with(self, **settings: Any) -> None:
        """Attach with settings that no option and no file can name, as ``rearm_s``."""
        topology = self.lab.topology
        config = Config(topology.wan_interfaces, topology.lan_interfaces, mode=self.mode, **settings)  # type: ignore[arg-type]
        done = zygote.run(self.lab.namespace(GATE), ["attach", "--with", "settings"], PATIENCE_S, as_fields(config))
        if done.returncode != 0:
            raise LabError("xdpmasq did not start", done.stderr.strip())

    def detach(self) -> str:
        return self.masq("detach").stdout

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.masq("status", "--json").stdout))

    def sessions(self, *filters: str) -> list[dict[str, Any]]:
        return list(json.loads(self.masq("sessions", "list", "--json", *filters).stdout))

    # looking inside

    def inside(self, role: str = GATE) -> contextlib.AbstractContextManager[None]:
        """This process works in a box."""
        return netns.entered(self.lab.namespace(role))

    @property
    def tables(self) -> datapath.Attached:
        """The running datapath."""
        with self.inside():
            return datapath.find()

    @property
    def is_attached(self) -> bool:
        with self.inside():
            return bool(datapath.find_all())

    @property
    def agent_pid(self) -> int | None:
        with self.inside():
            return presence.agent_pid("wan0")

    @property
    def locks(self) -> list[Path]:
        """Files by which xdpmasq's processes in masq-gate know of each other."""
        return list(presence.RUN.glob(f"xdpmasq-{self._namespace}-*"))

    def kill_agent(self) -> None:
        """kill -9, and until it is gone."""
        pid = self.agent_pid
        assert pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: self.agent_pid is None, "the agent is dead")

    def die_at(self, step: str, call: int) -> None:
        """Attaches by an agent that is killed at that call of a function, ``xdp.attach``, half way."""
        program = _DIE.format(step=step, call=call, mode=self.mode)
        assert self.lab.exec(GATE, [self.python, "-c", program], check=False).returncode == -signal.SIGKILL
        assert self.agent_pid is None
        assert self.is_attached

    def counters(self) -> dict[str, int]:
        return self.tables.counters()

    @contextlib.contextmanager
    def counting(self) -> Iterator[dict[str, int]]:
        """Fills the dictionary with what each counter grew by inside the block."""
        grown: dict[str, int] = {}
        before = self.counters()
        yield grown
        grown |= {name: count - before[name] for name, count in self.counters().items()}

    def mappings(self) -> dict[str, str]:
        """Internal endpoint → external endpoint of every session, "192.168.0.2:1" → "203.0.113.1:2"."""
        with self.inside():
            attached = datapath.find()
        rows = attached.sessions[attached.live_slots()]
        return {
            _endpoint(row["in"]["new_addr"], row["in"]["new_port"]): _endpoint(
                row["out"]["new_addr"], row["out"]["new_port"]
            )
            for row in rows
        }

    def hooks(self) -> dict[str, str]:
        """Interface → hook, by the manifest."""
        return {each["name"]: each["hook"] for each in self.tables.manifest["interfaces"]}

    def on(self, interface: str) -> set[str]:
        """The hooks of an interface that have a program of ours, TC's by TCX or clsact."""
        with self.inside():
            link = netdev.link(interface)
            here = {("xdp", link.xdp_prog_id)} if link.xdp_prog_id else set()
            here |= {(hook, number) for hook in hooks.TC for number in tcx.programs(link.index, hook)}
            here |= {(each.direction, each.prog_id) for each in clsact.filters(link.index)}
            return {hook for hook, number in here if bpf.Program.by_id(number).name.startswith(hooks.PROGRAM)}

    def take_off(self, interface: str, *hooks: str) -> None:
        """Somebody takes our programs off these hooks."""
        with self.inside():
            kept = [kind for kind in ("xdp", "ingress", "egress") if kind not in hooks]
            attachment.clear(netdev.link(interface), keep=tuple(Hook(kind, "") for kind in kept))  # type: ignore[arg-type]

    # masq-gate and its neighbours

    def gate(self, *argv: str, check: bool = True) -> str:
        """A program in masq-gate; its output."""
        return self.lab.exec(GATE, argv, check=check).stdout

    def sysctl(self, name: str, value: object = None) -> str:
        """A sysctl of masq-gate, after setting it when a value is given."""
        if value is not None:
            self.gate("sysctl", "-qw", f"{name}={value}")
        return self.gate("sysctl", "-n", name).strip()

    # forwards

    @contextlib.contextmanager
    def forward(self, protocol: str, ports: str, *targets: str, source: str = "") -> Iterator[forwards.Rule]:
        """A forward is in place inside the block; what ran by it ends with it."""
        tables, rule = self.tables, forwards.parse(protocol, ports, list(targets), source)
        forwarding.put(tables, tables.reaper, rule)
        try:
            yield rule
        finally:
            for placed in forwarding.read(tables):
                if placed.rule == rule:
                    forwarding.take(tables, tables.reaper, placed)
            tables.flush(tables.live_slots())

    @contextlib.contextmanager
    def settings(self, **fields: Any) -> Iterator[None]:
        """The programs are told something else inside the block; the agent knows nothing of it."""
        tables = self.tables
        before = tables.settings.copy()
        tables.set_settings(**fields)
        try:
            yield
        finally:
            tables.set_settings(**{name: before[name] for name in fields})

    def way_through_lo(self) -> None:
        """Waits until the agent has noticed a forward, and the gateway itself can ask for it.

        The program may still be there of an earlier forward, and on its way out.
        """
        tables = self.tables
        last = int(tables.settings["heartbeat"])
        soon(lambda: int(tables.settings["heartbeat"]) != last, "the agent's next tick", timeout_s=5)
        soon(lambda: self.on("lo") == {"egress"}, "lo has its program", timeout_s=5)
        soon(lambda: self.sysctl("net.ipv4.conf.lo.accept_local") == "1", "lo takes what comes back", timeout_s=5)

    # sockets

    def udp(self, role: str, port: int = 0, *, address: str = "0.0.0.0", timeout_s: float = 2) -> socket.socket:
        """A UDP socket in a box, bound to a port; the caller closes it."""
        made = self.lab.socket(role, socket.SOCK_DGRAM)
        made.settimeout(timeout_s)
        made.bind((address, port))
        return made

    def seen_as(self, role: str, port: int = 0, server: tuple[str, int] = ECHO) -> str:
        """The endpoint as which a box's new UDP socket appears at an echo server."""
        with self.udp(role, port) as client:
            return who(client, server)

    def tcp(self, role: str, server: tuple[str, int], *, timeout_s: float = 5) -> socket.socket:
        """A connected TCP socket in a box."""
        made = self.lab.socket(role, socket.SOCK_STREAM)
        made.settimeout(timeout_s)
        made.connect(server)
        return made

    def listen(self, role: str, port: int = 0, address: str = "0.0.0.0") -> socket.socket:
        """A listening TCP socket in a box."""
        made = self.lab.socket(role, socket.SOCK_STREAM)
        made.settimeout(5)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, port))
        made.listen(16)
        return made

    def opens(self, role: str = "a-box", server: tuple[str, int] = ECHO) -> bool:
        """Whether a new UDP session gets through, at the first try."""
        with self.udp(role) as client:
            return answers(client, server)

    def connection(self, role: str = "a-box") -> "Connection":
        """An established TCP connection to a socket of our own in internet."""
        with self.listen("internet", address=INTERNET) as listener:
            near = self.tcp(role, (INTERNET, listener.getsockname()[1]))
            far, peer = listener.accept()
        far.settimeout(5)
        return Connection(near, far, f"{peer[0]}:{peer[1]}")

    # the network changes

    def readdress(self, *addresses: str) -> None:
        """wan0 gets these addresses in place of what it had, and its route again, as a DHCP client does it."""
        lines = ["address flush dev wan0", *(f"address add {each} dev wan0" for each in addresses)]
        lines += [f"route add default via {TRANSIT} dev wan0"] if addresses else []
        netns.ip_batch(lines, self.lab.namespace(GATE))

    def set_mac(self, role: str, mac: str) -> None:
        """A box's eth0 gets another MAC, as by a new network card; nobody is told. Routes are kept."""
        default = self.lab.exec(role, ["ip", "route", "show", "default"]).stdout.split()
        self.lab.exec(role, ["ip", "link", "set", "eth0", "down"])
        self.lab.exec(role, ["ip", "link", "set", "eth0", "address", mac, "up"])
        if default:
            self.lab.exec(role, ["ip", "route", "replace", *default])

    def announce(self, role: str, address: str, mac: str) -> None:
        """Gratuitous ARP, as a box sends it that has a new MAC or has taken over an address."""
        own, ip = bytes.fromhex(mac.replace(":", "")), socket.inet_aton(address)
        arp = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + own + ip + bytes(6) + ip
        with self.lab.socket(role, socket.SOCK_RAW, socket.AF_PACKET) as wire, self.inside(role):
            wire.bind(("eth0", 0))
            wire.send(b"\xff" * 6 + own + b"\x08\x06" + arp)


_DIE = """
import os, signal
from xdpmasq import daemon, tcx
from xdpmasq.net import clsact, sysctl, xdp
from xdpmasq.config import Config
real, calls = {step}, []
def step(*args, **named):
    calls.append(args)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **named)
{step} = step
daemon.run(Config(("wan0",), ("lan0",), mode="{mode}"))
"""


class Connection:
    """Both ends of a TCP connection through the gateway; ``public`` is the near end as seen from outside."""

    def __init__(self, near: socket.socket, far: socket.socket, public: str) -> None:
        self.near, self.far, self.public = near, far, public

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.near.close()
        self.far.close()

    def talk(self, times: int = 1, size: int = 1000) -> None:
        """Bytes to and fro; raises when any is lost or changed."""
        for number in range(times):
            for source, sink in ((self.near, self.far), (self.far, self.near)):
                text = bytes([number % 256]) * size
                source.sendall(text)
                assert read(sink, size) == text


def written(endpoint: tuple[str, int]) -> str:
    return f"{endpoint[0]}:{endpoint[1]}"


def name_of(stream: socket.socket) -> str:
    return written(stream.getsockname())


@dataclass(frozen=True)
class Meeting:
    """As what two programs know each other.

    Attributes:
        client: the client's own name; seen: what the server calls it.
        server: the server's own name; called: what the client calls it.
    """

    client: str
    seen: str
    server: str
    called: str


def meet_tcp(gateway: Gateway, box: str, called: tuple[str, int], host: str, port: int) -> Meeting:
    """A program in a box connects, and a server on a port of a host answers; bytes arrive in both directions."""
    with gateway.listen(host, port) as listener, gateway.tcp(box, called) as near:
        far, peer = listener.accept()
        with far, ThreadPoolExecutor(1) as pool:
            far.settimeout(5)
            for source, sink in ((near, far), (far, near)):
                text = os.urandom(200_000)
                sending = pool.submit(source.sendall, text)
                assert read(sink, len(text)) == text
                sending.result(timeout=5)
            return Meeting(name_of(near), written(peer), name_of(far), written(near.getpeername()))


def meet_udp(gateway: Gateway, box: str, called: tuple[str, int], host: str, port: int) -> Meeting:
    """The same by datagrams, several."""
    address = HOSTS.get(host, PUBLIC)
    with gateway.udp(host, port, address=address) as far, gateway.udp(box) as near:
        near.connect(called)
        for number in range(5):
            near.send(b"to %d" % number)
            text, peer = far.recvfrom(100)
            assert text == b"to %d" % number
            far.sendto(b"fro %d" % number, peer)
            assert near.recv(100) == b"fro %d" % number
        return Meeting(name_of(near), written(peer), name_of(far), written(near.getpeername()))


MEET = {"tcp": meet_tcp, "udp": meet_udp}


def read(stream: socket.socket, size: int) -> bytes:
    """Exactly that many bytes, or fewer at the end of the stream."""
    parts = b""
    while len(parts) < size and (part := stream.recv(size - len(parts))):
        parts += part
    return parts


def ask(client: socket.socket, text: bytes, server: tuple[str, int] = ECHO) -> bytes:
    client.sendto(text, server)
    answer, source = client.recvfrom(_BIG_DATAGRAM)
    assert source == server
    return answer


def answers(client: socket.socket, server: tuple[str, int] = ECHO) -> bool:
    """Whether one datagram comes back soon."""
    patience, text = client.gettimeout(), os.urandom(8)
    client.settimeout(0.2)
    try:
        client.sendto(text, server)
        while client.recv(_BIG_DATAGRAM) != text:  # a late answer to an earlier call
            pass
        return True
    except OSError:
        return False
    finally:
        client.settimeout(patience)


def who(client: socket.socket, server: tuple[str, int] = ECHO) -> str:
    """The endpoint as which the server saw the client."""
    return ask(client, b"who", server).decode()


def seen(client: socket.socket) -> str:
    """Like :func:`who`, or "" when no answer comes soon."""
    patience = client.gettimeout()
    client.settimeout(0.2)
    try:
        return who(client)
    except OSError:
        return ""
    finally:
        client.settimeout(patience)


def internal(role: str, client: socket.socket) -> str:
    return f"{HOSTS[role]}:{client.getsockname()[1]}"


def _endpoint(addr: Any, port: Any) -> str:
    return f"{IPv4Address(np.asarray(addr['word'])[:1].tobytes())}:{socket.ntohs(int(port))}"


class Stream:
    """Sequence-numbered datagrams from a box to the echo server and back, in the background of a test.

    Args:
        gap_s: between two datagrams.
    """

    def __init__(self, gateway: Gateway, role: str = "a-box", *, gap_s: float = 0.002) -> None:
        self._lab = gateway.lab
        self._process = gateway.lab.popen(
            role,
            [sys.executable, "-c", _STREAM, INTERNET, str(ECHO_PORT), str(gap_s)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._process.stdout
        assert self._process.stdout.readline() == b"flowing\n"

    def stop(self) -> int:
        """Ends it; returns how many datagrams were lost."""
        self._process.terminate()
        output, complaint = self._process.communicate(timeout=10)
        assert output, complaint.decode()
        sent, received = map(int, output.split())
        return sent - received


_STREAM = """
import selectors, signal, socket, sys, time
host, port, gap = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
stopping = []
signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.connect((host, port))
s.settimeout(gap)
seen, sent = set(), 0
def receive(until):
    while time.monotonic() < until:
        try:
            seen.add(int(s.recv(100)))
        except TimeoutError:
            pass
        if len(seen) == sent and stopping:
            break
while not stopping:
    s.send(b"%d" % sent)
    sent += 1
    receive(time.monotonic() + gap)
    if sent == 10:
        print("flowing", flush=True)
receive(time.monotonic() + 1)
print(sent, len(seen))
"""


# --- packets of our own making ---------------------------------------------------------------------


def raw(gateway: Gateway, role: str, protocol: int, *, timeout_s: float = 2) -> socket.socket:
    """A raw socket in a box: sends whole IP packets, receives them put together from their fragments."""
    with gateway.inside(role):
        made = socket.socket(socket.AF_INET, socket.SOCK_RAW, protocol)
    made.setsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    made.settimeout(timeout_s)
    return made


def receive(listener: socket.socket, fits: Callable[[bytes], bool]) -> bytes:
    """The next IP packet that fits.

    Raises:
        TimeoutError: none came.
    """
    deadline = time.monotonic() + (listener.gettimeout() or 0)
    while time.monotonic() < deadline:
        packet = listener.recv(_BIG_DATAGRAM)
        if fits(packet):
            return packet
    raise TimeoutError


# --- the wire --------------------------------------------------------------------------------------

PRIVATE = [IPv4Network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")]
# What the kernel is to sort out; quotes, whose headers may have options, are looked at by leaks().
_SUSPECT = "net 10.0.0.0/8 or net 172.16.0.0/12 or net 192.168.0.0/16 or icmp"


class Wire:
    """A watch over the public wires; :meth:`check` raises when a private address was on one."""

    def __init__(self, lab: Lab) -> None:
        self._captures: list[tuple[Capture, bool]] = [
            (lab.capture(role, interface, _SUSPECT), interface != "ppp0")
            for role, interface in lab.topology.wan_wires
        ]

    def check(self) -> None:
        frames = [(frame, ethernet) for capture, ethernet in self._captures for frame in capture.stop()]
        leaking = [frame.hex(" ") for frame, ethernet in frames if leaks(frame, ethernet)]
        assert not leaking, f"{len(leaking)} frames with private addresses: {leaking[0]}"


def leaks(frame: bytes, ethernet: bool = True) -> bool:
    """Whether a private address stands in a frame: ARP's, IP's own or those of a packet quoted by ICMP."""
    kind, packet = (frame[12:14], frame[14:]) if ethernet else (b"\x08\x00", frame)
    if kind == b"\x08\x06":
        return _is_private(packet[14:18]) or _is_private(packet[24:28])
    return kind == b"\x08\x00" and _ip_leaks(packet)


def _ip_leaks(packet: bytes) -> bool:
    if _is_private(packet[12:16]) or _is_private(packet[16:20]):
        return True
    if packet[6] & 0x1F or packet[7]:  # of a later fragment nothing else can be told
        return False
    icmp = packet[(packet[0] & 15) * 4 :]
    is_error = packet[9] == socket.IPPROTO_ICMP and icmp[:1] in (b"\x03", b"\x0b", b"\x0c", b"\x05")
    return is_error and len(icmp) >= 28 and _ip_leaks(icmp[8:])


def _is_private(address: bytes) -> bool:
    return any(IPv4Address(address) in network for network in PRIVATE)


# --- the kernel's own rules ------------------------------------------------------------------------


@contextlib.contextmanager
def rules(gateway: Gateway, chains: str) -> Iterator[None]:
    """These chains are in force in masq-gate, in a table called test."""
    gateway.lab.exec(GATE, ["nft", "-f", "-"], input=f"table inet test {{\n{chains}\n}}")
    try:
        yield
    finally:
        gateway.gate("nft", "delete", "table", "inet", "test")


def chain(*lines: str) -> str:
    """A forward chain of these rules, for :func:`rules`."""
    return "chain forward { type filter hook forward priority filter;\n" + "\n".join(lines) + "\n}"


# --- odds and ends ---------------------------------------------------------------------------------


def soon(question: Callable[[], bool], what: str, timeout_s: float = 15) -> None:
    """Waits until it is so; looks less often than :func:`wait_until`, as the looks are dear."""
    deadline = time.monotonic() + timeout_s
    while not question():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s in vain until {what}"
        time.sleep(0.05)


def strangers_program(kind: str, verdict: int) -> bpf.Program:
    """``return verdict;``"""
    return_verdict = struct.pack("<BBhiBBhi", 0xB7, 0, 0, verdict, 0x95, 0, 0, 0)
    return bpf.Program(bpf._load(return_verdict, bpf.PROG_TYPES[kind], "somebody"))


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    """Memory that a process holds in whatever way, the kernel's tables that it maps included: VmRSS."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def own_bytes(pid: int) -> int:
    """Memory that a process has for itself: without the kernel's tables, which it maps, and without libraries."""
    _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def ip_checksum(header: bytes) -> int:
    total = sum(struct.unpack(f"!{len(header) // 2}H", header))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
