"""``xdpmasq top``: who uses the uplink right now, on one screen."""

import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from json import dumps
from typing import TYPE_CHECKING

import typer

from xdpmasq.cli import common
from xdpmasq.cli.sessions import EXTERNAL, INTERNAL, PROTO, REMOTE, STATE, Following, selection_of
from xdpmasq.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from xdpmasq.rates import Look, Rates, Top
    from xdpmasq.selection import Selection

SORTS = {"r": "rate", "p": "packets", "s": "sessions", "h": "host"}  # by key
KEYS = "q quit   t hosts/sessions   sort by: r rate  p packets  s sessions  h host"
FIRST_S = 0.5  # the first measurement on a screen
BESIDE = 7  # lines of the screen that are not rows
DROPS = 3  # reasons on the screen
NARROW = 100  # columns, below which a session's line has either bytes or packets

SORT = typer.Option("rate", "--sort", metavar="|".join(SORTS.values()), help="What comes first.")
SESSIONS = typer.Option(False, "--sessions", help="Sessions instead of hosts.")
INTERVAL = typer.Option(
    2.0, "--interval", metavar="SECONDS", min=0.1, max=3600, help="How long to measure each time."
)
COUNT = typer.Option(0, "--count", metavar="N", min=0, help="End after so many measurements.", show_default=False)
ONCE = typer.Option(False, "--once", help="Measure once, print, and end.")
ROWS = typer.Option(20, "--rows", metavar="N", min=1, help="How many, where there is no screen to fill.")


def top(
    *,
    sort: str = SORT,
    each: bool = SESSIONS,
    proto: str = PROTO,
    internal: str = INTERNAL,
    external: str = EXTERNAL,
    remote: str = REMOTE,
    state: str = STATE,
    interval: float = INTERVAL,
    count: int = COUNT,
    rows: int = ROWS,
    once: bool = ONCE,
    wan: str = common.WHICH,
    json: bool = common.JSON,
) -> None:
    """Show which hosts, or sessions, carry most right now.

    OUT is from the internal host, IN to it, in IP bytes; the lines above tell of all sessions, whatever the filters.
    Further sessions are those beyond the first of each mapping, which have room of their own. One-to-one hosts, and
    protocols without ports (GRE, ESP), have no sessions: they count in the fast-path share and the drops only.

    With --json each measurement is an object on a line: time, interval_s, out and in (bytes_per_s, packets_per_s),
    fast_share (0 to 1; null without packets), sessions (total, tcp, udp, icmp), further_sessions (used, room),
    ports (by protocol: used, resting, forwarded, available), drops_per_s (by counter), among (how many fit), and
    the first of them in top: host, sessions, out, in; or, with --sessions, protocol, state, internal, external,
    remote, out, in.

    \b
    Examples:
      xdpmasq top
      xdpmasq top --sessions --internal 192.168.0.2 --sort packets
      xdpmasq top --once --json | jq '.top[0].host'
    """
    common.require_root("top")
    if sort not in SORTS.values():
        raise UsageError(f"there is no order {sort}", "", f"give one of {', '.join(SORTS.values())}")
    view = View(selection_of(proto, internal, external, remote, state), sort, not each, rows)
    from xdpmasq import rates  # noqa: PLC0415  heavy

    following = Following(wan)

    def look() -> "Look":
        return rates.look(following())

    count = 1 if once else count
    if json or once or not sys.stdout.isatty():
        _print(look, view, interval, count, json)
    else:
        _live(look, view, interval, count)


@dataclass(frozen=True)
class View:
    """What is shown of what was measured."""

    selection: "Selection"
    sort: str
    hosts: bool
    rows: int

    def first(self, measured: "Rates") -> "Top":
        from xdpmasq import rates  # noqa: PLC0415  heavy

        return rates.top(measured, self.selection, self.sort, self.rows, hosts=self.hosts)

    def pressed(self, key: str) -> "View":
        if key == "t":
            return replace(self, hosts=not self.hosts)
        return replace(self, sort=SORTS.get(key, self.sort))


def _print(look: Callable[[], "Look"], view: View, interval: float, count: int, json: bool) -> None:
    """One measurement after another, for scripts, files and pipes."""
    from rich.console import Console  # noqa: PLC0415  heavy

    from xdpmasq import rates  # noqa: PLC0415  heavy

    console, before, done = Console(highlight=False), look(), 0
    while not count or done < count:
        time.sleep(interval)
        after = look()
        measured = rates.between(before, after)
        first = view.first(measured)
        if json:
            print(dumps(rates.as_fields(measured, first)))
        else:
            console.print(*[""] * bool(done), screen(measured, first, view, console.width), sep="\n")
        sys.stdout.flush()
        before, done = after, done + 1


def _live(look: Callable[[], "Look"], view: View, interval: float, count: int) -> None:
    """On the terminal's other screen, until q or Ctrl-C."""
    from rich.console import Group  # noqa: PLC0415  heavy
    from rich.live import Live  # noqa: PLC0415  heavy

    from xdpmasq import rates  # noqa: PLC0415  heavy

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # the screen is left on the way
    before, done, due, measured = look(), 0, time.monotonic() + min(interval, FIRST_S), None
    with Live(Group("measuring …"), screen=True, auto_refresh=False) as live, _keyboard() as pressed:
        while not count or done < count:
            key = pressed(max(0.0, due - time.monotonic()))
            if key == "q":
                return
            view = view.pressed(key)
            if time.monotonic() >= due:
                after = look()
                measured = rates.between(before, after)
                before, done, due = after, done + 1, time.monotonic() + interval
            if measured:
                width, height = live.console.size
                view = replace(view, rows=max(1, height - BESIDE))
                first = view.first(measured)
                live.update(Group(screen(measured, first, view, width), _line(KEYS, "dim")), refresh=True)


@contextlib.contextmanager
def _keyboard() -> Iterator[Callable[[float], str]]:
    """Waits for a key so many seconds; empty: none came. Without a terminal to read from none ever does."""
    if not sys.stdin.isatty():

        def pause(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield pause
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([fd], [], [], seconds)
        return (os.read(fd, 1) or b"q").decode(errors="replace") if ready else ""  # nothing more to come: an end, too

    try:
        tty.setcbreak(fd)
        yield pressed
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


# --- the screen ------------------------------------------------------------------------------------


def screen(measured: "Rates", first: "Top", view: View, width: int) -> "RenderableType":
    """The measurement for people, no line longer than ``width``."""
    from rich.console import Group  # noqa: PLC0415  heavy
    from rich.table import Table  # noqa: PLC0415  heavy

    columns = _host_columns(first) if view.hosts else _session_columns(first, view, width)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="reverse", expand=True)
    for heading in columns:
        left = heading in ("HOST", "PROTO", "INTERNAL", "EXTERNAL", "REMOTE", "STATE")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    what = "hosts" if view.hosts else "sessions"
    shown = f"{len(first):,} of {first.among:,} {what} by {view.sort}, {measured.seconds:.1f} s until {_clock()}"
    return Group(*(_line(text) for text in _summary(measured)), _line(shown), "", table)


def _line(text: str, style: str = "") -> "RenderableType":
    from rich.text import Text  # noqa: PLC0415  heavy

    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _clock() -> str:
    return time.strftime("%H:%M:%S")


def _summary(measured: "Rates") -> Iterator[str]:
    yield "   ".join(common.traffic(measured))
    fill = "  ".join(f"{name} {_part(use['used'], use['available'])}" for name, use in measured.now.ports.items())
    used, room = measured.now.further
    yield f"sessions {len(measured.now.table):,}   ports {fill}   further {_part(used, room)}"
    drops = measured.drops
    some = ", ".join(f"{name.removeprefix('drop_')} {_count(drops[name])}/s" for name in list(drops)[:DROPS])
    yield f"drops {_count(sum(drops.values()))}/s: {some}" if drops else "drops none"


def _host_columns(first: "Top") -> dict[str, list[str]]:
    counts = [f"{int(each):,}" for each in first.sessions]
    return {"HOST": first.names, "SESSIONS": counts, **_speeds(first, bytes_=True, packets=True)}


def _session_columns(first: "Top", view: View, width: int) -> dict[str, list[str]]:
    from xdpmasq import listing  # noqa: PLC0415  heavy

    assert first.table is not None
    protocol, state, internal, external, remote = listing.ends(first.table)
    by_packets, wide = view.sort == "packets", width >= NARROW
    more = {"STATE": state, "EXTERNAL": external} if width >= NARROW + 35 else {}
    ends = {"PROTO": protocol, "INTERNAL": internal, **more, "REMOTE": remote}
    return {**ends, **_speeds(first, bytes_=wide or not by_packets, packets=wide or by_packets)}


def _speeds(first: "Top", *, bytes_: bool, packets: bool) -> dict[str, list[str]]:
    out_packets, out_bytes, in_packets, in_bytes = first.speed.T.tolist()
    columns: dict[str, list[str]] = {}
    if bytes_:
        columns |= {"OUT": _cells(common.bit_rate, out_bytes), "IN": _cells(common.bit_rate, in_bytes)}
    if packets:
        columns |= {
            "OUT-PACKETS": _cells(common.packet_rate, out_packets),
            "IN-PACKETS": _cells(common.packet_rate, in_packets),
        }
    return columns


def _cells(written: Callable[[float], str], speeds: list[float]) -> list[str]:
    return [written(each) if each else "-" for each in speeds]


def _count(per_s: float) -> str:
    return f"{per_s:,.0f}" if per_s >= 10 else f"{per_s:.1f}"


def _part(used: int, room: int) -> str:
    return f"{used / room:.1%}" if room else "none"
