"""``xdpmasq trigger``: external ports that open to whoever inside has called some other port (autofw of old)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from xdpmasq import forwards, triggers
from xdpmasq.cli import common, rules

if TYPE_CHECKING:
    from xdpmasq.forwarding import Placed

PORTS = typer.Argument(
    ..., metavar="PORTS", help="What an internal host calls outside: 6112, or a range.", show_default=False
)
OPENS = typer.Option(
    ..., "--opens", metavar="tcp|udp PORTS", help="What is opened to it then, as tcp 6112-6119.", show_default=False
)
FOR = typer.Option(triggers.LASTS_S, "--for", metavar="SECONDS", help="How long after the host's last packet there.")
ROW = "%-15s  %-17s  %6s  %-24s  %10s  %8s"

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def show(ctx: typer.Context, *, wan: str = common.WHICH, json: bool = common.JSON) -> None:
    """Open external ports to an internal host while it calls certain other ports.

    For old games and conferencing programs. The first host that calls has the ports until it has been silent for a
    while; then another may. Ports and all else are as with `xdpmasq forward`.

    \b
    Examples:
      xdpmasq trigger
      xdpmasq trigger add udp 6112 --opens tcp 6112-6119
      xdpmasq trigger del udp 6112 --opens tcp 6112-6119
    """
    rules.bare(ctx, list_, wan=wan, json=json)


@app.command()
def add(
    protocol: str = rules.PROTOCOL,
    ports: str = PORTS,
    *,
    opens: tuple[str, str] = OPENS,
    lasts_s: int = FOR,
    save: bool = rules.SAVE,
    config: str = rules.CONFIG,
    wan: str = common.WHICH,
    json: bool = common.JSON,
) -> None:
    """Have calls to a port open other ports. One call can open a range of TCP and, by a second trigger, one of UDP.

    \b
    Examples:
      xdpmasq trigger add udp 6112 --opens tcp 6112-6119
      xdpmasq trigger add tcp 554 --opens udp 6970-7170 --for 300
    """
    common.require_root("trigger add")
    rule = triggers.parse(protocol, ports, " ".join(opens), lasts_s)
    _, saved = rules.put(wan, rule, rules.Saving(save, config))
    rules.print_added(rule, _fields(rule), saved, json=json, done="triggered")


@app.command("del")
def delete(
    protocol: str = rules.PROTOCOL,
    ports: str = PORTS,
    *,
    opens: tuple[str, str] = OPENS,
    kill: bool = rules.KILL,
    save: bool = rules.SAVE,
    config: str = rules.CONFIG,
    wan: str = common.WHICH,
    json: bool = common.JSON,
) -> None:
    """End a trigger. Sessions that came in by its ports go on, unless they are to be ended as well.

    \b
    Example:
      xdpmasq trigger del udp 6112 --opens tcp 6112-6119
    """
    common.require_root("trigger del")
    named = triggers.parse(protocol, ports, " ".join(opens))
    rule, left, ended, saved = rules.take(wan, named, rules.Saving(save, config), kill=kill)
    rules.print_taken(rule, _fields(rule), left, ended, saved, done="no longer triggered", kill=kill, json=json)


@app.command("list")
def list_(*, wan: str = common.WHICH, json: bool = common.JSON) -> None:
    """List triggers, to whom they are open, and the sessions that came in.

    \b
    Examples:
      xdpmasq trigger list
      xdpmasq trigger list --json | jq '.[] | select(.open_to)'
    """
    common.require_root("trigger list")
    rows = [_row(*each) for each in rules.listed(wan, "trigger")]
    rules.print_list(rows, _table, json=json, none="nothing is triggered")


def _row(placed: "Placed", running: int, left_s: int | None) -> dict[str, Any]:
    holder = str(placed.open_to) if placed.open_to else None
    state = {"open_to": holder, "open_s": left_s or 0, "opened": placed.opened, "running": running}
    return {**_fields(placed.rule), **state}


def _fields(rule: Any) -> dict[str, Any]:
    """A trigger for scripts; the keys are a contract with them."""
    return {
        "calls": {"protocol": rule.caller_protocol, "first": rule.caller_first, "last": rule.caller_last},
        "opens": {"protocol": rule.protocol, "first": rule.first, "last": rule.last},
        "lasts_s": rule.lasts_s,
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield ROW % ("CALL TO", "OPENS", "FOR", "OPEN TO", "OPENED", "RUNNING")
    for row in rows:
        holder = f"{row['open_to']} ({common.duration(row['open_s'])})" if row["open_to"] else "nobody"
        counts = f"{row['opened']:,}", f"{row['running']:,}"
        yield ROW % (_ports(row["calls"]), _ports(row["opens"]), f"{row['lasts_s']} s", holder, *counts)


def _ports(fields: Mapping[str, Any]) -> str:
    return f"{fields['protocol']} {forwards.range_of(fields['first'], fields['last'])}"
