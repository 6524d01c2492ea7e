"""``--scenario memory``: what a session takes.

Ours is what the kernel charges for the maps (``memlock`` of their fdinfo), which are allocated at ``attach``, and the
agent's own memory. The kernel's is the growth of the slab caches that connections are made of; others on the machine
use the general ones too, so it is about right only when many sessions are opened at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from xdpmasq import bpf, datapath
from xdpmasq.bench import conntrack, turns
from xdpmasq.bench.contestants import Contestant
from xdpmasq.bench.generator import SMALLEST_FRAME
from xdpmasq.bench.report import Column, Line, Section
from xdpmasq.bench.stage import Lane, Stage
from xdpmasq.bench.turns import Case
from xdpmasq.errors import MasqError

_SLABS = Path("/proc/slabinfo")
_PAGE = 4096
_LARGEST = 4  # tables named in a note


def run(stage: Stage) -> Iterator[Section]:
    """One table."""
    sessions = stage.settings.sessions
    stage.flows_fit([sessions])
    lines, notes = [], []
    contestants = stage.playing(_has_sessions)
    stage.expect(len(contestants))
    for contestant in contestants:
        with stage.lane(contestant) as lane:
            lane.traffic.wire()
            stage.step(f"opening the sessions of {lane.name}")
            line, said = _line(lane, sessions)
            lines.append(line)
            notes += said
    yield Section(
        key=f"memory/{sessions}",
        title=f"Memory of {sessions:,} sessions",
        command=f"xdpmasq bench --scenario memory --sessions {sessions}",
        columns=(
            Column("sessions"), Column("MB kernel", ",.1f"), Column("MB agent", ",.1f"), Column("B/session"),
            Column("room"), Column("B/place"),
        ),
        lines=tuple(lines),
        notes=(
            "Our tables are allocated for all sessions there is room for when attaching; of the kernel's NAT, the "
            "slab caches' growth while opening (without its hash table).",
            *notes,
        ),
    )  # fmt: skip


def _has_sessions(contestant: Contestant) -> bool:
    return contestant.expected.translated


def _line(lane: Lane, wanted: int) -> tuple[Line, list[str]]:
    sessions = wanted if lane.contestant.is_ours else min(wanted, conntrack.most() or wanted)
    if not lane.plays:
        return Line(lane.name, (None,) * 6, (lane.failure,) if lane.failure else (), lane.absent), []
    before = slabs_bytes()
    try:
        turn = turns.opened(lane, Case(sessions, SMALLEST_FRAME))
        if turn.problems:
            return Line(lane.name, (None,) * 6, turn.problems), []
        if not lane.contestant.is_ours:
            grown = slabs_bytes() - before if before else None
            return Line(lane.name, _values(sessions, grown, 0, None)), []
        return _ours(lane, sessions)
    except MasqError as error:
        return Line(lane.name, (None,) * 6, (str(error),)), []


def _ours(lane: Lane, sessions: int) -> tuple[Line, list[str]]:
    with lane.topology.inside("gate"):
        tables = datapath.find()
    maps = {name: locked_bytes(map_) for name, map_ in tables.maps.items()}
    largest = sorted(maps.items(), key=lambda each: -each[1])[:_LARGEST]
    said = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in largest)
    line = Line(
        lane.name, _values(sessions, sum(maps.values()), _anonymous_bytes(tables.agent_pid), len(tables.sessions))
    )
    return line, [f"{lane.name}: {said}."]


def _values(sessions: int, kernel: int | None, agent: int, room: int | None) -> tuple[float | None, ...]:
    if kernel is None:
        return (sessions, *(None,) * 5)
    all_ = kernel + agent
    return (
        sessions,
        kernel / 1e6,
        agent / 1e6 if room else None,
        all_ / sessions,
        room,
        all_ / room if room else None,
    )


def locked_bytes(map_: bpf.Map) -> int:
    """What the kernel charges for a map."""
    found = re.search(r"memlock:\s+(\d+)", Path(f"/proc/self/fdinfo/{map_.fd}").read_text())
    return int(found[1]) if found else 0


def _anonymous_bytes(pid: int | None) -> int:
    """A process's own memory; what it has mapped of the tables is theirs already."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()) if pid else None
    return int(found[1]) * 1024 if found else 0


def slabs_bytes(text: str | None = None) -> int:
    """Of the caches of connections and of their extensions; 0 where the kernel does not tell."""
    try:
        lines = (_SLABS.read_text() if text is None else text).splitlines()
    except OSError:
        return 0
    total = 0
    for line in lines:
        # name, active objects, objects, size, objects/slab, pages/slab : tunables … : slabdata active slabs, slabs
        fields = line.replace(":", " ").split()
        if fields and re.fullmatch(r"nf_conntrack|kmalloc(-rnd-\d+)?-\d+k?", fields[0]):
            total += int(fields[12]) * int(fields[5]) * _PAGE
    return total
