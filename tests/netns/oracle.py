"""Scripts of packets, played side by side through gateways that ought to do the same with them.

Each gateway stands in a network of its own, and all of these are alike::

    host 10.1.x.x ─ router ─ lan0 [172.16.0.1 gate 203.0.113.1] wan0 ─ router ┬─────────── remote 11.x.x.x
                        .2                                               .254 └ MTU 600 ── remote 198.18.x.x

Hosts, remotes and routers exist only in frames: ``ends`` holds the far sides of both cables, and raw sockets on them
send and see everything. Each script has hosts and remotes of its own, so thousands can be played one after the other
without waiting for anybody's timer. What a gateway does with a packet is written down as a list of :class:`Seen`, in
which its choice of external ports is replaced by whose they are: so gateways can be compared.
"""

import contextlib
import itertools
import os
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

from netkit import new_prefix
from scapy.layers.inet import IP, TCP, UDP

from xdpmasq import presence
from xdpmasq.lab import netns

End = Literal["lan", "wan"]

GATE, PUBLIC = "172.16.0.1", "203.0.113.1"
MACS = {
    end: (f"02:00:00:00:{n}:01", f"02:00:00:00:{n}:02") for n, end in enumerate(("lan", "wan"), 10)
}  # gate, other
FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32
ICMP, TCP_, UDP_ = 1, 6, 17
WITH_PORTS = (ICMP, TCP_, UDP_)
ERRORS = (3, 11, 12)
TIMESTAMP_REPLY = 14  # whose times differ
OWN_TTL = 64  # of what the gateway itself sends; nothing that is forwarded has it
ROUTE_MTU = 600  # towards some remotes
NOBODYS_PORT = 7  # where nothing listens and nothing is mapped
PATIENCE_S = 1.0
SCRIPTS_AT_ONCE = 4000  # whose sessions are left in the tables


# --- scripts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packet:
    """A packet between an endpoint inside and one outside.

    Attributes:
        inward: from the remote to the host's external endpoint, as this remote knows it (or any other, or none).
        host, remote: which of the script's. Remote 2 is behind an MTU of 600; GATE and PUBLIC are the gateway itself.
        port, rport: the host's and the remote's; a query's identifier is the host's.
        kind: type and code of other ICMP than queries and answers.
        seq, ack: beside what is right, by so much.
        check: "wrong" by one, or "none" (UDP).
        cuts: bytes of payload at which it is cut into fragments, in eighths; ``order`` in which these are sent.
        turned: to the external endpoint of this other host, from inside (a hairpin).
        source: somebody else's address, in the source field; ``bare``: to the host's internal address from outside.
    """

    inward: bool = False
    proto: int = UDP_
    host: int = 0
    port: int = 5000
    remote: int | str = 0
    rport: int = 53
    flags: int = ACK
    seq: int = 0
    ack: int = 0
    kind: tuple[int, int] | None = None
    size: int = 8
    ttl: int = 64
    tos: int = 0
    df: bool = False
    options: bytes = b""
    check: Literal["right", "wrong", "none"] = "right"
    cuts: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    turned: int | None = None
    source: str | None = None
    bare: bool = False

    def __repr__(self) -> str:
        return _briefly(self)


@dataclass(frozen=True)
class Error:
    """An ICMP error about what an earlier step brought across.

    Attributes:
        about: which step, counted back from here.
        by_router: and not by the addressee.
        rest: the second word of its header (RFC 1191: the MTU).
        quoted: bytes of the packet after its IP header.
        spoiled: the outer checksum, or a part of the quote that makes it another packet's.
    """

    about: int = 1
    kind: tuple[int, int] = (3, 3)
    by_router: bool = False
    rest: int = 0
    quoted: int = 8
    spoiled: Literal["", "check", "quoted check", "port", "sequence", "address"] = ""

    def __repr__(self) -> str:
        return _briefly(self)


def _briefly(step: "Step") -> str:
    """As it would be written: what is not as usual."""
    said = [
        f"{each.name}={getattr(step, each.name)!r}"
        for each in fields(step)
        if getattr(step, each.name) != each.default
    ]
    return f"{type(step).__name__}({', '.join(said)})"


Step = Packet | Error
Script = Sequence[Step]


# --- what is seen ----------------------------------------------------------------------------------


class Seen(NamedTuple):
    """One datagram that came out, with its names instead of its addresses and ports.

    Attributes:
        whole: all its fragments came; otherwise the rest says nothing.
        same_id: the identifier is that of the step's packet, and not by chance.
        checks: what its checksums add up to, of the IP header and of the rest; 0 is right, None is none.
        head: of the transport: ports by name, numbers, flags.
        body: the rest, of an error what it quotes.
    """

    end: str
    src: str
    dst: str
    proto: int
    ttl: int
    tos: int
    df: bool
    same_id: bool
    options: bytes
    checks: tuple[int | None, ...]
    head: tuple[Any, ...]
    body: Any
    whole: bool = True


def full_sum(data: bytes) -> int:
    """One's complement sum of the 16-bit words, 0 where a checksum inside is right."""
    if len(data) % 2:
        data += b"\0"
    return sum(struct.unpack(f"!{len(data) // 2}H", data)) % 0xFFFF


def header_of(packet: bytes) -> int:
    return (packet[0] & 15) * 4


def fragment_of(packet: bytes) -> tuple[int, bool]:
    """Its place in bytes, and whether more follow."""
    word = int.from_bytes(packet[6:8], "big")
    return (word & 0x1FFF) * 8, bool(word & 0x2000)


def segment_sum(packet: bytes, segment: bytes, length: int | None = None) -> int | None:
    at = {ICMP: 2, TCP_: 16, UDP_: 6}.get(packet[9])
    if at is None or len(segment) < at + 2 or (packet[9] == UDP_ and segment[6:8] == b"\0\0"):
        return None
    if packet[9] == ICMP:
        return full_sum(segment)
    pseudo = packet[12:20] + struct.pack("!HH", packet[9], len(segment) if length is None else length)
    return full_sum(pseudo + segment)


def reassembled(packets: Sequence[bytes]) -> list[tuple[bytes, bool]]:
    """Datagrams and whether they are whole, in the order of their first pieces."""
    found: dict[tuple[bytes, ...], list[bytes]] = {}
    for n, packet in enumerate(packets):
        is_piece = fragment_of(packet) != (0, False)
        key = (packet[12:20], packet[4:6], packet[9:10]) if is_piece else (bytes([n]),)
        found.setdefault(key, []).append(packet)
    return [_joined(pieces) for pieces in found.values()]


def _joined(pieces: Sequence[bytes]) -> tuple[bytes, bool]:
    pieces = sorted(pieces, key=fragment_of)
    text, is_end = b"", False
    for piece in pieces:
        place, more = fragment_of(piece)
        if place != len(text):
            return pieces[0], False
        text += piece[header_of(piece) :]
        is_end = not more
    return pieces[0][: header_of(pieces[0])] + text, is_end


# --- a gateway and its network ---------------------------------------------------------------------


class Network:
    """A gateway between two ends; a context manager.

    Args:
        kind: "kernel" masquerades with nftables; "tc" and "xdp" are xdpmasq's modes.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        prefix = new_prefix()
        self.gate, self.ends = f"{prefix}-{kind}-gate", f"{prefix}-{kind}-ends"
        self._sockets: dict[End, socket.socket] = {}
        # By class and external port, whose it is. Ours are nobody else's; the kernel shares them among remotes.
        self.taken: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __enter__(self) -> "Network":
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for each in self._sockets.values():
            each.close()
        netns.end_processes([self.gate, self.ends])
        netns.delete([self.gate, self.ends])
        presence.sweep()

    def _build(self) -> None:
        netns.ip_batch(f"netns add {name}" for name in (self.gate, self.ends))
        for name in (self.gate, self.ends):
            netns.set_sysctls(name, {f"net/ipv6/conf/{which}/disable_ipv6": 1 for which in ("all", "default")})
        netns.ip_batch(
            f"link add {end}0 netns {self.gate} address {here} type veth"
            f" peer name {end}0 netns {self.ends} address {there}"
            for end, (here, there) in MACS.items()
        )
        netns.ip_batch([f"link set {end}0 arp off up" for end in MACS], self.ends)
        netns.ip_batch(
            [
                "link set lo up",
                *(f"link set {end}0 up" for end in MACS),
                f"addr add {GATE}/24 dev lan0",
                f"addr add {PUBLIC}/24 dev wan0",
                f"neigh add 172.16.0.2 lladdr {MACS['lan'][1]} dev lan0 nud permanent",
                f"neigh add 203.0.113.254 lladdr {MACS['wan'][1]} dev wan0 nud permanent",
                "route add 10.0.0.0/8 via 172.16.0.2",
                "route add default via 203.0.113.254",
                f"route add 198.18.0.0/15 via 203.0.113.254 mtu {ROUTE_MTU}",
            ],
            self.gate,
        )
        # Else the kernel keeps its ICMP errors back.
        limits = {"icmp_ratelimit": 0, "icmp_msgs_per_sec": 1_000_000, "icmp_msgs_burst": 1_000_000}
        netns.set_sysctls(self.gate, {f"net/ipv4/{name}": value for name, value in limits.items()})
        for end in MACS:
            self._run(self.ends, "ethtool", "-K", f"{end}0", "gro", "on", "tx", "off", "tso", "off", "gso", "off")
        if self.kind == "kernel":
            netns.set_sysctls(self.gate, {"net/ipv4/ip_forward": 1})
            chain = 'type nat hook postrouting priority srcnat; oifname "wan0" masquerade;'
            self._run(self.gate, "nft", f"table ip nat {{ chain postrouting {{ {chain} }}; }}")
        else:
            self._run(
                self.gate,
                sys.executable,
                "-m",
                "xdpmasq",
                "attach",
                "--wan",
                "wan0",
                "--lan",
                "lan0",
                "--mode",
                self.kind,
            )
        with netns.entered(self.ends):
            for end in MACS:
                made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
                made.bind((f"{end}0", 0x0800))
                made.setblocking(False)
                self._sockets[end] = made
        self._open_markers()

    def _run(self, name: str, *argv: str) -> str:
        done = subprocess.run(
            ["ip", "netns", "exec", name, *argv], capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, f"{argv}: {done.stderr}{done.stdout}"
        return done.stdout

    def forget(self) -> None:
        """Everything that was opened."""
        if self.kind == "kernel":
            self._run(self.gate, "conntrack", "--flush")
        else:
            self._run(self.gate, sys.executable, "-m", "xdpmasq", "sessions", "flush", "--all")
        self.taken.clear()
        self._open_markers()

    # sending and seeing

    def _open_markers(self) -> None:
        self._marks: dict[End, bytes] = {}
        out = bytes(IP(src="10.0.0.9", dst="11.255.255.9") / UDP(sport=9, dport=9) / b"marker")
        self._marks["lan"] = out
        self.send("lan", out)
        deadline = time.monotonic() + PATIENCE_S
        while not (seen := [packet for packet in self._received("wan") if packet[9] == UDP_]):
            assert time.monotonic() < deadline, "the gateway does not work at all"
        port = int.from_bytes(seen[0][20:22], "big")
        self._marks["wan"] = bytes(IP(src="11.255.255.9", dst=PUBLIC) / UDP(sport=9, dport=port) / b"marker")
        for end in MACS:  # both ways, so that the kernel keeps the session
            self.settle(end)

    def send(self, end: End, packet: bytes) -> None:
        here, there = MACS[end]
        frame = bytes.fromhex((here + there).replace(":", "")) + b"\x08\x00" + packet
        self._sockets[end].send(frame)

    def settle(self, end: End) -> list[tuple[End, bytes]]:
        """What came out at both ends, up to a marker sent after the packets."""
        other: End = "wan" if end == "lan" else "lan"
        self.send(end, self._marks[end])
        seen: list[tuple[End, bytes]] = []
        deadline = time.monotonic() + PATIENCE_S
        while True:
            packets = self._received(other)
            seen += [(other, packet) for packet in packets if not packet.endswith(b"marker")]
            if any(packet.endswith(b"marker") for packet in packets):
                break
            assert time.monotonic() < deadline, f"{self.kind}: the marker was lost"
        return seen + self.more()

    def more(self) -> list[tuple[End, bytes]]:
        """What has come since."""
        return [(end, packet) for end in MACS for packet in self._received(end)]

    def _received(self, end: End) -> list[bytes]:
        packets = []
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = self._sockets[end].recv(65536)[14:]
                packets.append(packet[: int.from_bytes(packet[2:4], "big")])
        return packets


# --- one script in one network ---------------------------------------------------------------------


class Play:
    """A script under way: its addresses, its connections, what each gateway chose.

    Args:
        number: scripts with different numbers do not meet.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        base = 0x0A010000 + 8 * number
        self.hosts = [_dotted(base + n) for n in range(4)]
        self.inner_router = _dotted(base + 7)
        far, narrow = 0x0B000000 + 4 * number, 0xC6120000 + number
        self.remotes = [_dotted(far), _dotted(far + 1), _dotted(narrow)]
        self.outer_router = _dotted(far + 3)
        self.names = {socket.inet_aton(GATE): "gate", socket.inet_aton(PUBLIC): "public"}
        for name, addresses in (("host", self.hosts), ("remote", self.remotes)):
            self.names |= {socket.inet_aton(each): f"{name} {n}" for n, each in enumerate(addresses)}
        self.names[socket.inet_aton(self.inner_router)] = "inner router"
        self.names[socket.inet_aton(self.outer_router)] = "outer router"
        self.next_seq: dict[tuple[Any, ...], list[int]] = {}
        self.step = 0
        self.views: dict[str, View] = {}

    def view(self, network: Network) -> "View":
        if network.kind not in self.views:
            self.views[network.kind] = View(self, network)
        return self.views[network.kind]

    def play(self, step: Step, networks: Sequence[Network]) -> dict[str, list[Seen]] | None:
        """What each gateway does with this step, or None when there is nothing to send."""
        self.step += 1
        views = [self.view(network) for network in networks]
        end, frames = self._frames(step, views)
        if not all(frames):
            for view in views:
                view.crossed.append(None)
            return None
        for view, packets in zip(views, frames, strict=True):
            for packet in packets:
                view.network.send(end, packet)
        result = {}
        for view in views:
            raw = view.ours(view.network.settle(end))
            view.crossed.append(next((packet for out, packet in raw if out != end), None))
            view.pieces = raw
            result[view.network.kind] = view.look(step, raw)
        return result

    def _frames(self, step: Step, views: Sequence["View"]) -> tuple[End, list[list[bytes]]]:
        if isinstance(step, Error):
            ends = [view.error_end(step) for view in views]
            return ends[0] or "lan", [
                view.error(step) if end == ends[0] and end else [] for view, end in zip(views, ends, strict=True)
            ]
        numbers = self._sequence(step)
        return "wan" if step.inward else "lan", [view.packet(step, *numbers) for view in views]

    def _sequence(self, step: Packet) -> tuple[int, int]:
        key = (step.host, step.port, step.remote, step.rport)
        ends = self.next_seq.setdefault(key, [1_000_000, 9_000_000])
        mine, other = (1, 0) if step.inward else (0, 1)
        seq, ack = ends[mine], ends[other]
        if step.proto == TCP_ and not step.seq and not step.flags & RST:
            ends[mine] += step.size + bool(step.flags & SYN) + bool(step.flags & FIN)
        return (seq + step.seq) % 2**32, (ack + step.ack) % 2**32 if step.flags & ACK else 0


class View:
    """A script as one gateway sees it: external ports, and what crossed it."""

    def __init__(self, play: Play, network: Network) -> None:
        self.script, self.network = play, network
        self.ports: dict[tuple[Any, ...], int] = {}  # (proto, host, port, remote, rport) → external
        self.crossed: list[bytes | None] = []
        self.pieces: list[tuple[End, bytes]] = []

    def ours(self, raw: Sequence[tuple[End, bytes]]) -> list[tuple[End, bytes]]:
        """What is of this script, and no late word about another's fragments."""
        names = self.script.names.keys() - {socket.inet_aton(GATE), socket.inet_aton(PUBLIC)}
        return [(end, packet) for end, packet in raw if not names.isdisjoint((packet[12:16], packet[16:20]))]

    def wait(self) -> None:
        """Takes in what has come since."""
        self.pieces += self.ours(self.network.more())

    # building packets

    def external(self, proto: int, host: int, port: int, remote: Any, rport: int) -> int:
        """The external port of a host's endpoint as a remote knows it, or as others do, or one that nobody has."""
        exact = self.ports.get((proto, host, port, remote, rport))
        if exact is not None:
            return exact
        return next((value for key, value in self.ports.items() if key[:3] == (proto, host, port)), NOBODYS_PORT)

    def packet(self, step: Packet, seq: int, ack: int) -> list[bytes]:
        script = self.script
        remote = step.remote if isinstance(step.remote, str) else script.remotes[step.remote]
        near, far = (step.port, step.rport)
        src, dst = script.hosts[step.host], remote
        if step.turned is not None:
            dst, far = PUBLIC, self.external(step.proto, step.turned, step.port, None, 0)
        if step.inward:
            near = (
                step.port if step.bare else self.external(step.proto, step.host, step.port, step.remote, step.rport)
            )
            src, dst = remote, script.hosts[step.host] if step.bare else PUBLIC
        segment = self._segment(step, (far, near) if step.inward else (near, far), near, seq, ack)
        src = step.source or src
        segment = _with_check(segment, src, dst, step)
        return _fragments(step, src, dst, script.step, segment)

    def _segment(self, step: Packet, ports: tuple[int, int], number: int, seq: int, ack: int) -> bytes:
        text = bytes((self.script.step * 7 + n) % 251 for n in range(step.size))
        if step.proto == TCP_:
            return bytes(TCP(sport=ports[0], dport=ports[1], flags=step.flags, seq=seq, ack=ack, chksum=0)) + text
        if step.proto == UDP_:
            return struct.pack("!4H", *ports, 8 + len(text), 0) + text
        if step.proto == ICMP:
            kind = step.kind or ((0, 0) if step.inward else (8, 0))
            return struct.pack("!BBHHH", *kind, 0, number, self.script.step) + text
        return text

    def error_end(self, step: Error) -> End | None:
        """Where an error about that step comes from: behind the gateway, as seen from its sender."""
        crossed = self._crossed(step)
        if not crossed:
            return None
        return "wan" if crossed[12:16] == socket.inet_aton(PUBLIC) else "lan"

    def _crossed(self, step: Error) -> bytes | None:
        at = len(self.crossed) - step.about
        return self.crossed[at] if at >= 0 else None

    def error(self, step: Error) -> list[bytes]:
        quoted = self._crossed(step)
        assert quoted
        script = self.script
        outside = quoted[12:16] == socket.inet_aton(PUBLIC)
        router = script.outer_router if outside else script.inner_router
        src = router if step.by_router else socket.inet_ntoa(quoted[16:20])
        text = bytearray(quoted[: header_of(quoted) + step.quoted])
        at = header_of(quoted)
        if step.spoiled == "quoted check":
            text[10] ^= 1
        elif step.spoiled == "port":
            text[at] ^= 0x55
            text[at + 4] ^= 0x55
        elif step.spoiled == "sequence":
            text[at + 4] ^= 0x40
        elif step.spoiled == "address":
            text[18] ^= 0x40
            text[10:12] = b"\0\0"
            text[10:12] = ((0xFFFF - full_sum(bytes(text[:at]))) & 0xFFFF).to_bytes(2, "big")
        message = struct.pack("!BBHI", *step.kind, 0, step.rest) + bytes(text)
        check = (0xFFFF - full_sum(message)) ^ (step.spoiled == "check")
        message = message[:2] + check.to_bytes(2, "big") + message[4:]
        header = IP(src=src, dst=socket.inet_ntoa(quoted[12:16]), id=script.step, proto=ICMP, len=20 + len(message))
        return [bytes(header) + message]

    # looking at what came

    def look(self, step: Step, raw: Sequence[tuple[End, bytes]]) -> list[Seen]:
        found = []
        for end in MACS:
            for packet, whole in reassembled([each for at, each in raw if at == end]):
                found.append(self._seen(step, end, packet, whole))
        return sorted(found, key=repr)

    def _seen(self, step: Step, end: str, packet: bytes, whole: bool) -> Seen:
        at = header_of(packet)
        segment, proto = packet[at:], packet[9]
        self._learn(step, end, packet, segment)
        src, dst = self._name(packet[12:16]), self._name(packet[16:20])
        header = packet[:at]
        body: Any = segment
        head: tuple[Any, ...] = ()
        if proto in (TCP_, UDP_):
            head = self._ports(end, proto, packet, segment) + self._numbers(proto, segment)
            body = segment[20 if proto == TCP_ else 8 :]
        elif proto == ICMP and segment[0] in ERRORS:
            head, body = (*segment[:2], segment[4:8]), self._quoted(end, segment[8:])
        elif proto == ICMP:
            head = (*segment[:2], self._number(end, packet, segment), segment[6:8])
            body = segment[8:12] if segment[0] == TIMESTAMP_REPLY else segment[8:]
        return (
            Seen(
                end=end,
                src=src,
                dst=dst,
                proto=proto,
                ttl=packet[8],
                tos=packet[1],
                df=bool(packet[6] & 0x40),
                same_id=int.from_bytes(packet[4:6], "big") == self.script.step and packet[8] != OWN_TTL,
                options=packet[20:at],
                checks=(full_sum(header), segment_sum(packet, segment)),
                head=head,
                body=body if isinstance(body, tuple) or len(body) < 20 else f"{len(body)} bytes, {zlib.crc32(body)}",
            )
            if whole
            else Seen(end, src, dst, proto, 0, 0, False, True, b"", (), (), b"", whole=False)
        )

    def _name(self, address: bytes) -> str:
        return self.script.names.get(address) or socket.inet_ntoa(address)

    def _learn(self, step: Step, end: str, packet: bytes, segment: bytes) -> None:
        """An outward packet shows which external port its host has got."""
        if not isinstance(step, Packet) or step.inward or end != "wan" or packet[9] != step.proto or len(segment) < 6:
            return
        if step.proto not in WITH_PORTS or packet[12:16] != socket.inet_aton(PUBLIC):
            return
        if step.proto == ICMP and segment[0] != 8:
            return
        port = int.from_bytes(segment[4:6] if step.proto == ICMP else segment[:2], "big")
        rport = 0 if step.proto == ICMP else step.rport
        self.ports[step.proto, step.source or step.host, step.port, step.remote, step.rport] = port
        remote = packet[16:20]
        key = (step.proto, port, remote, rport) if self.network.kind == "kernel" else (step.proto, port)
        owner = (step.source, step.port) if step.source else (self.script.number, step.host, step.port)
        assert self.network.taken.setdefault(key, owner) == owner, (
            f"{key} belongs to {self.network.taken[key]} and {owner}"
        )

    def _port(self, end: str, proto: int, port: int, remote: bytes, rport: int) -> int | str:
        """Whose external port it is. Best as this remote knows it: the kernel gives several hosts one, for different
        remotes.
        """
        if end != "wan":
            return port
        owners = [key for key, value in self.ports.items() if (key[0], value) == (proto, port)]
        known = [key for key in owners if (self._address(key[3]), key[4]) == (remote, rport or key[4])]
        return next((f"of {key[1]}:{key[2]}" for key in known + owners), port)

    def _address(self, remote: int | str) -> bytes:
        return socket.inet_aton(remote if isinstance(remote, str) else self.script.remotes[remote])

    def _ports(self, end: str, proto: int, packet: bytes, segment: bytes) -> tuple[int | str, int | str]:
        sport, dport = struct.unpack("!HH", segment[:4])
        if self._name(packet[12:16]) == "public":
            return self._port(end, proto, sport, packet[16:20], dport), dport
        if self._name(packet[16:20]) == "public":
            return sport, self._port(end, proto, dport, packet[12:16], sport)
        return sport, dport

    def _number(self, end: str, packet: bytes, segment: bytes) -> int | str:
        """Whose query."""
        remote = packet[16:20] if self._name(packet[12:16]) == "public" else packet[12:16]
        return self._port(end, ICMP, int.from_bytes(segment[4:6], "big"), remote, 0)

    def _numbers(self, proto: int, segment: bytes) -> tuple[Any, ...]:
        if proto == UDP_:
            return (segment[4:6],)
        return (*struct.unpack("!IIHH", segment[4:16]), segment[18:20]) if len(segment) >= 20 else (segment[4:],)

    def _quoted(self, end: str, packet: bytes) -> tuple[Any, ...]:
        """A quoted packet, as far as it goes."""
        at = header_of(packet)
        segment, proto = packet[at:], packet[9]
        head: tuple[Any, ...] = ()
        rest = segment
        if proto in (TCP_, UDP_) and len(segment) >= 4:
            head, rest = self._ports(end, proto, packet, segment), segment[4:]
            where = 12 if proto == TCP_ else 2
            rest = rest[:where] + rest[where + 2 :]
        elif proto == ICMP and len(segment) >= 8:
            head = (*segment[:2], self._number(end, packet, segment))
            rest = segment[6:]
        length = packet[2:4] if fragment_of(packet) == (0, False) else b""  # the kernel cuts anew where it can
        header = (packet[:2], length, packet[6:10])
        claimed = int.from_bytes(packet[2:4], "big") - at if length else 0
        sums = (full_sum(packet[:at]), segment_sum(packet, segment, claimed))
        text = rest if len(rest) < 20 else f"{len(rest)} bytes, {zlib.crc32(rest)}"
        return (self._name(packet[12:16]), self._name(packet[16:20]), *header, packet[20:at], *head, text, sums)


def _dotted(number: int) -> str:
    return socket.inet_ntoa(number.to_bytes(4, "big"))


def _with_check(segment: bytes, src: str, dst: str, step: Packet) -> bytes:
    at = {ICMP: 2, TCP_: 16, UDP_: 6}.get(step.proto)
    if at is None or step.check == "none":
        return segment
    pseudo = socket.inet_aton(src) + socket.inet_aton(dst) + struct.pack("!HH", step.proto, len(segment))
    padded = segment + b"\0" * (len(segment) % 2)
    check = (0xFFFF - full_sum(padded + (pseudo if step.proto != ICMP else b""))) or 0xFFFF
    if step.check == "wrong":
        check ^= 0x0101
    return segment[:at] + check.to_bytes(2, "big") + segment[at + 2 :]


def _fragments(step: Packet, src: str, dst: str, number: int, segment: bytes) -> list[bytes]:
    cuts = [0, *sorted({cut * 8 for cut in step.cuts if 0 < cut * 8 < len(segment)}), len(segment)]
    options = step.options + b"\0" * (-len(step.options) % 4)
    pieces = []
    for start, end in itertools.pairwise(cuts):
        word = start // 8 | 0x2000 * (end < len(segment)) | 0x4000 * step.df
        length = 20 + len(options) + end - start
        header = struct.pack(
            "!BBHHHBBH", 0x45 + len(options) // 4, step.tos, length, number, word, step.ttl, step.proto, 0
        )
        header += socket.inet_aton(src) + socket.inet_aton(dst) + options
        check = 0xFFFF - full_sum(header)
        pieces.append(header[:10] + check.to_bytes(2, "big") + header[12:] + segment[start:end])
    return [pieces[n] for n in step.order if n < len(pieces)] if step.order else pieces


@contextlib.contextmanager
def networks(*kinds: str) -> Iterator[list[Network]]:
    """Networks that stand side by side; this thread stays on one CPU, on which everything it sends is carried."""
    before = os.sched_getaffinity(0)
    with contextlib.ExitStack() as stack:
        built = [stack.enter_context(Network(kind)) for kind in kinds]
        stack.callback(os.sched_setaffinity, 0, before)
        os.sched_setaffinity(0, {max(before)})
        yield built
