"""Traffic in bounded passes: ``traffic.c`` compiled, loaded, wired to the topology, and read out again.

The generators run under ``BPF_PROG_TEST_RUN`` with live frames. Such a run patches its program into the kernel's XDP
dispatcher and sleeps some 20 ms of grace periods for it, at each call, unless the program is in there already
because it is attached to some interface (``bpf_dispatcher_add_prog`` then only counts). So both generators are
attached to held0 and held1, which carry no traffic: a call then costs about 60 µs of CPU time and does not sleep.
"""

from __future__ import annotations

import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from xdpmasq import bpf
from xdpmasq.bench import measure
from xdpmasq.bench.topology import REMOTES, Role, Topology, defines, endpoints, mac_words

Direction = Literal["out", "in"]
DIRECTIONS: tuple[Direction, ...] = ("out", "in")
_INDEX: dict[Direction, int] = {"out": 0, "in": 1}

_TRAFFIC = (Path(__file__).parent / "traffic.c").read_text()
# What can be wrong with a packet, in the order of the C enum.
REASONS: tuple[str, ...] = tuple(re.findall(r'X\(\w+, "([^"]+)"\)', _TRAFFIC))

SMALLEST_FRAME, BROADEST_FRAME = 64, 1514  # bytes without the frame check sequence
ETHERNET_HEADER, IP_HEADER = 14, 20
_DRAIN_PATIENCE_S = 0.2

# Where a direction starts and ends: the generator's veth, and the gateway's that it sends to.
_START: dict[Direction, tuple[Role, str]] = {"out": ("lan", "lan0"), "in": ("wan", "wan0")}
_END: dict[Direction, tuple[Role, str]] = {"out": ("wan", "wan0"), "in": ("lan", "lan0")}


@dataclass(frozen=True)
class Expectation:
    """What a packet must look like behind the gateway.

    Attributes:
        translated: inside endpoints become the public address and a port of the gateway's choice.
        hops: by how much the TTL is lowered.
    """

    translated: bool
    hops: int


@dataclass(frozen=True)
class Tally:
    """What one pass sent, and what arrived.

    Attributes:
        checked: of the packets seen, those whose ports and checksums were checked too.
        wrong: packets by reason; only reasons that occurred.
        strange: packets at the sink that the generator did not make.
    """

    direction: Direction
    sent: int
    seen: int
    checked: int
    strange: int
    wrong: dict[str, int]
    usage: measure.Usage

    @property
    def problems(self) -> list[str]:
        """What makes this pass invalid, in words."""
        found = []
        if self.seen < self.sent:
            found.append(f"{self.sent - self.seen:,} of {self.sent:,} {self.direction}bound packets lost")
        if self.seen > self.sent:
            found.append(f"{self.seen - self.sent:,} more {self.direction}bound packets than were sent")
        found.extend(
            f"{count:,} of {self.seen:,} {self.direction}bound packets with a wrong {reason}"
            for reason, count in self.wrong.items()
        )
        return found


class Traffic:
    """Generators and sinks for a topology; compiled at once, attached by :meth:`wire`.

    Args:
        cpu: the core on which all of it runs.

    Raises:
        HostError, DatapathError: as :func:`xdpmasq.bpf.compile`.
    """

    def __init__(self, topology: Topology, cpu: int) -> None:
        self.topology = topology
        self.cpu = cpu
        self.flows = 1
        self.frame_bytes = SMALLEST_FRAME
        self._clock = measure.CoreClock(cpu)
        self._object = bpf.compile(_TRAFFIC, defines(topology.externals))
        self.maps = self._object.maps
        self._programs: dict[str, bpf.Program] = {}
        self._turn = 0
        self._wired = False
        self._prepare_redirect()

    def program(self, function: str, kind: Literal["xdp", "tc"] = "xdp") -> bpf.Program:
        """A function of ``traffic.c``, loaded at its first use and kept."""
        if function not in self._programs:
            self._programs[function] = self._object.load(function, kind)
        return self._programs[function]

    def _prepare_redirect(self) -> None:
        for direction, number in _INDEX.items():
            end, far_port = _END[direction]
            # A devmap takes the index of an interface in the namespace of the caller, and keeps the device.
            with self.topology.inside("gate"):
                self.maps["gate_outlets"].set(number, socket.if_nametoindex(far_port))
            macs = np.zeros((), self.maps["gate_macs"].value)
            macs["dst"], macs["src"] = mac_words(end, far_port), mac_words("gate", far_port)
            self.maps["gate_macs"].set(number, macs)

    def wire(self) -> None:
        """Attaches generators and sinks; from now on the sinks take everything, and sockets hear nothing."""
        if self._wired:
            return
        for direction, number in _INDEX.items():
            (start, port), (end, far_port) = _START[direction], _END[direction]
            with self.topology.inside(start):
                self.maps["outlets"].set(number, socket.if_nametoindex(port))
            self.topology.attach_xdp(end, far_port, self.program(f"sink_{direction}").fd)
            self.topology.attach_xdp("lan", f"held{number}", self.program(f"generate_{direction}").fd)
        self._wired = True

    def unwire(self) -> None:
        """Takes them away again."""
        if not self._wired:
            return
        for direction, number in _INDEX.items():
            end, far_port = _END[direction]
            self.topology.detach_xdp(end, far_port, self.program(f"sink_{direction}").fd)
            self.topology.detach_xdp("lan", f"held{number}", self.program(f"generate_{direction}").fd)
        self._wired = False

    def begin(self, flows: int, frame_bytes: int) -> None:
        """From now on so many flows, one packet of each in turn, in frames of that (even) length.

        What was learned of ports is forgotten: they are given anew.
        """
        self.flows, self.frame_bytes = flows, frame_bytes
        self._turn += 1
        for number in _INDEX.values():
            self.maps["places"].set(number, 0)

    def send(self, direction: Direction, packets: int, expected: Expectation, *, check_every: int = 1) -> Tally:
        """One pass: sends the packets, waits until they have arrived, and tells what became of them.

        Args:
            check_every: one packet in so many has its ports and checksums checked; lengths, addresses and
                TTL are checked in every packet. With 1, the gateway's choice of ports is learned, which inbound
                packets to a translating gateway need. Best coprime to the number of flows.
        """
        self._describe(direction, expected, check_every)
        generator = self.program(f"generate_{direction}")
        before = self._tally(direction)
        with measure.pinned(self.cpu):
            started = self._clock.read()
            generator.test_run(bytes(self.frame_bytes), repeat=packets, flags=bpf.LIVE_FRAMES)
            usage = self._clock.read() - started
            after = self._tally(direction)
            if after["seen"] - before["seen"] < packets:
                # Rare: the last batch was left to ksoftirqd.
                usage, after = self._drain(direction, int(before["seen"]) + packets, started)
        wrong = after["wrong"].astype(np.int64) - before["wrong"].astype(np.int64)
        return Tally(
            direction=direction,
            sent=packets,
            seen=int(after["seen"] - before["seen"]),
            checked=int(after["checked"] - before["checked"]),
            strange=int(after["strange"] - before["strange"]),
            wrong={reason: int(count) for reason, count in zip(REASONS, wrong, strict=True) if count},
            usage=usage,
        )

    def _drain(self, direction: Direction, goal: int, started: measure.Usage) -> tuple[measure.Usage, Any]:
        deadline = time.monotonic() + _DRAIN_PATIENCE_S
        while (after := self._tally(direction))["seen"] < goal and time.monotonic() < deadline:
            pass  # not sleeping: the time asleep would count as presence
        return self._clock.read() - started, after

    def _tally(self, direction: Direction) -> Any:
        return self.maps["tallies"].get(_INDEX[direction])

    def _describe(self, direction: Direction, expected: Expectation, check_every: int) -> None:
        start, port = _START[direction]
        entry = np.zeros((), self.maps["passes"].value)
        entry["mac_dst"], entry["mac_src"] = mac_words("gate", port), mac_words(start, port)
        entry["ip_length"] = socket.htons(self.frame_bytes - ETHERNET_HEADER)
        entry["udp_length"] = socket.htons(self.frame_bytes - ETHERNET_HEADER - IP_HEADER)
        entry["flows"], entry["turn"], entry["sample_every"] = self.flows, self._turn, check_every
        entry["translated"], entry["hops"] = expected.translated, expected.hops
        self.maps["passes"].set(0, entry)

    def port_problems(self) -> list[str]:
        """What is wrong with the ports learned in this turn: flows without one, or two with the same endpoint."""
        learned = self.maps["ports"].view(writable=False)[: self.flows]
        known = learned["turn"] == self._turn
        found = []
        if missing := int(self.flows - known.sum()):
            found.append(f"no translated packet of {missing:,} of {self.flows:,} flows")
        numbers = np.arange(self.flows, dtype=np.uint64)
        remotes = numbers // endpoints(self.topology.externals) * REMOTES + numbers % REMOTES
        # remote, external address and port in one number
        ends = (remotes << 32 | learned["external"].astype(np.uint64) << 16 | learned["port"])[known]
        if shared := len(ends) - len(np.unique(ends)):
            found.append(f"{shared:,} flows share port and remote endpoint with another")
        return found

    def close(self) -> None:
        """Gives back programs and maps; those attached stay until the topology goes."""
        for program in self._programs.values():
            program.close()
        for map_ in self.maps.values():
            map_.close()
