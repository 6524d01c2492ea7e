#!/usr/bin/env python3
"""How far one gateway goes: sessions, ports, memory, CPU and log volume, for four sizes of network.

    tools/scaling.py            prints the tables of docs/scaling.md
    tools/scaling.py --write    puts them there
    tools/scaling.py --check    exit status 1 when the document says otherwise

What a packet, a new flow and a session cost was measured (docs/measured.json); how many of them a subscriber makes is
assumed (NETWORKS), with its source in the document. Everything else is arithmetic.
"""

import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- tools/scaling.py -->", "<!-- end -->"


@dataclass(frozen=True)
class Measured:
    """By `xdpmasq bench`, in XDP mode: docs/measured.json, which tools/performance.py writes.

    Attributes:
        packet_ns: CPU time for a packet by number of flows open; generator and sink included.
        base_ns: of that, what generator, veth and sink take (the contestant `drop`).
        flow_ns: for a new flow, these included.
        session_bytes: tables, for each place.
        expiry_s: a pass of the agent over a million sessions, once a second.
    """

    packet_ns: tuple[tuple[int, float], ...]
    base_ns: float
    flow_ns: float
    session_bytes: float
    expiry_s: float

    @classmethod
    def read(cls, path: Path) -> "Measured":
        fields = json.loads(path.read_text())
        return cls(**{**fields, "packet_ns": tuple((int(flows), ns) for flows, ns in fields["packet_ns"].items())})


MEASURED = Measured.read(ROOT / "docs" / "measured.json")

PORTS_OF_ADDRESS = 36_280  # 1024 to 65535 without ip_local_port_range, for each protocol
PLACES_OF_ADDRESS = 3 * 65_536  # a session's place for each port of TCP, UDP and ICMP
MOST_FURTHER = 4_194_304  # `sessions.further`
MOST_ADDRESSES = 32
PACKET_BYTES = 800  # mean, both directions
LOG_BYTES = 150  # a line for each session, as RFC 7422 has it
OPENED_A_DAY = 33_000  # sessions of a subscriber, as RFC 7422 has it
UTILISATION = 0.5  # of a core, at the busiest time
MAPPINGS_OF_SESSION = 0.5  # one socket of a host talks to several remotes: QUIC, DNS, peer to peer


@dataclass(frozen=True)
class Network:
    """Assumptions for the busiest hour.

    Attributes:
        sessions: open at once, for each subscriber.
        opened: new ones a second, for each subscriber.
        mbits: both directions together, for each subscriber.
    """

    name: str
    subscribers: int
    sessions: float
    opened: float
    mbits: float


NETWORKS = (
    Network("household", 1, 1000, 10, 100.0),
    Network("office of 100", 100, 150, 2, 5.0),
    Network("10,000 subscribers", 10_000, 100, 1, 2.5),
    Network("1,000,000 subscribers", 1_000_000, 100, 1, 2.5),
)


@dataclass(frozen=True)
class Need:
    """What a network asks of gateways altogether."""

    network: Network

    @property
    def sessions(self) -> float:
        return self.network.subscribers * self.network.sessions

    @property
    def opened(self) -> float:
        return self.network.subscribers * self.network.opened

    @property
    def packets(self) -> float:
        """A second."""
        return self.network.subscribers * self.network.mbits * 1e6 / 8 / PACKET_BYTES

    @property
    def addresses(self) -> int:
        return math.ceil(self.sessions * MAPPINGS_OF_SESSION / PORTS_OF_ADDRESS)

    def cores(self, gateways: int) -> float:
        """Of one of so many gateways, fully used: packets, new flows, and the agent's pass each second."""
        each = self.sessions / gateways
        packets = self.packets / gateways * (packet_ns(each) - MEASURED.base_ns)
        opened = self.opened / gateways * (MEASURED.flow_ns - MEASURED.base_ns)
        return (packets + opened) / 1e9 + MEASURED.expiry_s * each / 1e6

    @property
    def memory(self) -> float:
        """Bytes of tables, in all gateways together."""
        further = max(self.sessions * (1 - MAPPINGS_OF_SESSION), 1024)
        return (self.addresses * PLACES_OF_ADDRESS + further) * MEASURED.session_bytes

    @property
    def gateways(self) -> int:
        """Until each has few enough addresses and sessions for its tables."""
        by_addresses = math.ceil(self.addresses / MOST_ADDRESSES)
        return max(by_addresses, math.ceil(self.sessions * (1 - MAPPINGS_OF_SESSION) / MOST_FURTHER))

    @property
    def log_bytes_of_day(self) -> float:
        """If every session is logged."""
        return self.network.subscribers * OPENED_A_DAY * LOG_BYTES


def packet_ns(flows: float) -> float:
    """Between what was measured, along the logarithm of the number of flows; beyond, on along its last piece."""
    points = MEASURED.packet_ns
    if flows <= points[0][0]:
        return points[0][1]
    for (x, y), (next_x, next_y) in itertools.pairwise(points):
        if flows <= next_x or next_x == points[-1][0]:
            return y + (next_y - y) * math.log(flows / x) / math.log(next_x / x)
    raise AssertionError


def amount(value: float) -> str:
    """Two digits and more, with the unit that suits."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|---|{'---:|' * (len(heads) - 1)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def tables() -> str:
    """Everything between the document's marks."""
    needs = [Need(network) for network in NETWORKS]
    names = [need.network.name for need in needs]
    assumed = [
        ("sessions open, for each", *(f"{need.network.sessions:g}" for need in needs)),
        ("new sessions a second, for each", *(f"{need.network.opened:g}" for need in needs)),
        ("Mbit/s, both directions, for each", *(f"{need.network.mbits:g}" for need in needs)),
    ]
    needed = [
        ("sessions", *(amount(need.sessions) for need in needs)),
        ("new sessions a second", *(amount(need.opened) for need in needs)),
        ("packets a second", *(amount(need.packets) for need in needs)),
        ("public addresses", *(f"{need.addresses:,}" for need in needs)),
        ("memory, bytes", *(amount(need.memory) for need in needs)),
        ("gateways, by sessions and addresses", *(f"{need.gateways:,}" for need in needs)),
        (
            f"cores of each at {UTILISATION:.0%}",
            *(f"{need.cores(need.gateways) / UTILISATION:.2g}" for need in needs),
        ),
        ("log of all sessions, bytes a day", *(amount(need.log_bytes_of_day) for need in needs)),
    ]
    limits = [
        (f"{flows:,}", f"{packet_ns(flows) - MEASURED.base_ns:,.0f}", core_mpps(flows))
        for flows in (1, 1_000, 30_000, 100_000, 1_000_000)
    ]
    parts = [
        *table(["assumed for the busiest hour", *names], assumed),
        "",
        *table(["follows", *names], needed),
        "",
        *table(["sessions", "ns for a packet", "Mpps of a core"], limits),
    ]
    return "\n".join(parts)


def core_mpps(flows: float) -> str:
    """Million packets a second that one core can translate, fully used."""
    return f"{1e3 / (packet_ns(flows) - MEASURED.base_ns):.2g}"


def renewed(document: str, text: str) -> str:
    """The document with the tables between its marks."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main(words: Sequence[str]) -> int:
    if not words:
        print(tables())  # noqa: T201
        return 0
    document = DOCUMENT.read_text()
    fresh = renewed(document, tables())
    if words[0] == "--write":
        DOCUMENT.write_text(fresh)
        return 0
    return int(fresh != document)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
