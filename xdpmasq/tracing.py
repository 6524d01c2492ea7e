"""What becomes of one internal host's packets, hook by hook, and why (bpf/trace.h).

Like a watcher of events a tracer says that it is there by a word in the kernel that lapses by itself. Meanwhile the
host's flows are kept off XDP, where nothing is told.
"""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any

import numpy as np

from xdpmasq import forwarding, source
from xdpmasq.abi import EXTERNAL_SLOTS, LIFE_LIVE, LIFE_RESTING, LIFE_STATE, PORTS, addr
from xdpmasq.errors import BusyError, DatapathError
from xdpmasq.events import HERE_S, WATCH_MOST
from xdpmasq.forwards import Rule
from xdpmasq.selection import Endpoint
from xdpmasq.sessions import PROTOCOLS, Array

if TYPE_CHECKING:
    from xdpmasq.datapath import Attached

# enum trace_hook and enum verdict of bpf/types.h and verdict.h
HOOKS = ("lan-in", "wan-out", "wan-in", "lan-out", "lo-out")
LAN_IN, WAN_OUT, WAN_IN, LAN_OUT, LO_OUT = HOOKS
VERDICTS = ("passed", "passed", "dropped", "refused", "redirected", "redirected")
# What no counter tells of.
_UNCOUNTED = {
    (LAN_IN, "passed"): "the kernel's next: routes, and nftables' forward chain",
    (LAN_IN, "redirected"): "to our own address from inside: on to the WAN, to be turned round there",
    (WAN_OUT, "redirected"): "turned round: it comes in again at the WAN",
    (LAN_OUT, "passed"): "delivered to the LAN",
}
_ENDS = ("slow", "own", "drop", "exit", "punt")  # first words of counters that tell how a packet ended

_TCP, _UDP, _ICMP, _SCTP = 6, 17, 1, 132
_NAMES = {_TCP: "tcp", _UDP: "udp", _ICMP: "icmp", _SCTP: "sctp", 47: "gre", 50: "esp", 51: "ah", 4: "ipip"}
PROTOCOL_NAMES = tuple(_NAMES.values())
_QUERIES = (0, 8)  # echo reply and echo: the identifier stands for a port
_ERRORS = (3, 11, 12)
_ICMP_WORDS = {
    **{(0, 0): "echo reply", (8, 0): "echo", (11, 0): "time exceeded", (3, 0): "network unreachable"},
    **{(3, 1): "host unreachable", (3, 2): "protocol unreachable", (3, 3): "port unreachable"},
    **{(3, 4): "fragmentation needed", (3, 13): "prohibited"},
}
_FLAGS = "FSRPAUEC"

End = tuple[IPv4Address, int | None]


@dataclass(frozen=True)
class Look:
    """A packet as it was seen.

    Attributes:
        source, destination: with the port; a query's identifier is the asker's.
        about: of TCP its flags, of ICMP type and code.
        quoted: of an ICMP error, the packet that it is about.
    """

    protocol: str
    source: End
    destination: End
    length: int
    ttl: int
    about: str = ""
    quoted: Look | None = None

    def __str__(self) -> str:
        return f"{_written(self.source)} > {_written(self.destination)}"

    @property
    def matter(self) -> Look:
        """What it is about."""
        return self.quoted or self


@dataclass(frozen=True)
class Sight:
    """What became of a packet at one hook.

    Attributes:
        at: seconds since the epoch.
        interface: its name, or its index where it is gone.
        hook: one of :data:`HOOKS`.
        verdict: one of :data:`VERDICTS`.
        reasons: counters that grew, the one that tells how it ended first.
        internal: the host's own end.
        remote: the other one.
    """

    at: float
    interface: str
    hook: str
    verdict: str
    reasons: tuple[str, ...]
    before: Look
    after: Look
    internal: End
    remote: End

    @property
    def why(self) -> list[tuple[str, str]]:
        """Names of the reasons, and what they mean."""
        texts = source.counters()
        if not self.reasons:
            return [("", _UNCOUNTED.get((self.hook, self.verdict), "nothing to do"))]
        return [(name, texts.get(name, "")) for name in self.reasons]

    def json(self) -> str:
        """One line."""
        return json.dumps(
            {
                **{"time": round(self.at, 3), "interface": self.interface, "hook": self.hook},
                **{"verdict": self.verdict, "protocol": self.before.protocol, "about": self.before.about or None},
                **{"before": _fields(self.before), "after": _fields(self.after)},
                "reasons": [{"name": name or None, "help": text} for name, text in self.why],
            }
        )

    def lines(self) -> Iterator[str]:
        """For people."""
        clock = time.strftime("%H:%M:%S", time.localtime(self.at)) + f".{int(self.at % 1 * 1000):03}"
        interface, _, way = f"{self.interface} {self.hook}".partition("-")
        where = f"{interface.rpartition(' ')[0]} {way}"
        yield f"{clock} {where:<11} {self.verdict:<10} {_told(self.before)}"
        indent = " " * (len(clock) + 13)
        if _told(self.after) != _told(self.before):
            yield f"{indent}{'as':<10} {_told(self.after)}"
        for name, text in self.why:
            yield f"{indent}{name}: {text}" if name else f"{indent}{text}"


@dataclass(frozen=True)
class Interest:
    """Which packets of the host are meant; empty is any."""

    protocol: str = ""
    port: int | None = None
    remote: Endpoint = field(default_factory=Endpoint)

    def __contains__(self, sight: Sight) -> bool:
        if self.protocol and self.protocol not in (sight.before.protocol, sight.before.matter.protocol):
            return False
        address, port = sight.remote
        if self.remote.prefix and address not in self.remote.prefix:
            return False
        if self.remote.port is not None and port != self.remote.port:
            return False
        return self.port is None or self.port == sight.internal[1]


class Tracer:
    """Traces one host from now on; :meth:`read` wants to be called some times a second.

    Args:
        port: what comes from outside to this port is shown even where it is nobody's.

    Attributes:
        lost: packets that were written over before they were read.

    Raises:
        BusyError: another one traces.
        DatapathError: the running datapath cannot be traced.
    """

    def __init__(self, attached: Attached, host: IPv4Address, port: int | None = None) -> None:
        if "traces" not in attached.maps:
            why, do = "another version attached the running datapath", "xdpmasq detach, then attach"
            raise DatapathError("nothing can be traced", why, f"{do}: running sessions start anew")
        self._attached, self._host, self._port, self._hz = attached, host, port, attached.hz
        self._places: dict[IPv4Address, int] = {}
        self._rules: list[Rule] = []
        self._ring = attached.maps["traces"].view(writable=False)
        self._word = attached.maps["tracing"].view()
        if (int(self._word["until"][0]) - attached.now()) % 2**32 < WATCH_MOST:
            other = IPv4Address(self._word["internal"]["word"][0, :1].tobytes())
            raise BusyError("another trace is running", f"of {other}", f"wait for its end, at most {HERE_S} s")
        self.lost = 0
        self._begun, self._begun_at = np.uint32(attached.now() % 2**32), time.time()  # one moment, by both clocks
        self._next = int(self._word["next"][0])
        self._word["internal"][0] = addr(host)
        self._stay()
        self._keep_off()

    def read(self) -> list[Sight]:
        """What has come since, in its order."""
        self._stay()
        head, room = int(self._word["next"][0]), len(self._ring)
        start = max(self._next, head - room)
        numbers = np.arange(start, head, dtype=np.uint64)
        rows = self._ring[(numbers % np.uint64(room)).astype(np.intp)]
        whole = rows["number"] == numbers + np.uint64(1)
        if not whole.all() and head - start < room:  # somebody is still writing: the rest at the next time
            rows = rows[: int(np.argmin(whole))]
            head = start + len(rows)
        else:
            rows = rows[whole]
        self.lost += head - self._next - len(rows)
        self._next = head
        if len(rows):
            self._places = {each.address: nth for nth, each in enumerate(self._attached.places) if each.address}
            self._rules = [each.rule for each in forwarding.read(self._attached)]
        return [sight for row in rows if (sight := self._sight(row))]

    def close(self) -> None:
        self._word["until"] = 0

    def _stay(self) -> None:
        ticks = min(HERE_S * self._hz, WATCH_MOST - 1)
        self._word["until"][0] = (self._attached.now() + ticks) % 2**32 or 1

    def _keep_off(self) -> None:
        """Its flows that are armed already are no more."""
        slots = self._attached.live_slots()
        mine = self._attached.rows(slots)["internal"]["addr"]["word"][:, 0] == addr(self._host)[0][0]
        self._attached.disarm_flows(slots[mine])

    def _sight(self, row: Any) -> Sight | None:
        """None: no packet of the host."""
        before, after = _look(row["before"]), _look(row["after"])
        hook, verdict = HOOKS[int(row["hook"])], VERDICTS[int(row["verdict"])]
        ends = self._ends(hook, before, after)
        if not ends:
            return None
        try:
            interface = socket.if_indextoname(int(row["ifindex"]))
        except OSError:
            interface = str(int(row["ifindex"]))
        reasons = _names(row["counted"], self._attached.counter_names)
        if verdict == "redirected" and any(name.startswith("drop_") for name in reasons):
            verdict = "refused"  # by way of the punt port: the agent tells the sender
        at = self._begun_at + float((row["at"] - self._begun).view(np.int32)) / self._hz
        return Sight(at, interface, hook, verdict, reasons, before, after, *ends)

    def _ends(self, hook: str, before: Look, after: Look) -> tuple[End, End] | None:
        """The host's end and the remote one."""
        errors = [each.quoted for each in (before, after) if each.quoted]
        for mine, other in (
            *((each.source, each.destination) for each in errors),
            *((each.destination, each.source) for each in errors),
            (before.source, before.destination),
            (before.destination, before.source),
            (after.destination, after.source),
            (after.source, after.destination),
        ):
            if mine[0] == self._host:
                return mine, other
        port = self._own_port(before) if hook == WAN_IN else None
        return ((self._host, port), before.source) if port is not None else None

    def _own_port(self, look: Look) -> int | None:
        """The host's port behind an external one, of a packet that did not get in; None: it is not the host's."""
        address, port = look.destination
        if address not in self._places or look.protocol not in PROTOCOLS or port is None:
            return None
        slot = self._places[address] * EXTERNAL_SLOTS + PROTOCOLS.index(look.protocol) * PORTS + port
        (row,) = self._attached.rows(np.array([slot], np.uint32))
        state, inside = int(row["life"]) & LIFE_STATE, row["internal"]
        if state in (LIFE_LIVE, LIFE_RESTING) and inside["addr"]["word"][0] == addr(self._host)[0][0]:
            return socket.ntohs(int(inside["port"]))
        for rule in self._rules:
            if rule.protocol == look.protocol and rule.first <= port <= rule.last:
                for target in rule.targets:
                    if target.address == self._host:
                        return target.port + port - rule.first if target.port else port
        return port if port == self._port else None


# --- reading a look --------------------------------------------------------------------------------


def _look(raw: Any) -> Look:
    ip, l4 = raw["ip"], raw["l4"].tobytes()
    quoted: Look | None = None
    protocol = int(ip["proto"])
    fragment = socket.ntohs(int(ip["frag_off"])) & 0x1FFF
    source_port, destination_port, about = None, None, ""
    if fragment:
        about = f"fragment at {fragment * 8}"
    elif protocol in (_TCP, _UDP, _SCTP):
        source_port, destination_port = (int.from_bytes(l4[at : at + 2], "big") for at in (0, 2))
        if protocol == _TCP:
            about = "".join(letter for nth, letter in enumerate(_FLAGS) if l4[13] >> nth & 1)
    elif protocol == _ICMP:
        about = _ICMP_WORDS.get((l4[0], l4[1]), f"type {l4[0]} code {l4[1]}")
        quoted = _quoted(l4[8:]) if l4[0] in _ERRORS else None
        if l4[0] in _QUERIES:
            number = int.from_bytes(l4[4:6], "big")
            source_port, destination_port = (number, None) if l4[0] else (None, number)
    return Look(
        protocol=_NAMES.get(protocol, str(protocol)),
        source=(_address(ip["src"]), source_port),
        destination=(_address(ip["dst"]), destination_port),
        length=socket.ntohs(int(ip["tot_len"])),
        ttl=int(ip["ttl"]),
        about=about,
        quoted=quoted,
    )


def _quoted(packet: bytes) -> Look | None:
    """The IP header without options that an error quotes, and the ports."""
    if packet[0] != 0x45:
        return None
    protocol, ports = packet[9], (int.from_bytes(packet[at : at + 2], "big") for at in (20, 22))
    source_port, destination_port = ports if protocol in (_TCP, _UDP, _SCTP) else (None, None)
    return Look(
        protocol=_NAMES.get(protocol, str(protocol)),
        source=(IPv4Address(packet[12:16]), source_port),
        destination=(IPv4Address(packet[16:20]), destination_port),
        length=int.from_bytes(packet[2:4], "big"),
        ttl=packet[8],
    )


def _told(look: Look) -> str:
    quoted = f" about {look.quoted.protocol} {look.quoted}" if look.quoted else ""
    return f"{look.protocol} {look}{' ' * bool(look.about)}{look.about}{quoted}"


def _address(addr: Any) -> IPv4Address:
    return IPv4Address(addr["word"][:1].tobytes())


def _names(words: Array, counters: Sequence[str]) -> tuple[str, ...]:
    found = [name for nth, name in enumerate(counters) if int(words[nth // 64]) >> (nth % 64) & 1]
    return tuple(sorted(found, key=lambda name: name.partition("_")[0] not in _ENDS))


def _written(end: End) -> str:
    return str(end[0]) if end[1] is None else f"{end[0]}:{end[1]}"


def _fields(look: Look) -> dict[str, Any]:
    ends = {
        name: {"address": str(end[0]), "port": end[1]}
        for name, end in (("source", look.source), ("destination", look.destination))
    }
    quoted = {"quoted": {"protocol": look.quoted.protocol, **_fields(look.quoted)}} if look.quoted else {}
    return {**ends, "length": look.length, "ttl": look.ttl, **quoted}


# --- what it comes to ------------------------------------------------------------------------------


def conclusion(seen: Counter[tuple[str, str]], host: IPv4Address, others: int = 0) -> str:
    """What the packets at hooks, by hook and verdict, look like in all; empty where nothing is striking.

    Args:
        others: packets of the host that were not asked for.
    """
    at = Counter[str]()
    for (hook, _), count in seen.items():
        at[hook] += count
    if not seen and others:
        return f"{others:,} of {host} came by that do not fit: see --port (its own), --protocol and --remote"
    if not seen:
        return f"nothing of {host} came by: is it the host's address, and this its gateway?"
    if seen[LAN_IN, "passed"] and not at[WAN_OUT] and not at[WAN_IN]:
        return "what came from the LAN never got to the WAN: see the routes, and nftables' forward chain"
    if seen[WAN_OUT, "passed"] and not at[WAN_IN]:
        return "what left by the WAN was not answered"
    return ""
