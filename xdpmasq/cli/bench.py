"""``xdpmasq bench``: what a packet costs, beside the kernel's own masquerade and whoever else's."""

from __future__ import annotations

import json
import signal
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from xdpmasq.bench import Chosen, Conditions, Report, Settings, markdown, named, parse_external, plot, run, terminal
from xdpmasq.bench.contestants import NAMES
from xdpmasq.bench.generator import DIRECTIONS
from xdpmasq.bench.generator import Direction as OneWay

_QUICK_ROUNDS, _QUICK_PACKETS, _QUICK_SECONDS = 3, 100_000, 1
_SCENARIOS = "forward|scale|setup|latency|tcp|memory|isolated|control|all"


class Direction(StrEnum):
    """Seen from the LAN."""

    OUT = "out"
    IN = "in"
    BOTH = "both"


# As in cli/common.py: values, not annotations, and no None. 0 and -1 stand for "as it depends".
SCENARIO = typer.Option(["forward"], metavar=_SCENARIOS, help="What is measured; several are possible.")
FLOWS = typer.Option(
    [], min=1, help="UDP flows, one packet of each in turn; several make a table each.", show_default=False
)
SIZE = typer.Option(
    [], help="Bytes of a frame, from the Ethernet header on, without check sequence; even.", show_default=False
)
DIRECTION = typer.Option(Direction.BOTH, help="Which packets are measured, in forward and scale.")
EXTERNALS = typer.Option([], help="Public addresses, in setup.  [default: 1 and 4]", show_default=False)
SESSIONS = typer.Option(Settings.sessions, help="Opened in memory and control.")
SECONDS = typer.Option(0, min=0, help=f"Of a TCP transfer.  [default: {Settings.seconds}]", show_default=False)
ROUNDS = typer.Option(
    0, min=0, help=f"Each contestant plays once a round.  [default: {Settings.rounds}]", show_default=False
)
PACKETS = typer.Option(
    0, min=0, help=f"For each direction, contestant and round.  [default: {Settings.packets}]", show_default=False
)
CONTESTANT = typer.Option(
    [], metavar="|".join(NAMES), help="Only this one; several are possible. Default: all.", show_default=False
)
EXTERNAL = typer.Option(
    [], metavar="NAME=COMMAND", help="Another gateway; {wan} and {lan} are its interfaces.", show_default=False
)
RAISE = typer.Option(
    False, "--raise-conntrack",
    help="Let nftables hold all flows: raises nf_conntrack_max and its hash table on the whole machine meanwhile.",
)  # fmt: skip
CPU = typer.Option(-1, help="The core that carries everything; default: the last.", show_default=False)
QUICK = typer.Option(False, "--quick", help=f"{_QUICK_ROUNDS} rounds of {_QUICK_PACKETS:,} packets.")
PLOT = typer.Option("", "--plot", metavar="FILE.png", help="Draw it, too (needs matplotlib).", show_default=False)
MARKDOWN = typer.Option(False, "--markdown", help="Print Markdown.")
JSON = typer.Option(False, "--json", help="Print one JSON object.")


def bench(  # noqa: PLR0917  these are the command line
    scenario: list[str] = SCENARIO,
    flows: list[int] = FLOWS,
    size: list[int] = SIZE,
    direction: Direction = DIRECTION,
    externals: list[int] = EXTERNALS,
    sessions: int = SESSIONS,
    seconds: int = SECONDS,
    rounds: int = ROUNDS,
    packets: int = PACKETS,
    contestant: list[str] = CONTESTANT,
    external: list[str] = EXTERNAL,
    raise_conntrack: bool = RAISE,
    cpu: int = CPU,
    quick: bool = QUICK,
    plot_file: str = PLOT,
    as_markdown: bool = MARKDOWN,
    as_json: bool = JSON,
) -> None:
    """Measure CPU time per packet of xdpmasq and others, in namespaces of its own.

    Every packet is checked behind the gateway; what was lost or wrongly translated makes a round INVALID, and it does
    not count. Exit code 1 when anything was invalid or failed; missed marks alone are 0.

    A contestant of --external is a command that is run in the gateway's namespace, where the interfaces have their
    addresses and forwarding is on. It may end when all is set up, or stay until it is ended. It is ready once a
    datagram comes out translated.

    \b
    Example:
      xdpmasq bench --quick --contestant nftables --contestant xdpmasq-xdp
      xdpmasq bench --scenario all --plot bench.png
      xdpmasq bench --scenario scale --raise-conntrack
      xdpmasq bench --external 'einat=einat --ifname {wan}'
    """
    # As with Ctrl-C, the network is removed on the way out.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    one_ways: dict[Direction, tuple[OneWay, ...]] = {Direction.OUT: ("out",), Direction.IN: ("in",)}
    settings = Settings(
        flows=tuple(flows),
        sizes=tuple(size),
        directions=one_ways.get(direction, DIRECTIONS),
        externals=tuple(externals),
        rounds=rounds or (_QUICK_ROUNDS if quick else Settings.rounds),
        packets=packets or (_QUICK_PACKETS if quick else Settings.packets),
        seconds=seconds or (_QUICK_SECONDS if quick else Settings.seconds),
        sessions=sessions,
    )
    named(scenario)
    chosen = Chosen(tuple(contestant), tuple(parse_external(each) for each in external))
    if plot_file:
        plot.check(Path(plot_file))
    report = _watched(scenario, settings, chosen, Conditions(cpu if cpu >= 0 else None, raise_conntrack))
    if as_json:
        print(json.dumps(report.as_dict(), indent=1))
    elif as_markdown:
        print(markdown.document(report))
    else:
        Console().print(terminal.shown(report))
    if plot_file:
        plot.write(report, Path(plot_file))
    if not report.valid:
        raise typer.Exit(1)


def _leave(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _watched(scenarios: list[str], settings: Settings, chosen: Chosen, conditions: Conditions) -> Report:
    """The run, with a progress bar on stderr."""
    columns = (
        BarColumn(20),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=1.0)
        return run(
            scenarios,
            settings,
            chosen,
            conditions,
            lambda text, done: progress.update(task, description=text, completed=done),
        )
