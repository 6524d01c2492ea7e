"""``--scenario control``: how long the control plane takes, and whether the datapath feels it.

*attach*: from starting the command to the first datagram that comes out translated. With all sessions open: *list*
writes them to a file, *expiry* is one pass of the agent's code that looks for expired ones and finds none, *end* is
the time until the agent has noticed that all have expired and has ended them; round trips are timed before and during
that.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from xdpmasq import abi, datapath
from xdpmasq.bench import contestants as who
from xdpmasq.bench import latency, measure, turns
from xdpmasq.bench.contestants import OURS, Contestant
from xdpmasq.bench.generator import SMALLEST_FRAME
from xdpmasq.bench.probe import Probe
from xdpmasq.bench.report import Column, Line, Section
from xdpmasq.bench.stage import Lane, Stage
from xdpmasq.bench.topology import Topology
from xdpmasq.bench.turns import Case
from xdpmasq.errors import HostError, MasqError
from xdpmasq.expiry import Expiry
from xdpmasq.lab.errors import wait_until

_COLUMNS = (
    Column("attach s", ".2f"), Column("list s", ".2f"), Column("list --json s", ".2f"), Column("expiry s", ".2f"),
    Column("end s", ".1f"), Column("p99 µs", ".1f"), Column("p99 µs during", ".1f"),
)  # fmt: skip
_PATIENCE_S = 60.0
_TRIPS = 1000  # before one looks again whether the end has come


def run(stage: Stage) -> Iterator[Section]:
    """One table."""
    sessions = stage.settings.sessions
    stage.flows_fit([sessions])
    ours = stage.playing(lambda each: each.is_ours)
    stage.expect(4 * len(ours))
    yield Section(
        key=f"control/{sessions}",
        title=f"The control plane, with {sessions:,} sessions",
        command=f"xdpmasq bench --scenario control --sessions {sessions}",
        columns=_COLUMNS,
        lines=tuple(_line(stage, each, sessions) for each in ours),
        notes=(
            "attach: until the first datagram is translated; list: all sessions to a file; expiry: a pass that finds "
            "none expired; end: all have expired, until the agent has noticed and ended them; p99 of UDP round trips "
            "before that, and during it.",
        ),
    )


def _line(stage: Stage, contestant: Contestant, sessions: int) -> Line:
    values: list[float | None] = []
    try:
        stage.step(f"attaching {contestant.name}")
        values.append(_attach_s(stage, contestant))
        with stage.lane(contestant) as lane:
            if not lane.plays:
                raise HostError(lane.failure or lane.absent)
            lane.traffic.wire()
            stage.step(f"opening the sessions of {lane.name}")
            if problems := turns.opened(lane, Case(sessions, SMALLEST_FRAME)).problems:
                raise HostError("INVALID", problems[0])
            lane.traffic.unwire()
            stage.step(f"listing the sessions of {lane.name}")
            values += [_list_s(lane, sessions), _list_s(lane, sessions, "--json"), _expiry_s(lane)]
            stage.step(f"ending the sessions of {lane.name}")
            values += _ended(lane, stage.cpu)
    except MasqError as error:
        return Line(contestant.name, tuple(values + [None] * (len(_COLUMNS) - len(values))), (str(error),))
    return Line(contestant.name, tuple(values))


def _attach_s(stage: Stage, contestant: Contestant) -> float:
    """Until a datagram is translated, of those sent meanwhile one by one."""
    mode = contestant.name.removeprefix(OURS)
    attach = who.attach_command(mode)
    with Topology(f"{stage.name}-attach") as network, Probe(network, 0.002) as probe:
        inside = ["ip", "netns", "exec", network.namespace("gate"), *attach.argv]
        started = time.monotonic()
        with subprocess.Popen(inside, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
            assert process.stdin
            process.stdin.write(attach.stdin)
            process.stdin.close()
            wait_until(probe.is_translated, f"{contestant.name} translates", _PATIENCE_S)
            took = time.monotonic() - started
        network.run("gate", [sys.executable, "-m", "xdpmasq", "detach"])
    return took


def _list_s(lane: Lane, sessions: int, *words: str) -> float:
    """``sessions list`` into a file, which must hold them all."""
    command = [sys.executable, "-m", "xdpmasq", "sessions", "list", *words]
    inside = ["ip", "netns", "exec", lane.topology.namespace("gate"), *command]
    with tempfile.TemporaryFile() as file:
        started = time.monotonic()
        subprocess.run(inside, stdout=file, check=True)
        took = time.monotonic() - started
        file.seek(0)
        listed = sum(1 for _ in file)
    if listed < sessions:
        raise HostError("sessions list is not complete", f"{listed:,} lines for {sessions:,} sessions")
    return took


def _tables(lane: Lane) -> datapath.Attached:
    with lane.topology.inside("gate"):
        return datapath.find()


def _expiry_s(lane: Lane) -> float:
    tables = _tables(lane)
    never = 1 << 31
    expiry = Expiry(tables, tables.reaper, np.zeros(len(tables.claims), np.uint64), never, never)
    started = time.monotonic()
    expiry.run()
    return time.monotonic() - started


def _ended(lane: Lane, cpu: int) -> list[float]:
    """Seconds until the sessions that the frames made have gone; p99 of round trips before and during that, µs."""
    tables = _tables(lane)
    with Probe(lane.topology, 1.0) as probe, measure.pinned(cpu):
        latency.timed(probe, _TRIPS)  # the session is made and armed
        slots = np.setdiff1d(tables.live_slots(), _in_use_now(tables, probe))
        before, _ = latency.timed(probe, 10 * _TRIPS)
        during = []
        for side in ("out", "in"):
            tables.sessions[side]["last_seen"][slots] -= np.uint32(int(tables.settings["udp"]) + 1)
        started = time.monotonic()
        while (tables.sessions["life"][slots] & abi.LIFE_STATE == abi.LIFE_LIVE).any():
            if time.monotonic() > started + _PATIENCE_S:
                raise HostError("the agent does not end the sessions", f"nothing for {_PATIENCE_S:g} s")
            during.append(latency.timed(probe, _TRIPS)[0])
        took = time.monotonic() - started
    return [took, *(float(np.percentile(each, 99)) / 1e3 for each in (before, np.concatenate(during)))]


def _in_use_now(tables: datapath.Attached, probe: Probe) -> Any:
    """Slots of sessions that a round trip touches."""
    slots = tables.live_slots()
    before = tables.sessions["sent"]["packets"][slots].copy()
    probe.echo()
    return slots[tables.sessions["sent"]["packets"][slots] != before]
