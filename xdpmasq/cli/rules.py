"""What `forward`, `redirect` and `trigger` share: rules of one kind are put in place, taken out and listed alike."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from xdpmasq import forwards
from xdpmasq.cli import common
from xdpmasq.errors import UsageError
from xdpmasq.forwards import Rule

if TYPE_CHECKING:
    from xdpmasq.datapath import Attached
    from xdpmasq.forwarding import Placed
    from xdpmasq.sessions import Table

PROTOCOL = typer.Argument(..., metavar="tcp|udp", show_default=False)
Rows = Sequence[Mapping[str, Any]]
KILL = typer.Option(False, "--kill", help="End its running sessions, too.")


def bare(ctx: typer.Context, list_: Callable[..., None], *, wan: str, json: bool) -> None:
    """The command without a verb lists."""
    if ctx.invoked_subcommand is None:
        list_(wan=wan, json=json)
    elif wan or json:
        command, verb = ctx.info_name, ctx.invoked_subcommand
        raise UsageError(f"options stand before {verb}", "", f"write them after it: xdpmasq {command} {verb} …")


def put(wan: str, rule: Rule) -> "Attached":
    """Puts a rule in place; returns where."""
    from xdpmasq import datapath, forwarding, presence  # noqa: PLC0415  heavy

    with presence.changing():
        attached = datapath.find(wan or None)
        forwarding.check(attached, rule)
        forwarding.put(attached, attached.reaper, rule)
    return attached


def take(wan: str, wanted: Rule, *, kill: bool) -> tuple[Rule, int, int]:
    """Takes out the rule of that kind and name.

    Returns:
        The rule, how many sessions go on, and how many were ended.
    """
    from xdpmasq import datapath, forwarding, presence, redirecting  # noqa: PLC0415  heavy

    with presence.changing():
        attached = datapath.find(wan or None)
        present = forwarding.read(attached)
        rule = forwards.find([each.rule for each in present if each.rule.kind == wanted.kind], wanted)
        placed = next(each for each in present if each.rule == rule)
        # Which sessions are its own is known only while it is there.
        mine = _running(attached, present)[placed.index]
        count = _count(attached, placed, mine)
        forwarding.take(attached, attached.reaper, placed)
        ended = 0
        if kill:
            ended = redirecting.end(attached, placed.index) if rule.from_inside else attached.flush(mine.slot)
    return rule, max(count - ended, 0), ended


def listed(wan: str, kind: str) -> "list[tuple[Placed, int, int | None]]":
    """The rules of a kind, each with its running sessions and the seconds that it has left; None: it stays."""
    from xdpmasq import datapath, forwarding  # noqa: PLC0415  heavy

    attached = datapath.find(wan or None)
    present = forwarding.read(attached)
    mine = _running(attached, present)
    return [
        (each, _count(attached, each, mine[each.index]), forwarding.left_s(each.expires, attached.hz))
        for each in present
        if each.rule.kind == kind
    ]


def _running(attached: "Attached", present: "list[Placed]") -> "dict[int, Table]":
    from xdpmasq import forwarding, sessions  # noqa: PLC0415  heavy

    table = sessions.read(attached.sessions, attached.settings, attached.now(), attached.hz)
    return forwarding.running(attached, table, present)


def _count(attached: "Attached", placed: "Placed", mine: "Table") -> int:
    from xdpmasq import redirecting  # noqa: PLC0415  heavy

    return int(redirecting.running(attached)[placed.index]) if placed.rule.from_inside else len(mine)


def print_added(rule: Rule, fields: dict[str, Any], *, json: bool, done: str) -> None:
    if json:
        common.print_json(fields)
    else:
        print(f"{done}: {rule}")


def print_taken(
    rule: Rule, fields: dict[str, Any], left: int, ended: int, *, done: str, kill: bool, json: bool
) -> None:
    running = (
        f"{common.plural(ended, 'session')} ended" if kill else f"{common.plural(left, 'session')} still running"
    )
    if json:
        common.print_json({**fields, "running": left, "ended": ended})
    else:
        print(f"{done}: {rule}" + (f"; {running}" if kill or left else ""))


def print_list(rows: Rows, table: Callable[[Rows], Iterable[str]], *, json: bool, none: str) -> None:
    if json:
        common.print_json(rows)
    else:
        print("\n".join(table(rows)) if rows else none)
