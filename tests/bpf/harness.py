"""One gateway on one bench: packets go in one by one, and what the programs made of each is looked at.

::

    192.168.0.0/24 ── lan0 [ 192.168.0.1 | 203.0.113.1 ] wan0 ── 203.0.113.10 ── everywhere

The interfaces are veths in a namespace of the bench's own; no packet travels on them: the kernel runs the
programs on packets of ours (BPF_PROG_TEST_RUN) as if they had come by there. Every run is held against the
rules that no packet may break, whatever a test asks beside them; see :meth:`Gateway._judge`.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import struct
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any, TypeVar

import numpy as np
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.packet import Packet, Raw

from xdpmasq import abi, addressing, bpf, forwarding, source
from xdpmasq.externals import Place
from xdpmasq.forwards import Rule, Target
from xdpmasq.lab import netns
from xdpmasq.net import netdev, xdp
from xdpmasq.programs import Programs

GATEWAY = "203.0.113.1"
GATEWAY_INSIDE = "192.168.0.1"
HOST, OTHER_HOST = "192.168.0.2", "192.168.0.3"
SERVER, OTHER_SERVER, ROUTER = "203.0.113.10", "198.51.100.7", "198.51.100.254"
INTERNAL = IPv4Network("192.168.0.0/24")
NEXT_HOP_MAC, HOST_MAC = "02:00:00:00:10:10", "02:00:00:00:00:02"
LAN_MAC, WAN_MAC = "02:00:00:00:00:01", "02:00:00:00:01:01"
LAN_VLAN_MAC, WAN_VLAN_MAC = "02:00:00:00:00:10", "02:00:00:00:01:20"

RuleT = TypeVar("RuleT", bound=Rule)

TICKS = 1000  # the bench's jiffies to its second; the kernel's own rate does not matter
FURTHER = 256
POOL = ((1024, 31744), (61000, 4536))  # (first, count) below and above Linux's ephemeral ports
EVERY_IDENTIFIER = ((0, 65536), (0, 0))
LIFE_FURTHER = 1 << 8
FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32

ENDINGS = ("fast", "slow", "exit", "punt", "up", "own", "drop")
TC_VERDICTS = {2: "drop", 7: "redirect", 0xFFFFFFFF: "pass"}
# Where a packet may go on uncounted: nothing was done to it, or a hairpin is turned round, which ends elsewhere.
AHEAD = {
    "masq_lan_out": ("pass",),
    "masq_lan_in": ("pass", "redirect"),
    "masq_lan_lean": ("pass", "redirect"),
    "masq_wan_out": ("redirect",),
    "masq_lo_out": ("pass", "redirect"),
}
XDP_VERDICTS = {2: "pass", 4: "redirect"}
PROTOCOLS = {1: ICMP, 6: TCP, 17: UDP}
CHECK_AT = {1: 2, 6: 16, 17: 6}  # the checksum within the transport header
ICMP_ERRORS = (3, 11, 12)
HAIRPIN_MARK = 0x4D500000
LOOPBACK = 1
PUNT_HEADER = 14  # and behind it an Ethernet header
PUNT_FRAGMENT_IN, PUNT_FRAGMENT_OUT, PUNT_REFUSED, PUNT_TTL = range(4)
INDEXED, COUNTED, FROM_OUTSIDE = 1, 2, 4  # SESSION_*
LIFE_COUNTED = 16


# --- packets ---------------------------------------------------------------------------------------


def udp(src: str, sport: int, dst: str, dport: int, payload: bytes = b"how do you do", **ip: Any) -> Packet:
    return IP(src=src, dst=dst, **ip) / UDP(sport=sport, dport=dport) / Raw(payload)


def tcp(
    src: str,
    sport: int,
    dst: str,
    dport: int,
    flags: int = ACK,
    *,
    seq: int = 0,
    ack: int = 0,
    payload: bytes = b"",
    **ip: Any,
) -> Packet:
    return IP(src=src, dst=dst, **ip) / TCP(sport=sport, dport=dport, flags=flags, seq=seq, ack=ack) / Raw(payload)


def echo(src: str, dst: str, number: int, payload: bytes = b"are you there", **ip: Any) -> Packet:
    return IP(src=src, dst=dst, **ip) / ICMP(type=8, id=number, seq=7) / Raw(payload)


def echo_reply(src: str, dst: str, number: int, payload: bytes = b"are you there", **ip: Any) -> Packet:
    return IP(src=src, dst=dst, **ip) / ICMP(type=0, id=number, seq=7) / Raw(payload)


def wire(packet: Packet | bytes) -> bytes:
    return packet if isinstance(packet, bytes) else bytes(packet)


def rebuilt(packet: Packet, **changes: Any) -> Packet:
    """The packet with other addresses, ports, ttl, and all checksums counted anew by scapy.

    Args:
        changes: src, dst, ttl of the IP header, sport, dport of TCP and UDP, id of an ICMP query.
    """
    new = IP(wire(packet))
    for name, value in changes.items():
        layer = new if name in ("src", "dst", "ttl") else new.payload
        setattr(layer, name, value)
    none_stays_none = UDP in new and new.frag == 0 and new[UDP].chksum == 0
    for layer in (new, new.payload):
        if hasattr(layer, "chksum"):
            layer.chksum = None
    if none_stays_none:
        new[UDP].chksum = 0
    return IP(wire(new))


def full_sum(data: bytes) -> int:
    """One's complement sum of the 16-bit words, as a number below 0xFFFF: 0 where a checksum inside is right."""
    if len(data) % 2:
        data += b"\0"
    return sum(struct.unpack(f"!{len(data) // 2}H", data)) % 0xFFFF


def sums(packet: bytes, quoted: bool = False) -> dict[str, int | None]:
    """What every checksum of an IPv4 packet covers, summed up: translation must leave each as it was.

    None stands for a UDP checksum of 0, which means none.
    """
    header = (packet[0] & 15) * 4
    total = min(int.from_bytes(packet[2:4], "big"), len(packet)) if not quoted else len(packet)
    proto, fragment = packet[9], int.from_bytes(packet[6:8], "big")
    found: dict[str, int | None] = {"ip": full_sum(packet[:header])}
    segment = packet[header:total]
    check = CHECK_AT.get(proto)
    if check is None or fragment & 0x1FFF or len(segment) < check + 2:
        return found
    pseudo = b"" if proto == 1 else packet[12:20] + bytes([0, proto]) + len(segment).to_bytes(2, "big")
    has_none = proto == 17 and segment[check : check + 2] == b"\0\0"
    found["transport"] = None if has_none else full_sum(pseudo + segment)
    if proto == 1 and segment[0] in ICMP_ERRORS and not quoted and len(segment) >= 36:
        found |= {f"quoted {name}": value for name, value in sums(segment[8:], quoted=True).items()}
    return found


def untagged(frame: bytes) -> bytes:
    """The frame without its VLAN tags."""
    while frame[12:14] in (b"\x81\x00", b"\x88\xa8"):
        frame = frame[:12] + frame[16:]
    return frame


def quote(packet: bytes) -> bytes | None:
    """The packet quoted by an ICMP error, or None when it is no such error."""
    header = (packet[0] & 15) * 4
    if packet[9] != 1 or packet[6] & 0x1F or packet[7] or len(packet) < header + 28:
        return None
    return packet[header + 8 :] if packet[header] in ICMP_ERRORS else None


RULES = ("forwards", "redirects", "answers", "spared")

# --- the bench -------------------------------------------------------------------------------------

NETWORK = (
    "link set lo up",
    f"link add lan0 address {LAN_MAC} type veth peer name lan1",
    f"link add wan0 address {WAN_MAC} type veth peer name wan1",
    "link add punt0 type veth peer name punt1",
    # stand for VLAN devices: the programs know them by their indices only
    f"link add lan10 address {LAN_VLAN_MAC} type veth peer name wan20 address {WAN_VLAN_MAC}",
    *(f"link set {name} arp off" for name in ("lan1", "wan1")),
    *(f"link set {name} up" for name in ("lan0", "lan1", "wan0", "wan1")),
    f"addr add {GATEWAY_INSIDE}/24 dev lan0",
    f"addr add {GATEWAY}/24 dev wan0",
    f"neigh add {SERVER} lladdr {NEXT_HOP_MAC} dev wan0 nud permanent",
    f"neigh add {HOST} lladdr {HOST_MAC} dev lan0 nud permanent",
    f"route add default via {SERVER} dev wan0",
)

PREFIXES = {
    **dict.fromkeys(addressing.PRIVATE, abi.PREFIX_PRIVATE),
    INTERNAL: abi.PREFIX_INTERNAL,
    IPv4Network(GATEWAY): abi.PREFIX_OWN,
}


_numbers = itertools.count()


@contextlib.contextmanager
def namespace_of(network: Sequence[str] = NETWORK) -> Iterator[str]:
    """The name of a namespace with these interfaces, for as long as the block lasts."""
    name = f"tb-{os.getpid()}-{next(_numbers)}"
    netns.ip_batch([f"netns add {name}"])
    try:
        netns.set_sysctls(name, {f"net/ipv6/conf/{each}/disable_ipv6": 1 for each in ("all", "default")})
        netns.set_sysctls(name, {"net/ipv4/ip_forward": 1})
        netns.ip_batch(network, name)
        yield name
    finally:
        netns.delete([name])


class Bench:
    """The programs, compiled once, and their tables. To be made, and used, inside the bench's namespace.

    Args:
        addresses: of each WAN, the external one.
        blocks: ports are given out in blocks.
        programs: a class of them.
    """

    def __init__(
        self, addresses: Sequence[str] = (GATEWAY,), *, blocks: bool = False, programs: type[Programs] = Programs
    ) -> None:
        self._places = [Place(IPv4Address(each), number) for number, each in enumerate(addresses)]
        self.programs = programs(
            *(FURTHER, None, len(addresses), len(addresses)),
            blocks=blocks,
            sizes={"redirects": 256, "answers": 256},
        )
        self.tables = self.programs.tables
        self.lan, self.wan, self.punt = (netdev.link(name) for name in ("lan0", "wan0", "punt0"))
        # Only a device with a program on its XDP hook can be named as the one a test packet came by.
        xdp.attach(self.lan.index, self.programs["masq_xdp"].fd, "native")
        xdp.attach(self.wan.index, self.programs["masq_xdp"].fd, "native")
        self.counter_names = list(source.counters())
        self._counters = np.zeros((len(self.counter_names), bpf.possible_cpus()), np.uint64)
        self.kinds = [name for name in self.counter_names if name.startswith(("fast_", "slow_"))]
        wans, sums = self.tables.wans, self.tables.maps["translations"].value
        self._translations = np.zeros((wans, len(self.kinds), bpf.possible_cpus()), sums)
        self._libc = ctypes.CDLL(None, use_errno=True)

    def _clear_embryos(self) -> None:
        """By one system call (BPF_MAP_UPDATE_BATCH): it is done once a test."""
        places = np.arange(self.tables.maps["embryos"].max_entries, dtype=np.uint32)
        slots = np.zeros_like(places)
        fields = (0, 0, places.ctypes.data, slots.ctypes.data, len(places), self.tables.maps["embryos"].fd, 0, 0)
        attr = struct.pack("<QQQQIIQQ", *fields)
        assert self._libc.syscall(bpf.SYSCALL["x86_64"], 26, attr, len(attr)) == 0

    def counters(self) -> np.ndarray[Any, Any]:
        """All counters over CPUs."""
        self._read("counters", self._counters, len(self.counter_names))
        return self._counters.sum(axis=1)

    def translations(self) -> np.ndarray[Any, Any]:
        """Packets and bytes by WAN and kind, over CPUs."""
        self._read("translations", self._translations, self.tables.wans * len(self.kinds))
        return np.stack([self._translations[each].sum(axis=2) for each in ("packets", "bytes")], axis=2)

    def _read(self, name: str, values: np.ndarray[Any, Any], count: int) -> None:
        """All of an array by one system call (BPF_MAP_LOOKUP_BATCH): it is done with every packet."""
        token, indices = np.zeros(1, np.uint32), np.zeros(count, np.uint32)
        fields = (
            0,
            token.ctypes.data,
            indices.ctypes.data,
            values.ctypes.data,
            count,
            self.tables.maps[name].fd,
            0,
            0,
        )
        attr = struct.pack("<QQQQIIQQ", *fields)
        self._libc.syscall(bpf.SYSCALL["x86_64"], 24, attr, len(attr))

    def clear(self) -> None:
        """Everything as after attaching."""
        tables = self.tables
        tables.sessions.view(np.uint8)[:] = 0
        for name in ("buckets", "groups", "fronts"):
            tables.maps[name].view().view(np.uint8)[:] = 0
        self._clear_embryos()
        for name in ("mappings", "overflow", "fragments", "hosts", "bindings", "contacts", *RULES):
            for keys, _ in tables.maps[name].items(chunk=max(FURTHER, 16384)):
                for key in keys:
                    tables.maps[name].delete(key)
        tables.maps["triggers"].set(0, 0)
        for placed in forwarding.read(tables):
            rules = tables.maps["forward_rules"]
            rules.set(placed.index, np.zeros((), rules.value))
        for reason in range(4):
            tables.maps["budgets"].set(reason, (0, 0))
        tables.set_settings(
            pool=np.zeros_like(tables.settings["pool"]),
            tcp_established=7440 * TICKS,
            tcp_transitory=240 * TICKS,
            udp=300 * TICKS,
            icmp=60 * TICKS,
            fragment=30 * TICKS,
            rearm=60 * TICKS,
            disarmed_at=ago(1),
            accelerate=0,
            inbound_refresh=1,
            filtering=(0, 0, 0, 0),
            preserve=0,
            parity=0,
            overload=0,
            drop_other=0,
            hz=TICKS,
            host_sessions=1 << 20,
            host_mappings=1 << 20,
            host_rate=1 << 20,
            host_burst=1 << 20,
            wan=self.wan.index,
            exit=[self.wan.index] * len(self._places),
            punt=0,
            heartbeat=0,
        )
        tables.set_externals(self._places, {})
        tables.set_prefixes(PREFIXES | {IPv4Network(str(each.address)): abi.PREFIX_OWN for each in self._places})
        tables.set_interface(self.lan, "lan", xdp_from=True, xdp_to=True)
        tables.set_interface(self.wan, "wan", xdp_from=True, xdp_to=True)


@dataclass(frozen=True)
class Result:
    """What became of one packet.

    Attributes:
        verdict: pass, drop or redirect.
        frame: the packet afterwards, from its Ethernet header on.
        ended: the one counter that says how it ended; none where a hairpin is turned round, or nothing was done.
        counted: every other counter that changed, by how much.
        mark: the skb's afterwards.
        punted: the reason for which it was sent to the agent.
    """

    verdict: str
    frame: bytes
    ended: str
    counted: dict[str, int]
    mark: int = 0
    punted: int | None = None

    @property
    def bytes(self) -> bytes:
        """From the IP header on."""
        return self.frame[14 if self.punted is None else PUNT_HEADER + 14 :]

    @property
    def ip(self) -> Packet:
        return IP(self.bytes)

    @property
    def port(self) -> int:
        """The source port, or a query's identifier."""
        at = (self.bytes[0] & 15) * 4 + (4 if self.bytes[9] == 1 else 0)
        return int.from_bytes(self.bytes[at : at + 2], "big")


class Gateway:
    """A gateway with empty tables. Packets are scapy's, from IP on, or whole frames as bytes."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.tables = bench.tables
        self.lan, self.wan = bench.lan.index, bench.wan.index
        bench.clear()
        self.pool(tcp=POOL, udp=POOL, icmp=EVERY_IDENTIFIER)
        self._before = bench.counters()
        self._translations = bench.translations()
        self.translated_by = 0  # the WAN of the last packet that was translated

    # --- settings

    def pool(self, **ranges: Sequence[tuple[int, int]]) -> None:
        """Sets (first, count) of both ranges for these protocols; for an idle gateway only."""
        pools = self.tables.settings["pool"].copy()
        for name, two in ranges.items():
            class_ = abi.CLASSES.index(name)
            taken = np.ones(abi.PORTS, np.uint8)
            for first, count in two:
                taken[first : first + count] = 0
            bits = np.packbits(taken, bitorder="little").view(np.uint64)
            for external in range(self.tables.externals):
                word = (external * abi.EXTERNAL_SLOTS + class_ * abi.PORTS) // 64
                self.tables.claims[word : word + len(bits)] = bits
            first, count = zip(*(*two, (0, 0)), strict=True)
            pools[class_] = (first[:2], count[:2])
        self.tables.claims[self.tables.further_base // 64 :] = 0
        self.tables.set_settings(pool=pools)

    def accelerate(self) -> None:
        self.tables.set_settings(accelerate=1)

    def attend(self) -> None:
        """The agent reads the punt port."""
        self.tables.set_settings(punt=self.bench.punt.index, heartbeat=bpf.jiffies())

    def filtering(self, mode: int) -> None:
        self.tables.set_settings(filtering=(mode, mode, 0, 0))

    def forward(
        self, protocol: str, first: int, *targets: tuple[Any, ...], last: int | None = None, source: str | None = None
    ) -> Rule:
        """Puts a forward in place; targets are (address, port[, weight]). From port 0 it is the default host's."""
        last = (first or abi.PORTS - 1) if last is None else last
        to = tuple(Target(IPv4Address(target[0]), *target[1:]) for target in targets)
        return self.put(Rule(protocol, first, last, to, IPv4Network(source) if source else None))

    def put(self, rule: RuleT) -> RuleT:
        """Puts a rule in place."""
        forwarding.put(self.tables, self.bench.programs["masq_reap"], rule)
        self.counted()
        return rule

    def serve_redirects(self) -> None:
        """The LAN's egress brings redirected connections' answers back."""
        inside = IPv4Address(GATEWAY_INSIDE)
        self.tables.set_interface(self.bench.lan, "lan", xdp_from=True, xdp_to=True, redirect_to=inside)

    def withdraw(self, rule: Rule) -> dict[str, int]:
        """Takes a rule out; returns the counters that changed."""
        (placed,) = (each for each in forwarding.read(self.tables) if each.rule == rule)
        forwarding.take(self.tables, self.bench.programs["masq_reap"], placed)
        return self.counted()

    # --- packets

    def outbound(self, packet: Packet | bytes, *, local: bool = False, **context: int) -> Result:
        """At the WAN's egress, come from the LAN, or with ``local`` from the gateway itself."""
        frame = packet if isinstance(packet, bytes) else wan_frame(packet)
        context = {"ingress_ifindex": 0 if local else self.lan, "ifindex": self.wan, **context}
        return self._tc("masq_wan_out", frame, context)

    def inbound(self, packet: Packet | bytes, **context: int) -> Result:
        """At the WAN's ingress."""
        frame = packet if isinstance(packet, bytes) else _frame(packet, WAN_MAC, NEXT_HOP_MAC)
        return self._tc("masq_wan_in", frame, {"ingress_ifindex": self.wan, "ifindex": self.wan, **context})

    def outbound_l3(self, packet: Packet) -> Result:
        """At the egress of a WAN without Ethernet header. The packet's source must be in 8.0.0.0/16: those two bytes
        are where the kernel, which knows test runs with Ethernet headers only, looks for the EtherType of IPv4.
        """
        return self._tc("masq_wan_out_l3", wire(packet), {"ingress_ifindex": self.lan, "ifindex": self.wan})

    def inbound_l3(self, packet: Packet) -> Result:
        """At the ingress of such a WAN; see :meth:`outbound_l3`."""
        return self._tc("masq_wan_in_l3", wire(packet), {"ingress_ifindex": self.wan, "ifindex": self.wan})

    def learn(self, packet: Packet | bytes, *, came_by: int | None = None, **context: int) -> Result:
        """At the LAN's egress, where the gateway learns how the kernel delivers."""
        frame = packet if isinstance(packet, bytes) else _frame(packet, HOST_MAC, LAN_MAC)
        came_by = self.wan if came_by is None else came_by
        return self._tc("masq_lan_out", frame, {"ingress_ifindex": came_by, "ifindex": self.lan, **context})

    def lan_out(self, packet: Packet | bytes) -> Result:
        """At the LAN's egress, from the gateway itself."""
        return self.learn(packet, came_by=0)

    def fast_outbound(self, packet: Packet | bytes) -> Result:
        """At the LAN's XDP hook."""
        frame = packet if isinstance(packet, bytes) else _frame(packet, LAN_MAC, HOST_MAC)
        return self.fast(frame, self.lan)

    def fast_inbound(self, packet: Packet | bytes) -> Result:
        """At the WAN's XDP hook."""
        frame = packet if isinstance(packet, bytes) else _frame(packet, WAN_MAC, NEXT_HOP_MAC)
        return self.fast(frame, self.wan)

    def lan_in(self, packet: Packet | bytes, **context: int) -> Result:
        """At the LAN's ingress, where hairpins are found; and on, at the WAN's egress, where they are translated."""
        frame = packet if isinstance(packet, bytes) else _frame(packet, LAN_MAC, HOST_MAC)
        redirects = self.tables.maps["interfaces"].get(self.lan)["redirect_to"]["word"].any()
        function = "masq_lan_in" if redirects else "masq_lan_lean"
        found = self._tc(function, frame, {"ingress_ifindex": self.lan, "ifindex": self.lan, **context})
        if found.verdict == "pass" or found.ended:
            return found
        return self._tc("masq_wan_out", frame, {"ingress_ifindex": self.lan, "ifindex": self.wan, "mark": found.mark})

    def lo_out(self, packet: Packet | bytes) -> Result:
        """At the egress of lo: the gateway speaks to itself."""
        frame = packet if isinstance(packet, bytes) else bytes(12) + b"\x08\x00" + wire(packet)
        return self._tc("masq_lo_out", frame, {"ingress_ifindex": 0, "ifindex": LOOPBACK})

    def punt_in(self, frame: bytes, *, ifindex: int | None = None) -> Result:
        """At the punt port's ingress: a frame that the agent writes."""
        here = self.bench.punt.index if ifindex is None else ifindex
        return self._tc("masq_punt_in", frame, {"ingress_ifindex": here, "ifindex": here})

    def hairpin(self, packet: Packet | bytes) -> Result:
        """From a LAN to an external address and round: the second leg, or the first when it ended there."""
        first = self.lan_in(packet)
        return self.turned(first) if first.verdict == "redirect" and not first.ended else first

    def turned(self, first: Result) -> Result:
        """A hairpin's second leg, at the WAN's ingress."""
        return self.inbound(first.frame, mark=first.mark)

    def reap(self, slots: Iterable[int], order: int = abi.REAP_EXPIRED) -> dict[str, int]:
        """Returns the counters that changed."""
        self.tables.reap(self.bench.programs["masq_reap"], np.array(list(slots), np.uint32), order)
        return self.counted()

    def counted(self) -> dict[str, int]:
        """The counters that changed since they were last looked at, by how much."""
        now = self.bench.counters()
        changed = np.flatnonzero(now != self._before)
        counted = {self.bench.counter_names[i]: int(now[i] - self._before[i]) for i in changed}
        self._before = now
        sums = self.bench.translations()
        self._grown, self._translations = sums - self._translations, sums
        return counted

    def _tc(self, function: str, frame: bytes, context: dict[str, int]) -> Result:
        skb = bytearray(192)  # struct __sk_buff
        struct.pack_into("<I", skb, 8, context.get("mark", 0))
        struct.pack_into("<II", skb, 36, context["ingress_ifindex"], context["ifindex"])
        struct.pack_into("<I", skb, 164, context.get("gso_segs", 0))
        struct.pack_into("<I", skb, 176, context.get("gso_size", 0))
        run = self.bench.programs[function].test_run(frame, context=bytes(skb))
        result = self._judge(function, frame, TC_VERDICTS[run.verdict], run.data)
        return replace(result, mark=struct.unpack_from("<I", run.context, 8)[0])

    def fast(self, frame: bytes, ifindex: int, room_taken: int = 0) -> Result:
        """At the XDP hook of a device; so many bytes in front of the frame are taken by metadata."""
        md = struct.pack("<6I", room_taken, room_taken + len(frame), 0, ifindex, 0, 0)  # struct xdp_md
        run = self.bench.programs["masq_xdp"].test_run(bytes(room_taken) + frame, context=md)
        return self._judge("masq_xdp", frame, XDP_VERDICTS[run.verdict], run.data[room_taken:])

    def _judge(self, function: str, before: bytes, verdict: str, after: bytes) -> Result:
        """No unaccounted exit; unmodified or translated whole; nothing internal on the WAN."""
        counted = self.counted()
        ends = [name for name in counted if name.split("_")[0] in ENDINGS]
        l3 = 0 if function.endswith("_l3") else 14
        if not ends and function in AHEAD:
            assert not counted or function == "masq_wan_out"
            assert verdict in AHEAD[function]
            if function != "masq_wan_out":
                assert after == before
            else:
                _assert_translated(before[l3:], after[l3:], hops=0)
                _assert_nothing_internal(after)
            return Result(verdict, after, "", counted)
        assert len(ends) == 1, f"not one way to end: {counted}"
        (ended,) = ends
        assert counted.pop(ended) == 1
        kind = ended.split("_")[0]
        punted = None
        if verdict == "redirect" and (kind == "drop" or ended == "punt_fragment"):
            punted = after[1]
            told = {"masq_lan_in": self.lan, "masq_lan_lean": self.lan}.get(function, self.wan)
            assert after[:6] == bytes([2, punted]) + told.to_bytes(4, "big")
            assert after[PUNT_HEADER:] == (before if l3 else bytes(14) + before), "the agent is to get it as it was"
            assert punted in {"punt_fragment": (PUNT_FRAGMENT_IN, PUNT_FRAGMENT_OUT), "drop_ttl": (PUNT_TTL,)}.get(
                ended, (PUNT_REFUSED,)
            )
        else:
            sent_on = kind in ("fast", "punt", "exit") or ended.startswith("slow_hairpin")
            expected = "redirect" if sent_on else "drop" if kind == "drop" else "pass"
            assert verdict == expected, f"{ended}, but {verdict}"
        if kind == "exit" or (verdict == "pass" and kind in ("own", "up")):
            assert after == before, f"{ended}, but modified"
        elif ended == "punt_return":
            assert after[14:] == before[PUNT_HEADER + 14 :]
        elif kind in ("fast", "slow"):
            turns = function == "masq_wan_in" and ended.startswith("slow_hairpin")
            old, new = (before, after) if kind == "slow" else (untagged(before), untagged(after))
            _assert_translated(old[l3:], new[l3:], hops=int(kind == "fast" or turns))
            self._assert_summed(ended, int.from_bytes(old[l3 + 2 : l3 + 4], "big") or len(old) - l3)
        leaves = ended == "fast_outbound" or (
            function == "masq_wan_out" and (verdict == "redirect" or kind in ("own", "slow"))
        )
        leaves &= kind != "exit"
        if (leaves and punted is None) or ended.startswith("slow_hairpin"):
            _assert_nothing_internal(untagged(after) if kind == "fast" else after)
        return Result(verdict, after, ended, counted, punted=punted)

    def _assert_summed(self, kind: str, length: int) -> None:
        """One packet more of this kind, by whichever WAN, and as many bytes as its IP header says."""
        ((wan, number),) = np.argwhere(self._grown.any(axis=2))
        assert (self.bench.kinds[number], *self._grown[wan, number]) == (kind, 1, length)
        self.translated_by = wan

    # --- the tables

    def slot(self, host: str, port: int, class_: str) -> int | None:
        """The slot of the mapping of an internal endpoint."""
        key = (abi.addr(IPv4Address(host)), socket_order(port), abi.CLASSES.index(class_), 0)
        found = self.tables.maps["mappings"].get(key)
        return None if found is None else int(found)

    def session(self, host: str, port: int, class_: str, remote: str, remote_port: int = 0) -> Any:
        """The session as a writable row of the table, or None."""
        slots = self.tables.open_slots()
        rows = self.tables.sessions[slots]
        internal = (abi.addr(IPv4Address(host)), socket_order(port), abi.CLASSES.index(class_), 0)
        found = rows["internal"] == np.array(internal, rows["internal"].dtype)
        found &= rows["out"]["remote_addr"]["word"][:, 0] == abi.addr(IPv4Address(remote))[0][0]
        found &= rows["out"]["remote_port"] == socket_order(remote_port)
        return self.tables.sessions[slots[np.flatnonzero(found)[0]]] if found.any() else None

    def slots(self) -> list[int]:
        """All slots that are not free."""
        return [int(slot) for slot in np.flatnonzero(self.tables.sessions["life"])]

    def is_claimed(self, slot: int) -> bool:
        return bool(int(self.tables.claims[slot // 64]) >> (slot % 64) & 1)

    @property
    def mappings(self) -> int:
        return sum(len(keys) for keys, _ in self.tables.maps["mappings"].items(chunk=16384))

    def host(self, address: str) -> tuple[int, int, int, int]:
        """What an internal host has open, as it is counted: sessions, and mappings of TCP, UDP, ICMP."""
        found = self.tables.maps["hosts"].get(abi.addr(IPv4Address(address)))
        return (0, 0, 0, 0) if found is None else (int(found["sessions"]), *map(int, found["mappings"][:3]))

    def entries(self, name: str) -> dict[bytes, Any]:
        """A hash table's contents by the bytes of the key."""
        table = self.tables.maps[name]
        return {
            key.tobytes(): value
            for keys, values in table.items(chunk=16384)
            for key, value in zip(keys, values, strict=True)
        }

    def indexed(self) -> list[int]:
        """The slots to which the entries of the index lead."""
        entries = self.tables.maps["buckets"].view()["entry"]
        return [
            *(int(entry) & 0xFFFFFF for entry in entries[entries != 0]),
            *map(int, self.entries("overflow").values()),
        ]

    def place(self, slot: int) -> int:
        """Where a further session between the endpoints of that in the slot is expected, or in the slot beside it."""
        row = self.tables.sessions[slot]
        return self._place(row["mapping"], row["out"]["remote_addr"]["word"][0], row["out"]["remote_port"])

    def place_for(self, mapping: int, remote: str, port: int) -> int:
        """The same for a session that the mapping in a slot might have."""
        return self._place(mapping, abi.addr(IPv4Address(remote))[0][0], socket_order(port))

    def _place(self, mapping: Any, remote: Any, port: Any) -> int:
        seeds = self.tables.settings["seed"]
        total = int(seeds[0]) + sum(
            int(seed) * int(word) for seed, word in zip(seeds[1:4], (port, remote, mapping), strict=True)
        )
        return self.tables.further_base + ((total % 2**64 >> 32) * self.tables.further >> 32)

    def occupy(self, *slots: int) -> None:
        """Nobody finds them free."""
        for slot in slots:
            self.tables.claims[slot // 64] |= np.uint64(1 << slot % 64)

    def assert_tables_agree(self) -> None:
        """Every entry leads to a live slot that leads back to it, every live slot is where it is expected or has its
        entries, and what is counted (further sessions, hosts' sessions and mappings) is there.
        """
        rows, maps = self.tables.sessions, self.tables.maps
        lives = {slot: int(rows[slot]["life"]) for slot in self.slots()}
        live = [slot for slot, life in lives.items() if life & abi.LIFE_STATE == abi.LIFE_LIVE]
        running = [slot for slot in live if lives[slot] & abi.LIFE_SESSION]
        static = {slot for slot in live if lives[slot] & abi.LIFE_STATIC}
        further = [slot for slot in live if slot >= self.tables.further_base]

        def key(name: str, *fields: Any) -> bytes:
            return np.array(fields, maps[name].key).tobytes()

        def class_of(slot: int) -> int:
            return int(rows[slot]["mapping"]) // abi.PORTS % len(abi.CLASSES)

        def wan_of(slot: int) -> int:
            return self.tables.places[int(rows[slot]["mapping"]) // abi.EXTERNAL_SLOTS].wan

        def mapping_key(slot: int) -> bytes:
            in_ = rows[slot]["in"]
            return key("mappings", in_["new_addr"], in_["new_port"], class_of(slot), wan_of(slot))

        mapped = {at: int(slot) for at, slot in self.entries("mappings").items()}
        assert len(set(mapped.values())) == len(mapped), "two endpoints have one port"
        assert set(mapped.values()) <= set(live), "a mapping leads to a slot that is not live"
        for at, slot in mapped.items():
            assert slot in static or mapping_key(slot) == at, "a slot does not lead back to its mapping"
        for slot in (slot for slot in live if lives[slot] & LIFE_COUNTED):
            assert mapped.get(mapping_key(slot)) == slot, "a mapping that nobody can find"
        indexed = [slot for slot in running if int(rows[slot]["out"]["marks"]) & INDEXED]
        assert Counter(self.indexed()) == Counter([*indexed, *indexed]), "an entry of the index for each flow"
        assert maps["groups"].view().sum() == 2 * len(indexed), "entries that nobody looks for, or for nothing"
        for slot in set(running) - set(indexed):
            assert slot in (rows[slot]["mapping"], self.place(slot), self.place(slot) ^ 1), "nobody expects it there"
            assert mapped.get(key("mappings", *rows[slot]["internal"])) == rows[slot]["mapping"], "not its mapping"
        fronts = maps["fronts"].view()["entry"]
        ahead = [int(entry) & 0xFFFFFF for entry in fronts[fronts != 0]]
        assert not Counter(ahead) - Counter(mapped.values()), "an entry in front of none"
        counts = Counter(int(rows[slot]["mapping"]) for slot in further)
        for slot, life in lives.items():
            assert (life & abi.LIFE_FURTHER_MASK) >> 8 == counts[slot]
        sessions = Counter(
            rows[slot]["in"]["new_addr"].tobytes() for slot in running if int(rows[slot]["out"]["marks"]) & COUNTED
        )
        mappings = Counter(
            (rows[slot]["in"]["new_addr"].tobytes(), class_of(slot)) for slot in live if lives[slot] & LIFE_COUNTED
        )
        for at, host in self.entries("hosts").items():
            assert host["sessions"] == sessions.pop(at, 0), "a host's sessions"
            for number in range(len(abi.CLASSES)):
                assert host["mappings"][number] == mappings.pop((at, number), 0), "a host's mappings"
        assert not sessions
        assert not mappings

    # --- what tests often need first

    def open(self, packet: Packet | bytes) -> int:
        """Sends the packet out; returns the external port."""
        result = self.outbound(packet)
        assert result.ended == "slow_outbound", result.ended
        return result.port

    def connect(self, host: str, port: int, remote: str, remote_port: int) -> int:
        """A TCP handshake: the host's next sequence number is 101, the server's 501. Returns the external port."""
        external = self.open(tcp(host, port, remote, remote_port, SYN, seq=100))
        answer = self.inbound(tcp(remote, remote_port, GATEWAY, external, SYN | ACK, seq=500, ack=101))
        assert answer.ended == "slow_inbound"
        assert self.open(tcp(host, port, remote, remote_port, ACK, seq=101, ack=501)) == external
        return external


def next_tick() -> None:
    """Waits for the next jiffy: what happens within one is simultaneous to the programs."""
    now = bpf.jiffies()
    while bpf.jiffies() == now:
        time.sleep(0.001)


def ago(seconds: float) -> int:
    """The stamp of a moment past, right across the counter's wrap, which is five minutes after a boot."""
    return (bpf.jiffies() - int(seconds * TICKS)) % 2**32


def since(stamp: int) -> int:
    """Jiffies gone by."""
    return (bpf.jiffies() - stamp) % 2**32


def age(session: Any, seconds: float) -> None:
    """Makes both flows of a session last seen so long ago."""
    for name in ("out", "in"):
        session[name]["last_seen"] = ago(seconds)


def socket_order(port: int) -> int:
    """A port as numpy reads a ``__be16``."""
    return int.from_bytes(port.to_bytes(2, "big"), "little")


def wan_frame(packet: Packet) -> bytes:
    """The packet as it leaves through the WAN."""
    return _frame(packet, NEXT_HOP_MAC, WAN_MAC)


def _frame(packet: Packet, dst: str, src: str) -> bytes:
    macs = bytes.fromhex(dst.replace(":", "") + src.replace(":", ""))
    return macs + b"\x08\x00" + wire(packet)


def _assert_translated(old: bytes, new: bytes, hops: int) -> None:
    assert len(old) == len(new)
    assert sums(new) == sums(old)
    assert old[8] - new[8] == hops, "TTL"


def _assert_nothing_internal(frame: bytes) -> None:
    packet = frame[14:]
    if frame[12:14] != b"\x08\x00":
        return
    quoted = quote(packet)
    assert IPv4Address(packet[12:16]) not in INTERNAL, "internal source on the WAN"
    if quoted and len(quoted) >= 20:
        assert IPv4Address(quoted[16:20]) not in INTERNAL, "internal address quoted on the WAN"
