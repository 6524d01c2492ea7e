"""From turns to figures: medians, shares, quotients and marks. Arithmetic only; cli/bench.py prints.

Words: *cost* is CPU time per packet of the core that carries generator, gateway and sink (ns); the *share* is the
part of it above dropping the packet at the gateway: the gateway's own, one more veth, and the sink; a *speed against*
another contestant is that one's cost divided by this one's.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xdpmasq import __version__
from xdpmasq.bench.contestants import BASE, BEST, RIVAL
from xdpmasq.bench.generator import Direction
from xdpmasq.bench.rounds import Settings, Turn

# Below this the CPU clocks miss work: see measure.py.
ENOUGH_ACCOUNTED = 0.95


@dataclass(frozen=True)
class Row:
    """One contestant's result; None is what could not be measured.

    Attributes:
        ns: median over the valid rounds of CPU time per packet; ns_out, ns_in of one direction.
        ns_least, ns_most: of the valid rounds.
        mpps: million packets per second of CPU time.
        share_ns: cost above the base.
        against_rival, against_best: speed against nftables and against the bare redirect.
        valid, invalid: number of rounds.
        checked: packets whose ports and checksums were checked, of all seen.
        problems: of invalid rounds, each with its round.
        failure: why it could not be set up.
    """

    contestant: str
    valid: int
    invalid: int
    seen: int
    checked: int
    ns: float | None = None
    ns_out: float | None = None
    ns_in: float | None = None
    ns_least: float | None = None
    ns_most: float | None = None
    mpps: float | None = None
    share_ns: float | None = None
    against_rival: float | None = None
    against_best: float | None = None
    problems: tuple[str, ...] = ()
    failure: str | None = None

    @property
    def spread(self) -> float | None:
        """Half the distance from the cheapest to the dearest valid round, as a part of the median."""
        if not self.ns or self.ns_least is None or self.ns_most is None:
            return None
        return (self.ns_most - self.ns_least) / 2 / self.ns


@dataclass(frozen=True)
class Mark:
    """A speed that a contestant has to reach; ``met`` is None when it was not measured."""

    contestant: str
    against: str
    least: float
    value: float | None = None

    @property
    def met(self) -> bool | None:
        return None if self.value is None else self.value >= self.least


# For 1,000 flows of 64-byte frames in both directions.
MARKS = (
    Mark("xdpmasq-xdp", RIVAL, 4.5),
    Mark("xdpmasq-xdp", BEST, 0.82),
    Mark("xdpmasq-tc", RIVAL, 1.15),
)
MARKED_SETTINGS = Settings()
# For new flows, however many.
SETUP_MARKS = (Mark("xdpmasq-xdp", RIVAL, 1.0), Mark("xdpmasq-tc", RIVAL, 1.0))


@dataclass(frozen=True)
class Host:
    """What the figures were measured on."""

    kernel: str
    cpu_model: str
    cpus: int
    cpu: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Report:
    """Everything about one run.

    Attributes:
        marks: empty when other settings were measured than the marks are meant for.
        accounted: median over turns of CPU time by time on the core; see measure.py.
        seconds: the run took.
    """

    settings: Settings
    host: Host
    rows: tuple[Row, ...]
    marks: tuple[Mark, ...]
    accounted: float | None
    seconds: float

    @property
    def valid(self) -> bool:
        """Whether every contestant could be measured in every round."""
        return all(row.valid and not row.invalid and row.failure is None for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """For --json; times in ns, speeds as quotients."""
        fields = asdict(self)
        fields["marks"] = [{**asdict(mark), "met": mark.met} for mark in self.marks]
        return {**fields, "valid": self.valid}


def report(turns: Sequence[Turn], names: Sequence[str], settings: Settings, host: Host, seconds: float) -> Report:
    """The figures of all turns; one row for each name, in that order."""
    rows = tuple(_compared([_row(name, [turn for turn in turns if turn.contestant == name]) for name in names]))
    marks = tuple(_valued(_marks_for(settings), rows))
    shares = [turn.usage.cpu_ns / turn.usage.presence_ns for turn in turns if turn.usage.presence_ns]
    return Report(settings, host, rows, marks, statistics.median(shares) if shares else None, seconds)


def _row(name: str, turns: Sequence[Turn]) -> Row:
    played = [turn for turn in turns if turn.failure is None]
    valid = [turn for turn in played if turn.valid]
    failures = [str(turn.failure) for turn in turns if turn.failure]
    costs = _costs(valid)
    tallies = [tally for turn in played for tally in turn.tallies]
    return Row(
        contestant=name,
        valid=len(valid),
        invalid=len(played) - len(valid),
        seen=sum(tally.seen for tally in tallies),
        checked=sum(tally.checked for tally in tallies),
        ns=_median(costs),
        ns_out=_median(_costs(valid, "out")),
        ns_in=_median(_costs(valid, "in")),
        ns_least=min(costs, default=None),
        ns_most=max(costs, default=None),
        problems=tuple(f"round {turn.round}: {problem}" for turn in played for problem in turn.problems),
        failure=failures[0] if failures else None,
    )


def _costs(turns: Iterable[Turn], direction: Direction | None = None) -> list[float]:
    return [cost for turn in turns if (cost := turn.ns_per_packet(direction)) is not None]


def _median(costs: Sequence[float]) -> float | None:
    return statistics.median(costs) if costs else None


def _compared(rows: Sequence[Row]) -> Iterable[Row]:
    cost = {row.contestant: row.ns for row in rows}
    base = cost.get(BASE)
    for row in rows:
        yield Row(
            **{
                **vars(row),
                "mpps": 1e3 / row.ns if row.ns else None,
                "share_ns": row.ns - base if row.ns is not None and base is not None else None,
                "against_rival": _quotient(cost.get(RIVAL), row.ns),
                "against_best": _quotient(cost.get(BEST), row.ns),
            }
        )


def _quotient(theirs: float | None, ours: float | None) -> float | None:
    return theirs / ours if theirs is not None and ours else None


def _marks_for(settings: Settings) -> tuple[Mark, ...]:
    if settings.scenario == "setup":
        return SETUP_MARKS
    return MARKS if _is_marked(settings) else ()


def _is_marked(settings: Settings) -> bool:
    return (settings.flows, settings.frame_bytes, set(settings.directions)) == (
        MARKED_SETTINGS.flows,
        MARKED_SETTINGS.frame_bytes,
        set(MARKED_SETTINGS.directions),
    )


def _valued(marks: Iterable[Mark], rows: Sequence[Row]) -> Iterable[Mark]:
    by_name = {row.contestant: row for row in rows}
    for mark in marks:
        row = by_name.get(mark.contestant)
        value = None if row is None else row.against_rival if mark.against == RIVAL else row.against_best
        yield Mark(mark.contestant, mark.against, mark.least, value)


def host(cpu: int) -> Host:
    """This machine, with the versions of what was measured."""
    return Host(
        kernel=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu_model=_cpu_model(),
        cpus=os.cpu_count() or 1,
        cpu=cpu,
        versions={
            "xdpmasq": __version__,
            "python": platform.python_version(),
            "nft": _said(["nft", "--version"]),
            "iproute2": _said(["ip", "-Version"]),
        },
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or "unknown"


def _said(argv: list[str]) -> str:
    try:
        answer = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return "not there"
    number = re.search(r"\d+\.\d+(\.\d+)*", answer.stdout)
    return number[0] if number else "unknown"
