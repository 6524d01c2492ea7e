"""``--scenario tcp``: bulk TCP by iperf3, in bytes for a second of CPU time; both ends and the gateway on one core.

With offloads, super-packets of 64 kB with partial checksums travel, as between virtual machines. Without, every frame
on every wire is at most 1,514 bytes long and carries its checksum, as between machines.

The CPU time is that of both iperf3 processes, which the kernel charges with the softirqs they raise, and ksoftirqd's.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Address
from types import TracebackType
from typing import Any

from xdpmasq.bench import figures, measure
from xdpmasq.bench.contestants import BASE, RIVAL, Contestant
from xdpmasq.bench.report import Column, Drawing, Line, Section
from xdpmasq.bench.stage import Lane, Stage, rotated
from xdpmasq.bench.topology import WAN_SOCKETS, Role, Topology, public_addresses
from xdpmasq.errors import HostError, MasqError
from xdpmasq.lab.errors import wait_until

_STREAMS = (1, 8)
_PORT = 5201
_END_S = 20.0  # beyond the transfer's own length
_ROUNDS = 3
# XDP takes frames as they are on a wire: it would lose the checksum that the sender left to its hardware.
_WIRE_ONLY = "on veth, XDP and partial checksums exclude each other; --mode auto takes TC there"


def run(stage: Stage) -> Iterator[Section]:
    """A table with offloads, and one without."""
    settings = stage.settings
    rounds = min(_ROUNDS, settings.rounds)
    lanes = stage.lanes(lambda each: each.name != BASE, wired=False)
    stage.expect(2 * len(lanes) * rounds * len(_STREAMS))
    for offloads in (True, False):  # off is how the other scenarios want it
        for lane in lanes:
            lane.topology.set_offloads(offloads)
        yield _section(stage, lanes, offloads, rounds)


def _section(stage: Stage, lanes: Sequence[Lane], offloads: bool, rounds: int) -> Section:
    able = [lane for lane in lanes if not (offloads and _needs_wire(lane.contestant))]
    speeds: dict[tuple[str, int], list[float]] = {(lane.name, each): [] for lane in lanes for each in _STREAMS}
    problems: dict[str, list[str]] = {lane.name: [] for lane in lanes}
    for round_ in range(1, rounds + 1):
        for lane in rotated(able, round_ - 1):
            for streams in _STREAMS:
                stage.step(f"offloads {'on' if offloads else 'off'}, round {round_}, {lane.name}, {streams} streams")
                try:
                    speeds[lane.name, streams].append(_transfer(lane, streams, stage.settings.seconds, stage.cpu))
                except MasqError as error:
                    problems[lane.name].append(f"round {round_}, {streams} streams: {error}")
    word = "on" if offloads else "off"
    return Section(
        key=f"tcp/{word}",
        title=f"Bulk TCP, offloads {word}, GB for a second of CPU time",
        command=f"xdpmasq bench --scenario tcp --seconds {stage.settings.seconds} --rounds {stage.settings.rounds}",
        columns=(
            *(Column(f"{each} stream{'s' * (each > 1)}", ".2f") for each in _STREAMS),
            *(Column(f"{each} × {RIVAL}", ".2f") for each in _STREAMS),
        ),
        lines=tuple(_lines(lanes, speeds, problems, offloads)),
        notes=(
            f"Medians of {rounds} transfers of {stage.settings.seconds} s; sender, gateway and receiver on one core.",
        ),
        drawing=Drawing(
            "bars", tuple(f"{each} stream{'s' * (each > 1)}" for each in _STREAMS), "GB for a CPU second"
        ),
    )


def _needs_wire(contestant: Contestant) -> bool:
    return bool(contestant.programs) or contestant.name.endswith("-xdp")


def _lines(
    lanes: Sequence[Lane],
    speeds: Mapping[tuple[str, int], Sequence[float]],
    problems: Mapping[str, Sequence[str]],
    offloads: bool,
) -> Iterator[Line]:
    middle = {key: figures.median(each) for key, each in speeds.items()}
    for lane in lanes:
        mine = [middle[lane.name, streams] for streams in _STREAMS]
        rival = [figures.quotient(middle[lane.name, streams], middle.get((RIVAL, streams))) for streams in _STREAMS]
        absent = _WIRE_ONLY if offloads and _needs_wire(lane.contestant) else lane.absent
        wrong = [*problems[lane.name], *([f"FAILED: {lane.failure}"] if lane.failure else [])]
        yield Line(lane.name, (*mine, *rival), tuple(wrong), absent)


def _transfer(lane: Lane, streams: int, seconds: int, cpu: int) -> float:
    """GB for each second of CPU time.

    Raises:
        MasqError: it did not come through, or not translated as it should.
    """
    clock = measure.CoreClock(cpu)
    before_ns = clock.softirqs_ns()
    with _Iperf(lane.topology, "wan", ["-s", "-1"], cpu) as server:
        wait_until(lambda: _listens(lane.topology), "iperf3 listens")
        words = ["-c", WAN_SOCKETS, "-t", f"{seconds}", "-P", str(streams)]
        with _Iperf(lane.topology, "lan", words, cpu) as client:
            client.end(seconds + _END_S)
            told = server.end(_END_S)
    peer = IPv4Address(told["start"]["accepted_connection"]["host"])
    if (peer in public_addresses(lane.topology.externals)) != lane.contestant.expected.translated:
        raise HostError("wrong address", f"the server sees {peer}")
    cpu_ns = server.cpu_ns + client.cpu_ns + clock.softirqs_ns() - before_ns
    return float(told["end"]["sum_received"]["bytes"]) / cpu_ns


def _listens(network: Topology) -> bool:
    return bool(network.try_run("wan", ["ss", "-Hltn", f"sport = :{_PORT}"]).output)


class _Iperf:
    """An iperf3 on that core; a context manager.

    Attributes:
        cpu_ns: what it took, once it has ended.
    """

    def __init__(self, network: Topology, role: Role, words: Sequence[str], cpu: int) -> None:
        self.cpu_ns = 0
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by __exit__
        argv = ["ip", "netns", "exec", network.namespace(role), "iperf3", "-J", "-p", str(_PORT), *words]
        with measure.pinned(cpu):
            try:
                self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=self._output)
            except FileNotFoundError as error:
                raise HostError("iperf3 cannot be run", str(error), "apt install iproute2 iperf3") from error

    def __enter__(self) -> _Iperf:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()
        self._output.close()

    def end(self, patience_s: float) -> Any:
        """What it told once it has ended by itself.

        Raises:
            HostError: it did not, or it failed.
        """
        deadline = time.monotonic() + patience_s
        while True:
            pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                raise HostError("the transfer did not end", f"nothing after {patience_s:g} s")
            time.sleep(0.02)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu_ns = round((usage.ru_utime + usage.ru_stime) * 1e9)
        self._output.seek(0)
        text = self._output.read()
        told = json.loads(text) if text.startswith("{") else {"error": text or "is it installed?"}
        if "error" in told:
            raise HostError("iperf3 failed", told["error"])
        return told
