"""``xdpmasq bench``: what a packet costs, beside the kernel's own masquerade."""

from __future__ import annotations

import json
import signal
from enum import StrEnum
from types import FrameType
from typing import NoReturn

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from xdpmasq.bench import Bench, Report, Row, Settings, chosen
from xdpmasq.bench.contestants import BASE, BEST, RIVAL
from xdpmasq.bench.generator import DIRECTIONS
from xdpmasq.bench.generator import Direction as OneWay
from xdpmasq.bench.report import ENOUGH_ACCOUNTED

_QUICK_ROUNDS, _QUICK_PACKETS = 3, 100_000
_SETUP_FLOWS = 10_000
_BAR_CELLS = 48
_PROBLEMS_SHOWN = 4  # of a contestant; --json has all


class Scenario(StrEnum):
    """What the measured packets do."""

    ESTABLISHED = "established"
    SETUP = "setup"


class Direction(StrEnum):
    """Seen from the LAN."""

    OUT = "out"
    IN = "in"
    BOTH = "both"


# As in cli/common.py: values, not annotations, and no None. 0 and -1 stand for "as it depends".
SCENARIO = typer.Option(Scenario.ESTABLISHED, help="established: flows opened before; setup: each packet opens one.")
FLOWS = typer.Option(
    0,
    min=0,
    help="UDP flows, one packet of each in turn; in setup, opened before the tables are emptied."
    f"  [default: {Settings.flows}; setup: {_SETUP_FLOWS}]",
    show_default=False,
)
SIZE = typer.Option(64, help="Bytes of a frame, from the Ethernet header on, without check sequence; even.")
DIRECTION = typer.Option(Direction.BOTH, help="Which packets are measured.")
ROUNDS = typer.Option(
    0, min=0, help=f"Each contestant plays once a round.  [default: {Settings.rounds}]", show_default=False
)
PACKETS = typer.Option(
    0, min=0, help=f"For each direction, contestant and round.  [default: {Settings.packets}]", show_default=False
)
CONTESTANT = typer.Option([], help="Only this one; may be given several times. Default: all.", show_default=False)
CPU = typer.Option(-1, help="The core that carries everything; default: the last.", show_default=False)
QUICK = typer.Option(False, "--quick", help=f"{_QUICK_ROUNDS} rounds of {_QUICK_PACKETS:,} packets.")
JSON = typer.Option(False, "--json", help="Print one JSON object, and progress on stderr.")


def bench(  # noqa: PLR0917  these are the command line
    scenario: Scenario = SCENARIO,
    flows: int = FLOWS,
    size: int = SIZE,
    direction: Direction = DIRECTION,
    rounds: int = ROUNDS,
    packets: int = PACKETS,
    contestant: list[str] = CONTESTANT,
    cpu: int = CPU,
    quick: bool = QUICK,
    as_json: bool = JSON,
) -> None:
    """Measure CPU time per packet of xdpmasq and others, in namespaces of its own.

    Every packet is checked behind the gateway; a round with lost or wrongly translated packets does not
    count. Exit code 1 when a contestant could not be measured or a round was invalid; missed marks alone are 0.

    \b
    Example:
      xdpmasq bench --quick --contestant nftables --contestant xdpmasq-xdp
      xdpmasq bench --scenario setup
    """
    # As with Ctrl-C, the network is removed on the way out.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    one_ways: dict[Direction, tuple[OneWay, ...]] = {Direction.OUT: ("out",), Direction.IN: ("in",)}
    opening = scenario is Scenario.SETUP
    settings = Settings(
        scenario="setup" if opening else "established",
        flows=flows or (_SETUP_FLOWS if opening else Settings.flows),
        frame_bytes=size,
        directions=("out",) if opening else one_ways.get(direction, DIRECTIONS),
        rounds=rounds or (_QUICK_ROUNDS if quick else Settings.rounds),
        packets=packets or (_QUICK_PACKETS if quick else Settings.packets),
    )
    report = _run(Bench(settings, chosen(contestant), cpu=cpu if cpu >= 0 else None))
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        Console().print(_shown(report))
    if not report.valid:
        raise typer.Exit(1)


def _leave(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _run(bench: Bench) -> Report:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("building the network", total=bench.settings.rounds * len(bench.contestants))
        with bench:
            for _ in bench.play(lambda name, round_: _announce(progress, task, bench.settings.rounds, name, round_)):
                progress.advance(task)
    return bench.report()


def _announce(progress: Progress, task: TaskID, rounds: int, name: str, round_: int) -> None:
    progress.update(task, description=f"round {round_}/{rounds}  {name:12}")


# --- what is printed -------------------------------------------------------------------------------


def _shown(report: Report) -> Group:
    parts: list[RenderableType] = [Text(_heading(report)), _table(report), *_problem_lines(report), _bars(report)]
    return Group(*parts, *_mark_lines(report), *_footer(report))


def _heading(report: Report) -> str:
    settings = report.settings
    ways = "both directions" if len(settings.directions) > 1 else f"{settings.directions[0]}bound only"
    if settings.scenario == "setup":
        return (
            f"every packet opens a flow, {settings.flows:,} in empty tables, {settings.frame_bytes}-byte frames\n"
            f"medians of {settings.rounds} rounds of {settings.packets:,} flows; CPU time of one core"
        )
    return (
        f"{settings.flows:,} flow{'s' * (settings.flows > 1)}, {settings.frame_bytes}-byte frames, {ways}\n"
        f"medians of {settings.rounds} rounds of {settings.packets:,} packets each way; CPU time of one core"
    )


def _table(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("gateway", vertical="bottom", no_wrap=True)
    for column in ("ns/pkt", "±", "out", "in", "Mpps", "share", f"×\n{RIVAL}", f"of\n{BEST}"):
        table.add_column(column, vertical="bottom", justify="right", no_wrap=True)
    for row in report.rows:
        clean = _is_clean(row)
        table.add_row(row.contestant if clean else f"{row.contestant} !", *_cells(row), style="" if clean else "red")
    return table


def _is_clean(row: Row) -> bool:
    return row.failure is None and not row.invalid


def _cells(row: Row) -> list[str]:
    return [
        _figure(row.ns, ",.0f"),
        _figure(row.spread, ".0%"),
        _figure(row.ns_out, ",.0f"),
        _figure(row.ns_in, ",.0f"),
        _figure(row.mpps, ".2f"),
        _figure(row.share_ns, ",.0f"),
        _figure(row.against_rival, ".2f"),
        _figure(row.against_best, ".2f"),
    ]


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _problem_lines(report: Report) -> list[Text]:
    lines: list[Text] = []
    for row in report.rows:
        problems = [f"FAILED: {row.failure}"] if row.failure else []
        if row.invalid:
            problems.append(f"{row.invalid} of {row.invalid + row.valid} rounds INVALID, and not counted:")
        problems += row.problems[:_PROBLEMS_SHOWN]
        if len(row.problems) > _PROBLEMS_SHOWN:
            problems.append(f"and {len(row.problems) - _PROBLEMS_SHOWN} more (--json has all)")
        lines.extend(Text(f"{row.contestant}: {problem}", style="red") for problem in problems)
    return lines


def _bars(report: Report) -> Text:
    """Cost as bars: dark what dropping costs too, bright the gateway's share."""
    most = max((row.ns for row in report.rows if row.ns), default=0.0)
    base = next((row.ns for row in report.rows if row.contestant == BASE), None) or 0.0
    text = Text("\nCPU time per packet, ns\n")
    for row in report.rows:
        if row.ns is None:
            continue
        cells = max(round(row.ns / most * _BAR_CELLS), 1)
        common = min(round(min(base, row.ns) / most * _BAR_CELLS), cells)
        text.append(f"{row.contestant:>12} ")
        text.append("█" * common, style="bright_black")
        text.append("█" * (cells - common), style="green" if row.contestant.startswith("xdpmasq") else "cyan")
        text.append(f" {row.ns:,.0f}\n")
    return text


def _mark_lines(report: Report) -> list[Text]:
    words = {True: ("met", "green"), False: ("MISSED", "red"), None: ("not measured", "yellow")}
    lines: list[Text] = []
    for mark in report.marks:
        said, style = words[mark.met]
        against = f"{_figure(mark.value, '.2f')} × {mark.against}"
        wanted = f"mark  {mark.contestant:12} {against:18} at least {mark.least:.2f}: "
        lines.append(Text.assemble(wanted, (said, style)))
    return lines


def _footer(report: Report) -> list[Text]:
    host, versions = report.host, report.host.versions
    checked = sum(row.checked for row in report.rows)
    seen = sum(row.seen for row in report.rows)
    lines = [
        Text(f"{host.kernel}, {host.cpu_model}, core {host.cpu} of {host.cpus}", style="dim"),
        Text(", ".join(f"{name} {version}" for name, version in versions.items()), style="dim"),
        Text(f"{seen:,} packets seen, ports and checksums of {checked:,} of them checked", style="dim"),
        Text(f"{_figure(report.accounted, '.1%')} of the time accounted for; {report.seconds:.0f} s", style="dim"),
    ]
    if report.accounted is not None and report.accounted < ENOUGH_ACCOUNTED:
        lines.append(
            Text(
                "The CPU clocks miss part of the work: the hypervisor steals time, or this kernel accounts "
                "interrupts apart (CONFIG_IRQ_TIME_ACCOUNTING). Do not trust the figures.",
                style="yellow",
            )
        )
    return lines
