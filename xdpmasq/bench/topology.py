"""The bench's own network: three namespaces in a row, and nothing outside them.

::

    <name>-lan                 <name>-gate                          <name>-wan
    256 hosts 10.18.1.x        10.18.0.1/16      203.0.113.16/24    198.18.0.0/15 behind 203.0.113.2
    generate_out ─▶ lan0 ───── lan0 [contestant] wan0 ───── wan0 ─▶ sink_out
         sink_in ◀─                                              ◀─ generate_in
    sockets on 10.18.0.2                                            sockets on 203.0.113.2

Hosts and remotes exist only as addresses in frames; where sockets talk (latency, TCP), it is the two addresses below.
All neighbours are permanent, IPv6 is off, so that the traffic of a round is the only traffic there is. A further pair
in <name>-lan, held0 and held1, carries no traffic: it only holds the generators' programs (see generator.py).
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from xdpmasq.errors import HostError, MasqError
from xdpmasq.lab import netns
from xdpmasq.net import xdp

Role = Literal["lan", "gate", "wan"]
ROLES: tuple[Role, ...] = ("lan", "gate", "wan")

HOSTS, REMOTES = 256, 64
MOST_EXTERNALS = 16
MOST_FLOWS = 1 << 20
HOST_BASE = int(ipaddress.IPv4Address("10.18.1.0"))
REMOTE_BASE = int(ipaddress.IPv4Address("198.18.0.0"))  # for benchmarks: RFC 2544
PUBLIC_ADDR = ipaddress.IPv4Address("203.0.113.16")  # the first of up to 16
LAN_SOCKETS, WAN_SOCKETS = "10.18.0.2", "203.0.113.2"
HOST_PORT, REMOTE_PORT = 10000, 9000
TTL = 64  # of frames, and Linux's default for sockets

# Of each veth, by (namespace, interface).
MACS: dict[tuple[Role, str], str] = {
    ("lan", "lan0"): "02:6d:61:73:71:01",
    ("gate", "lan0"): "02:6d:61:73:71:02",
    ("gate", "wan0"): "02:6d:61:73:71:03",
    ("wan", "wan0"): "02:6d:61:73:71:04",
}

# The ends of the veths that are not the gateway's; there they have the same names.
_OUTER: tuple[tuple[Role, str], ...] = (("lan", "lan0"), ("wan", "wan0"))
_PORTS: tuple[tuple[Role, str], ...] = (*_OUTER, ("gate", "lan0"), ("gate", "wan0"))

_LAN_COMMANDS = (
    "link set lan0 up",
    f"addr add {LAN_SOCKETS}/16 dev lan0",
    f"neigh add 10.18.0.1 lladdr {MACS['gate', 'lan0']} dev lan0 nud permanent",
    "route add default via 10.18.0.1",
)
_WAN_COMMANDS = (
    "link set wan0 up",
    f"addr add {WAN_SOCKETS}/24 dev wan0",
    *(
        f"neigh add {PUBLIC_ADDR + nth} lladdr {MACS['gate', 'wan0']} dev wan0 nud permanent"
        for nth in range(MOST_EXTERNALS)
    ),
    f"route add 10.18.0.0/16 via {PUBLIC_ADDR}",  # for those that do not translate
)


@dataclass(frozen=True)
class Answer:
    """What a command printed, and how it ended."""

    output: str
    code: int


def endpoints(externals: int) -> int:
    """How many endpoints inside so many public addresses have ports for.

    One address has some 36,000 ports outside the gateway's own. Of several each host keeps one.
    """
    return 30_000 if externals == 1 else 25_000 * externals


def public_addresses(externals: int) -> list[ipaddress.IPv4Address]:
    """What hosts are translated to."""
    return [PUBLIC_ADDR + nth for nth in range(externals)]


def defines(externals: int) -> dict[str, object]:
    """The plan of addresses for the C of ``traffic.c``."""
    return {
        "HOSTS": HOSTS,
        "REMOTES": REMOTES,
        "EXTERNALS": externals,
        "ENDPOINTS": endpoints(externals),
        "MOST_FLOWS": MOST_FLOWS,
        "HOST_BASE": f"{HOST_BASE:#x}",
        "REMOTE_BASE": f"{REMOTE_BASE:#x}",
        "PUBLIC_ADDR": f"{int(PUBLIC_ADDR):#x}",
        "HOST_PORT": HOST_PORT,
        "REMOTE_PORT": REMOTE_PORT,
        "TTL": TTL,
    }


def mac_words(role: Role, interface: str) -> list[int]:
    """A MAC as the three 16-bit words that the C compares."""
    raw = bytes.fromhex(MACS[role, interface].replace(":", ""))
    return [int.from_bytes(raw[at : at + 2], "little") for at in (0, 2, 4)]


class Topology:
    """A context manager: the network exists inside it, and is gone after it whatever happened.

    Args:
        name: with which the namespaces' names begin.
        externals: how many public addresses the gateway has.

    Raises:
        HostError: not root, or a tool is missing.
    """

    def __init__(self, name: str, externals: int = 1) -> None:
        self.name = name
        self.externals = externals

    def namespace(self, role: Role) -> str:
        return f"{self.name}-{role}"

    @property
    def namespaces(self) -> list[str]:
        return [self.namespace(role) for role in ROLES]

    def __enter__(self) -> Topology:
        if taken := [name for name in self.namespaces if netns.exists(name)]:
            raise HostError("the bench cannot build its network", f"{taken[0]} exists", "remove it, or wait")
        try:
            self._build()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Ends the processes in the namespaces and deletes these; harmless when they are not there."""
        netns.end_processes(self.namespaces)
        netns.delete(self.namespaces)

    @contextlib.contextmanager
    def inside(self, role: Role) -> Iterator[None]:
        """The calling thread works in that namespace."""
        with netns.entered(self.namespace(role)):
            yield

    def index(self, role: Role, interface: str) -> int:
        with self.inside(role):
            return socket.if_nametoindex(interface)

    def run(self, role: Role, command: Sequence[str], stdin: str = "", timeout_s: float = 60.0) -> str:
        """Runs a command in a namespace, as a user would with ``ip netns exec``; its output.

        Raises:
            MasqError: it failed or took too long; with its own last words.
        """
        answer = self.try_run(role, command, stdin, timeout_s)
        if answer.code != 0:
            raise MasqError(f"`{' '.join(command)}` failed in {self.namespace(role)}", answer.output[-2000:])
        return answer.output

    def try_run(self, role: Role, command: Sequence[str], stdin: str = "", timeout_s: float = 60.0) -> Answer:
        """Like :meth:`run`, for commands that may fail."""
        argv = ["ip", "netns", "exec", self.namespace(role), *command]
        try:
            ended = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False)
        except FileNotFoundError as error:
            raise HostError("iproute2 is missing", str(error), "apt install iproute2") from error
        except subprocess.TimeoutExpired:
            return Answer(f"no end after {timeout_s:g} s", 124)
        return Answer((ended.stdout + ended.stderr).strip(), ended.returncode)

    def _build(self) -> None:
        netns.ip_batch(f"netns add {name}" for name in self.namespaces)
        for role in ROLES:
            # Before any link is up, so that no router solicitation ever leaves.
            netns.set_sysctls(
                self.namespace(role),
                {f"net/ipv6/conf/{which}/disable_ipv6": 1 for which in ("all", "default")},
            )
        gate = self.namespace("gate")
        netns.set_sysctls(gate, {f"net/ipv4/conf/{which}/rp_filter": 0 for which in ("all", "default")})
        netns.ip_batch(
            f"link add {port} netns {self.namespace(outer)} address {MACS[outer, port]} numtxqueues 1 numrxqueues 1 "
            f"type veth peer name {port} netns {gate} address {MACS['gate', port]} numtxqueues 1 numrxqueues 1"
            for outer, port in _OUTER
        )
        netns.ip_batch([*_LAN_COMMANDS, "link add held0 type veth peer name held1"], self.namespace("lan"))
        netns.ip_batch(self._gate_commands(), gate)
        netns.ip_batch(_WAN_COMMANDS, self.namespace("wan"))
        self.set_offloads(False)

    def set_offloads(self, wanted: bool) -> None:
        """Whether super-packets of 64 kB and partial checksums travel, or only frames as a wire carries them.

        GRO stays on: a veth without an XDP program takes redirected frames only with NAPI.
        """
        words = [word for name in ("tx", "tso", "gso") for word in (name, "on" if wanted else "off")]
        for role, port in _PORTS:
            self.run(role, ["ethtool", "-K", port, "gro", "on", *words])

    def _gate_commands(self) -> list[str]:
        hosts = [ipaddress.IPv4Address(HOST_BASE + host) for host in range(HOSTS)]
        return [
            "link set lan0 up",
            "link set wan0 up",
            "addr add 10.18.0.1/16 dev lan0",
            *(f"addr add {address}/24 dev wan0" for address in public_addresses(self.externals)),
            f"route add default via {WAN_SOCKETS}",
            f"neigh add {WAN_SOCKETS} lladdr {MACS['wan', 'wan0']} dev wan0 nud permanent",
            f"neigh add {LAN_SOCKETS} lladdr {MACS['lan', 'lan0']} dev lan0 nud permanent",
            *(f"neigh add {host} lladdr {MACS['lan', 'lan0']} dev lan0 nud permanent" for host in hosts),
        ]

    def attach_xdp(self, role: Role, interface: str, program_fd: int) -> None:
        with self.inside(role):
            xdp.attach(socket.if_nametoindex(interface), program_fd, "native")

    def detach_xdp(self, role: Role, interface: str, program_fd: int) -> None:
        with self.inside(role):
            xdp.detach(socket.if_nametoindex(interface), "native", program_fd)
