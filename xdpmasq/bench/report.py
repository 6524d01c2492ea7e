"""What a run found: sections of one table each, the machine, and the marks. Data only; how it looks is elsewhere.

Words: *cost* is CPU time per packet of the core that carries generator, gateway and sink (ns); the *share* is the
part of it above dropping the packet at the gateway: the gateway's own, one more veth, and the sink; a quotient with
another contestant's name is the speed against it: that one's cost divided by this one's.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from xdpmasq import __version__
from xdpmasq.bench import conntrack

# Below this the CPU clocks miss work: see measure.py.
ENOUGH_ACCOUNTED = 0.95
NOT_MEASURED = "–"


@dataclass(frozen=True)
class Column:
    """A title, and how its values are written: the right-hand side of Python's format()."""

    title: str
    form: str = ",.0f"

    def text(self, value: float | None) -> str:
        return NOT_MEASURED if value is None else format(value, self.form)


@dataclass(frozen=True)
class Line:
    """One contestant's values; None is what was not measured.

    Attributes:
        problems: what was lost or wrong: then the line, or the rounds named, are INVALID and do not count.
        absent: why there is nothing, through nobody's fault.
    """

    name: str
    values: tuple[float | None, ...]
    problems: tuple[str, ...] = ()
    absent: str = ""

    @property
    def valid(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class Drawing:
    """Which columns are drawn: bars of one of them, or a curve over several, whose titles are then numbers."""

    kind: Literal["bars", "curve"]
    columns: tuple[str, ...]
    unit: str


@dataclass(frozen=True)
class Section:
    """One table.

    Attributes:
        key: names it in marks and JSON.
        command: that measures just this.
        notes: what must be known to read it.
        accounted: CPU time by time on the core, where that is what was measured; see measure.py.
    """

    key: str
    title: str
    command: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()
    drawing: Drawing | None = None
    accounted: float | None = None

    def value(self, name: str, title: str) -> float | None:
        """Of a line's column; None when there is no such, or nothing was measured."""
        titles = [column.title for column in self.columns]
        line = next((line for line in self.lines if line.name == name), None)
        return line.values[titles.index(title)] if line and title in titles else None

    @property
    def valid(self) -> bool:
        return all(line.valid for line in self.lines)

    def as_markdown(self) -> str:
        """Its table, bold what is ours."""
        rows = [["gateway", *(column.title for column in self.columns)], ["---", *["---:"] * len(self.columns)]]
        for line in self.lines:
            strong = "**" if line.name.startswith("xdpmasq") else ""
            texts = [column.text(value) for column, value in zip(self.columns, line.values, strict=True)]
            if not line.valid:
                texts = [f"{text} INVALID" for text in texts]
            rows.append([f"{strong}{text}{strong}" for text in (line.name, *texts)])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@dataclass(frozen=True)
class Mark:
    """A promise: a value of a section that must be at least, or at most, so much."""

    section: str
    line: str
    column: str
    words: str
    least: float | None = None
    most: float | None = None
    value: float | None = None

    @property
    def met(self) -> bool | None:
        """None when it was not measured."""
        if self.value is None:
            return None
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)

    @property
    def verdict(self) -> str:
        return {True: "met", False: "MISSED", None: "not measured"}[self.met]

    @property
    def bound(self) -> str:
        return f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}"

    @property
    def shown(self) -> str:
        return NOT_MEASURED if self.value is None else f"{self.value:.3g}"


@dataclass(frozen=True)
class Host:
    """What the figures were measured on; ``versions`` of the programs, and how much connection tracking may hold."""

    kernel: str
    cpu_model: str
    cpus: int
    cpu: int
    memory_gb: int
    versions: dict[str, str]

    @property
    def words(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        where = f"{self.cpu_model}, core {self.cpu} of {self.cpus}, {self.memory_gb} GB"
        return f"{self.kernel}; {where}; {versions}"


@dataclass(frozen=True)
class Report:
    """Everything about one run, which took so many seconds."""

    host: Host
    sections: tuple[Section, ...]
    marks: tuple[Mark, ...]
    seconds: float

    @property
    def valid(self) -> bool:
        """Whether everything could be measured, and everything was right."""
        return all(section.valid for section in self.sections)

    def section(self, key: str) -> Section | None:
        return next((section for section in self.sections if section.key == key), None)

    def value(self, section: str, line: str, column: str) -> float | None:
        found = self.section(section)
        return found.value(line, column) if found else None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        marks = [{**asdict(mark), "verdict": mark.verdict} for mark in self.marks]
        return {**asdict(self), "marks": marks, "valid": self.valid}


def valued(marks: Iterable[Mark], sections: Sequence[Section]) -> tuple[Mark, ...]:
    """The marks that concern what was measured, with what came of it."""
    by_key = {section.key: section for section in sections}
    return tuple(
        Mark(**{**vars(mark), "value": by_key[mark.section].value(mark.line, mark.column)})
        for mark in marks
        if mark.section in by_key
    )


def from_dict(fields: Mapping[str, Any]) -> Report:
    """The inverse of :meth:`Report.as_dict` after a journey through JSON."""
    marks = [Mark(**{key: mark[key] for key in mark if key != "verdict"}) for mark in fields["marks"]]
    return Report(Host(**fields["host"]), tuple(map(_section, fields["sections"])), tuple(marks), fields["seconds"])


def _section(fields: Mapping[str, Any]) -> Section:
    drawing = fields["drawing"]
    return Section(
        **{
            **fields,
            "columns": tuple(Column(**each) for each in fields["columns"]),
            "lines": tuple(
                Line(each["name"], tuple(each["values"]), tuple(each["problems"]), each["absent"])
                for each in fields["lines"]
            ),
            "notes": tuple(fields["notes"]),
            "drawing": drawing and Drawing(drawing["kind"], tuple(drawing["columns"]), drawing["unit"]),
        }
    )


def host(cpu: int, tools: Iterable[str] = ("nft", "iperf3")) -> Host:
    """This machine, with the versions of what was measured."""
    versions = {"xdpmasq": __version__, **{tool: _version(tool) for tool in tools}}
    if limit := conntrack.most():
        versions["nf_conntrack_max"] = f"{limit:,}"
    return Host(
        kernel=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu_model=_cpu_model(),
        cpus=os.cpu_count() or 1,
        cpu=cpu,
        memory_gb=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30,
        versions=versions,
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or "unknown"


def _version(tool: str) -> str:
    try:
        answer = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return "not there"
    number = re.search(r"\d+\.\d+(\.\d+)*", answer.stdout)
    return number[0] if number else "unknown"
