"""A report for the terminal: tables, bars and curves out of characters. Nothing is printed here."""

from __future__ import annotations

import math
import string
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from xdpmasq.bench.markdown import absences, doubts
from xdpmasq.bench.report import Line, Report, Section

_BAR_CELLS = 44
_CURVE_WIDTH, _CURVE_HEIGHT = 64, 15
_DOUBTS_SHOWN = 6  # of a section; --json has all
_STYLES = {"met": "green", "MISSED": "red", "not measured": "yellow"}


def shown(report: Report) -> Group:
    """Everything."""
    parts: list[RenderableType] = [part for section in report.sections for part in _section(section)]
    if report.marks:
        parts.append(_marks(report))
    return Group(*parts, Text(f"{report.host.words}; {report.seconds:.0f} s", style="dim"))


def _section(section: Section) -> Iterator[RenderableType]:
    yield Text(section.title, style="bold")
    yield _table(section)
    if section.drawing:
        yield _bars(section) if section.drawing.kind == "bars" else _curve(section)
    yield from (Text(note, style="dim") for note in section.notes)
    yield from (Text(each, style="yellow") for each in absences(section))
    found = doubts(section)
    yield from (Text(each, style="red") for each in found[:_DOUBTS_SHOWN])
    if len(found) > _DOUBTS_SHOWN:
        yield Text(f"and {len(found) - _DOUBTS_SHOWN} more (--json has all)", style="red")
    yield Text(f"$ {section.command}\n", style="dim")


def _table(section: Section) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("gateway", vertical="bottom", no_wrap=True)
    for column in section.columns:
        table.add_column(column.title.replace(" ", "\n", 1), vertical="bottom", justify="right", no_wrap=True)
    for line in section.lines:
        texts = [column.text(value) for column, value in zip(section.columns, line.values, strict=True)]
        table.add_row(line.name if line.valid else f"{line.name} INVALID", *texts, style="" if line.valid else "red")
    return table


def _style(line: Line) -> str:
    return "green" if line.name.startswith("xdpmasq") else "cyan"


def _bars(section: Section) -> Text:
    assert section.drawing
    bars = [
        (line, title, value)
        for line in section.lines
        for title in section.drawing.columns
        if (value := section.value(line.name, title)) is not None
    ]
    most = max((value for *_, value in bars), default=0.0)
    width = max((len(line.name) for line, *_ in bars), default=0)
    text = Text(f"{section.drawing.unit}\n")
    for line, title, value in bars:
        first = title == section.drawing.columns[0]
        text.append(f"{line.name if first else '':>{width}} ")
        text.append("█" * max(round(value / most * _BAR_CELLS), 1), style=_style(line) + ("" if first else " dim"))
        text.append(f" {section.columns[[each.title for each in section.columns].index(title)].text(value)}\n")
    return text


def _curve(section: Section) -> Text:
    """A point for each value, by the first free letter of the name; both axes are logarithmic."""
    assert section.drawing
    titles = section.drawing.columns
    xs = [math.log(max(float(title.replace(",", "")), 1)) for title in titles]
    ys = [math.log(value) for line in section.lines for value in line.values if value]
    if not ys:
        return Text("")
    grid = [[Text(" ") for _ in range(_CURVE_WIDTH)] for _ in range(_CURVE_HEIGHT)]
    for letter, line in zip(_letters([line.name for line in section.lines]), section.lines, strict=True):
        for x, value in zip(xs, line.values, strict=True):
            if value:
                column, row = _at(x, xs, _CURVE_WIDTH), _CURVE_HEIGHT - 1 - _at(math.log(value), ys, _CURVE_HEIGHT)
                grid[row][column] = Text(letter, style=_style(line))
    text = Text(f"{section.drawing.unit}, by number of flows\n")
    for number, cells in enumerate(grid):
        label = {0: max(ys), _CURVE_HEIGHT - 1: min(ys)}.get(number)
        text.append(f"{'' if label is None else format(math.exp(label), ',.0f'):>7} │")
        text.append_text(Text.assemble(*cells, "\n"))
    half = _CURVE_WIDTH // 2
    text.append(f"{'':>7} └{'─' * _CURVE_WIDTH}\n{'':>9}{titles[0]:<{half}}{titles[-1]:>{half}}\n")
    names = [line.name for line in section.lines]
    legend = (f"{letter} {name}" for letter, name in zip(_letters(names), names, strict=True))
    return text.append("   ".join(legend) + "\n")


def _letters(names: Sequence[str]) -> list[str]:
    """One for each name, none twice; ours by what follows the common beginning."""
    taken: list[str] = []
    for name in names:
        wanted = name.removeprefix("xdpmasq-").upper() + string.ascii_uppercase
        free = [each for each in wanted if each not in taken]
        taken.append(free[0] if free else "*")
    return taken


def _at(value: float, all_: Sequence[float], cells: int) -> int:
    least, most = min(all_), max(all_)
    return round((value - least) / (most - least) * (cells - 1)) if most > least else 0


def _marks(report: Report) -> Table:
    table = Table(title="marks", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("", "promised", "measured", ""):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for mark in report.marks:
        table.add_row(mark.words, mark.bound, mark.shown, Text(mark.verdict, style=_STYLES[mark.verdict]))
    return table
