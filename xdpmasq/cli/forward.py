"""``xdpmasq forward``: external ports that lead to internal hosts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from xdpmasq import forwards
from xdpmasq.cli import common
from xdpmasq.errors import UsageError

if TYPE_CHECKING:
    from xdpmasq.datapath import Attached
    from xdpmasq.forwarding import Placed
    from xdpmasq.sessions import Table

PROTOCOL = typer.Argument(..., metavar="tcp|udp", show_default=False)
PORTS = typer.Argument(
    ...,
    metavar="PORTS",
    help="8080, a range as 5000-5010, or default: whatever nothing else takes.",
    show_default=False,
)
TARGETS = typer.Argument(
    ..., metavar="TARGET", show_default=False,
    help="ADDR, ADDR:PORT or ADDR:FIRST-LAST; several share new sessions, by weights given as ADDR:PORT*2.",
)  # fmt: skip
FROM = typer.Option("", "--from", metavar="PREFIX", help="Only for these remotes.", show_default=False)
KILL = typer.Option(False, "--kill", help="End its running sessions, too.")
ROW = "%-5s  %-11s  %-30s  %-18s  %10s  %8s  %s"

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def show(ctx: typer.Context, *, wan: str = common.WHICH, json: bool = common.JSON) -> None:
    """Lead external ports to internal hosts.

    Forwards are there at once, stay while xdpmasq is attached, and are written in the configuration to be there after
    the next start. Which remotes may come in is the firewall's business, too: a new session passes its forward chain.

    \b
    Examples:
      xdpmasq forward
      xdpmasq forward add tcp 8080 192.168.0.2:80
      xdpmasq forward add tcp default 192.168.0.9
      xdpmasq forward del tcp 8080
    """
    if ctx.invoked_subcommand is None:
        list_(wan=wan, json=json)
    elif wan or json:
        verb = ctx.invoked_subcommand
        raise UsageError(f"options stand before {verb}", "", f"write them after it: xdpmasq forward {verb} …")


@app.command()
def add(
    protocol: str = PROTOCOL,
    ports: str = PORTS,
    targets: list[str] = TARGETS,
    *,
    source: str = FROM,
    wan: str = common.WHICH,
    json: bool = common.JSON,
) -> None:
    """Forward external ports to an internal host, or to several in turns.

    A target without a port gets the external one; of a range it is the first. With --from, the same ports can lead
    other remotes elsewhere: the most specific prefix wins. The default host (DMZ) gets, ports unchanged, what no
    forward, no mapping and no service of the gateway takes.

    \b
    Examples:
      xdpmasq forward add tcp 8080 192.168.0.2:80
      xdpmasq forward add udp 5000-5010 192.168.0.3
      xdpmasq forward add tcp 80 192.168.0.2:80 '192.168.0.3:80*2' --from 198.51.100.0/24
      xdpmasq forward add udp default 192.168.0.9
    """
    common.require_root("forward add")
    rule = forwards.parse(protocol, ports, targets, source)
    from xdpmasq import forwarding, presence  # noqa: PLC0415  heavy

    with presence.changing():
        attached = _find(wan)
        forwarding.check(attached, rule)
        forwarding.put(attached, attached.reaper, rule)
    if json:
        common.print_json(_fields(rule))
    else:
        print(f"forwarded: {rule}")


@app.command("del")
def delete(
    protocol: str = PROTOCOL,
    ports: str = PORTS,
    *,
    source: str = FROM,
    kill: bool = KILL,
    wan: str = common.WHICH,
    json: bool = common.JSON,
) -> None:
    """End a forward. Its running sessions go on, unless they are to be ended as well.

    \b
    Examples:
      xdpmasq forward del tcp 8080
      xdpmasq forward del udp 5000-5010 --kill
      xdpmasq forward del tcp 80 --from 198.51.100.0/24
      xdpmasq forward del tcp default
    """
    common.require_root("forward del")
    from xdpmasq import forwarding, presence  # noqa: PLC0415  heavy

    with presence.changing():
        attached = _find(wan)
        present = forwarding.read(attached)
        rule = forwards.find([each.rule for each in present], protocol, ports, source)
        placed = next(each for each in present if each.rule == rule)
        # Which sessions are its own is known only while it is there.
        mine = _running(attached, present)[placed.index]
        forwarding.take(attached, attached.reaper, placed)
        ended = attached.flush(mine.slot) if kill else 0
    left = len(mine) - ended
    if json:
        common.print_json({**_fields(rule), "running": left, "ended": ended})
    elif kill:
        print(f"no longer forwarded: {rule}; {common.plural(ended, 'session')} ended")
    else:
        print(f"no longer forwarded: {rule}" + (f"; {common.plural(left, 'session')} still running" if left else ""))


@app.command("list")
def list_(*, wan: str = common.WHICH, json: bool = common.JSON) -> None:
    """List forwards, with the sessions opened through each so far, and those running.

    Mappings that internal hosts have asked for (PCP, NAT-PMP) are forwards, too; of those it tells what time is left.

    \b
    Examples:
      xdpmasq forward list
      xdpmasq forward list --json | jq '.[] | select(.running > 0)'
    """
    common.require_root("forward list")
    from xdpmasq import forwarding  # noqa: PLC0415  heavy

    attached = _find(wan)
    present = forwarding.read(attached)
    counts = {index: len(table) for index, table in _running(attached, present).items()}
    rows = [
        {
            **_fields(each.rule),
            "opened": each.opened,
            "running": counts[each.index],
            "left_s": forwarding.left_s(each.expires, attached.hz),
        }
        for each in present
    ]
    if json:
        common.print_json(rows)
    elif rows:
        print("\n".join(_table(rows)))
    else:
        print("nothing is forwarded")


def _find(wan: str) -> "Attached":
    from xdpmasq import datapath  # noqa: PLC0415  heavy

    return datapath.find(wan or None)


def _running(attached: "Attached", present: Sequence["Placed"]) -> "dict[int, Table]":
    from xdpmasq import forwarding, sessions  # noqa: PLC0415  heavy

    table = sessions.read(attached.sessions, attached.settings, attached.now(), attached.hz)
    return forwarding.running(attached, table, present)


def _fields(rule: forwards.Rule) -> dict[str, Any]:
    """A rule for scripts; the keys are a contract with them. The default host's first port is 0."""
    return {
        "protocol": rule.protocol,
        "ports": {"first": rule.first, "last": rule.last},
        "default": rule.is_default,
        "targets": [
            {"address": str(each.address), "port": each.port, "weight": each.weight} for each in rule.targets
        ],
        "to": list(rule.to),
        "from": str(rule.source) if rule.source else None,
        "by": "pcp" if rule.lease else "user",
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield ROW % ("PROTO", "PORTS", "TARGET", "FROM", "OPENED", "RUNNING", "LEFT")
    for row in rows:
        first, last = row["ports"].values()
        ports = forwards.DEFAULT if row["default"] else f"{first}-{last}".removesuffix(f"-{first}")
        target, *more = row["to"]
        counts = f"{row['opened']:,}", f"{row['running']:,}"
        yield (ROW % (row["protocol"], ports, target, row["from"] or "anywhere", *counts, _left(row))).rstrip()
        for each in more:
            yield (ROW % ("", "", each, "", "", "", "")).rstrip()


def _left(row: Mapping[str, Any]) -> str:
    """How long it will be there, and by whom, where that is not the user and for good."""
    left = "" if row["left_s"] is None else common.duration(row["left_s"])
    return left if row["by"] == "user" else f"{left}, by {row['by']}"
