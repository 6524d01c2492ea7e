"""A report as Markdown, for docs/performance.md and whoever wants to show theirs."""

from __future__ import annotations

from collections.abc import Iterator

from xdpmasq.bench.report import ENOUGH_ACCOUNTED, Report, Section


def document(report: Report) -> str:
    """Every section with its command, and the marks."""
    blocks = [f"Measured on {report.host.words}; {report.seconds / 60:.0f} minutes."]
    for section in report.sections:
        blocks += _blocks(section)
    if report.marks:
        blocks += ["## Marks", marks(report)]
    return "\n\n".join(blocks) + "\n"


def _blocks(section: Section) -> Iterator[str]:
    yield f"## {section.title}"
    yield section.as_markdown()
    if remarks := [*section.notes, *absences(section), *doubts(section)]:
        yield "\n".join(f"* {each}" for each in remarks)
    yield f"```sh\n{section.command}\n```"


def absences(section: Section) -> list[str]:
    """Who is not in it, and why."""
    return [f"{line.name}: {line.absent}." for line in section.lines if line.absent]


def doubts(section: Section) -> list[str]:
    """Why the figures, or some, are not to be trusted."""
    found = [f"INVALID: {line.name}: {problem}" for line in section.lines for problem in line.problems]
    if section.accounted is not None and section.accounted < ENOUGH_ACCOUNTED:
        found.append(
            f"The CPU clocks account for {section.accounted:.0%} of the time: the hypervisor steals time, or this "
            "kernel accounts interrupts apart (CONFIG_IRQ_TIME_ACCOUNTING)."
        )
    return found


def marks(report: Report) -> str:
    """What was promised, and what came of it."""
    rows = ["| mark | promised | measured | |", "|---|---:|---:|---|"]
    rows += [f"| {mark.words} | {mark.bound} | {mark.shown} | {mark.verdict} |" for mark in report.marks]
    return "\n".join(rows)
