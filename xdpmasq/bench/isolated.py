"""``--scenario isolated``: each program of ours by itself, under BPF_PROG_TEST_RUN, on an established flow's frame.

The programs are those that are attached, with their tables. A test run hands the packet on to its next repetition
as the program left it, so a small program first writes the frame anew and then jumps to the one that is measured;
what it costs with an empty one behind it is taken off. What comes out is checked.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from xdpmasq import bpf, datapath
from xdpmasq.bench import figures, measure, turns
from xdpmasq.bench.generator import DIRECTIONS, SMALLEST_FRAME
from xdpmasq.bench.report import Column, Drawing, Line, Section
from xdpmasq.bench.stage import Lane, Stage
from xdpmasq.bench.topology import HOST_BASE, HOST_PORT, MACS, PUBLIC_ADDR, REMOTE_BASE, REMOTE_PORT, TTL
from xdpmasq.bench.turns import Case
from xdpmasq.errors import HostError, MasqError
from xdpmasq.net import netdev

_REPEAT = 500_000
_TRIES = 3
_XDP_REDIRECT = 4
_IFINDEX_OF_SKB, _SKB_BYTES = 40, 192  # of struct __sk_buff
_IP_AT, _UDP_AT = 14, 34  # in a frame
End = tuple[int, int]  # address and port


@dataclass(frozen=True)
class _Program:
    """A program, where it is attached, and what a packet of flow 0 looks like there.

    Attributes:
        inside, after: the inner side's endpoint before and behind it, by the names of :func:`_ends`.
    """

    name: str
    kind: Literal["xdp", "tc"]
    port: Literal["lan0", "wan0"]
    direction: Literal["out", "in"]
    inside: str
    after: str


_PROGRAMS = (
    _Program("masq_xdp", "xdp", "lan0", "out", "host", "public"),
    _Program("masq_xdp", "xdp", "wan0", "in", "public", "host"),
    _Program("masq_lan_lean", "tc", "lan0", "out", "host", "host"),
    _Program("masq_wan_out", "tc", "wan0", "out", "host", "public"),
    _Program("masq_wan_in", "tc", "wan0", "in", "public", "host"),
    _Program("masq_lan_out", "tc", "lan0", "in", "host", "host"),
)


def run(stage: Stage) -> Iterator[Section]:
    """A line for each program of each of our modes."""
    flows = max(stage.settings.flows or (1,))
    lines: list[Line] = []
    lanes = stage.lanes(lambda each: each.is_ours)
    stage.expect(len(lanes))
    for lane in lanes:
        stage.step(lane.name)
        lines += _lines(lane, flows, min(stage.settings.rounds, 5))
    yield Section(
        key="isolated",
        title=f"Each program by itself, {flows:,} flow{'s' * (flows > 1)} open",
        command=f"xdpmasq bench --scenario isolated --flows {flows}",
        columns=(Column("ns a run"), Column("±", ".0%")),
        lines=tuple(lines),
        notes=(
            f"BPF_PROG_TEST_RUN, {_REPEAT:,} runs on one {SMALLEST_FRAME}-byte frame of an established flow, all is "
            "in the caches; medians; without redirecting, sending or receiving.",
        ),
        drawing=Drawing("bars", ("ns a run",), "ns a run"),
    )


def _lines(lane: Lane, flows: int, rounds: int) -> Iterator[Line]:
    if not lane.plays:
        yield Line(lane.name, (None, None), (lane.failure,) if lane.failure else (), lane.absent)
        return
    if problems := turns.opened(lane, Case(flows, SMALLEST_FRAME)).problems:
        yield Line(lane.name, (None, None), problems)
        return
    learned = lane.traffic.maps["ports"].view(writable=False)[0]
    ends = _ends(int(learned["external"]), int.from_bytes(learned["port"].tobytes(), "big"))
    with lane.topology.inside("gate"), measure.pinned(lane.traffic.cpu):
        attached = _attached()
        for program in _PROGRAMS:
            if program.name in attached:
                name = f"{lane.name} {program.name}, {program.direction}"
                try:
                    costs = [_cost(lane, program, attached[program.name], ends) for _ in range(rounds)]
                    yield Line(name, (figures.median(costs), figures.spread(costs)))
                except MasqError as error:
                    yield Line(name, (None, None), (str(error),))


def _ends(external: int, port: int) -> Mapping[str, End]:
    """Of flow 0, inside."""
    return {"host": (HOST_BASE, HOST_PORT), "public": (int(PUBLIC_ADDR) + external, port)}


def _attached() -> dict[str, bpf.Program]:
    programs = [bpf.Program.by_id(number) for link in netdev.links() for number in datapath.program_ids(link)]
    return {program.name: program for program in programs}


def _cost(lane: Lane, program: _Program, measured: bpf.Program, ends: Mapping[str, End]) -> float:
    """Of one run, ns. Raises: HostError: it did to the packet what it should not."""
    for _ in range(_TRIES):
        for direction in DIRECTIONS:  # the agent may have sent all flows through the kernel again, even just now
            lane.traffic.send(direction, lane.traffic.flows, lane.contestant.expected)
        cost, wrong = _measured(lane, program, measured, ends)
        if not wrong:
            return cost
    raise HostError("INVALID", wrong)


def _measured(lane: Lane, program: _Program, measured: bpf.Program, ends: Mapping[str, End]) -> tuple[float, str]:
    """ns a run, and what was wrong with what it made of the packet."""
    frame = _frame(program, ends)
    written = lane.traffic.maps["frame_written"]
    written.set(0, np.frombuffer(frame, written.value)[0])
    alone = lane.traffic.program(f"alone_{program.kind}", program.kind)
    places = lane.traffic.maps[f"{program.kind}_alone"]
    context = _context(program, len(frame))
    places.set(0, lane.traffic.program(f"empty_{program.kind}", program.kind).fd)
    base = alone.test_run(frame, context=context, repeat=_REPEAT).duration_ns
    places.set(0, measured.fd)
    done = alone.test_run(frame, context=context, repeat=_REPEAT)
    return float(done.duration_ns - base), _what_is_wrong(program, done, ends)


def _context(program: _Program, length: int) -> bytes:
    index = netdev.link(program.port).index
    if program.kind == "xdp":
        return struct.pack("=6I", 0, length, 0, index, 0, 0)
    context = bytearray(_SKB_BYTES)
    struct.pack_into("=I", context, _IFINDEX_OF_SKB, index)
    return bytes(context)


def _frame(program: _Program, ends: Mapping[str, End]) -> bytes:
    """A frame of flow 0 as it meets the program."""
    source, destination = ends[program.inside], (REMOTE_BASE, REMOTE_PORT)
    if program.direction == "in":
        source, destination = destination, source
    length = SMALLEST_FRAME - _UDP_AT
    ip = struct.pack("!2B3H2BH2I", 0x45, 0, 20 + length, 0, 0x4000, TTL, 17, 0, source[0], destination[0])
    udp = struct.pack("!4H", source[1], destination[1], length, 0) + bytes(length - 8)
    ip = ip[:10] + _checksum(ip) + ip[12:]
    udp = udp[:6] + _checksum(_pseudo_header(ip, length) + udp) + udp[8:]
    mac = bytes.fromhex(MACS["gate", program.port].replace(":", ""))
    return mac + mac + b"\x08\0" + ip + udp


def _pseudo_header(ip: bytes, length: int) -> bytes:
    return ip[12:20] + struct.pack("!2H", 17, length)


def _checksum(data: bytes) -> bytes:
    """RFC 1071; of data that holds its own checksum, and the right one, it is 0."""
    return struct.pack("!H", (0xFFFF - sum(struct.unpack(f"!{len(data) // 2}H", data)) % 0xFFFF) % 0xFFFF)


def _what_is_wrong(program: _Program, done: bpf.TestRun, ends: Mapping[str, End]) -> str:
    ip, udp = done.data[_IP_AT:_UDP_AT], done.data[_UDP_AT:SMALLEST_FRAME]
    outbound = program.direction == "out"
    address, port = (ip[12:16], udp[:2]) if outbound else (ip[16:20], udp[2:4])
    if (int.from_bytes(address, "big"), int.from_bytes(port, "big")) != ends[program.after]:
        return f"{program.name} left another endpoint than expected"
    if _checksum(ip) != bytes(2) or _checksum(_pseudo_header(ip, len(udp)) + udp) != bytes(2):
        return f"{program.name} left a wrong checksum"
    if program.kind == "xdp" and done.verdict != _XDP_REDIRECT:
        return f"{program.name} answered {done.verdict}"
    return ""
