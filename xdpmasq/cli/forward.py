"""``xdpmasq forward``: external ports that lead to internal hosts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import typer

from xdpmasq import forwards
from xdpmasq.cli import common, rules

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
ROW = "%-5s  %-11s  %-30s  %-18s  %10s  %8s  %s"

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def show(ctx: typer.Context, *, wan: str = common.WHICH, json: bool = common.JSON) -> None:
    """Lead external ports to internal hosts.

    Forwards are there at once, and stay while xdpmasq is attached. With --save they are written in the configuration
    file as well, and are there after the next start. Which remotes may come in is the firewall's business, too: a new
    session passes its forward chain.

    \b
    Examples:
      xdpmasq forward
      xdpmasq forward add tcp 8080 192.168.0.2:80
      xdpmasq forward add tcp default 192.168.0.9
      xdpmasq forward del tcp 8080
    """
    rules.bare(ctx, list_, wan=wan, json=json)


@app.command()
def add(
    protocol: str = rules.PROTOCOL,
    ports: str = PORTS,
    targets: list[str] = TARGETS,
    *,
    source: str = FROM,
    save: bool = rules.SAVE,
    config: str = rules.CONFIG,
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
      xdpmasq forward add udp default 192.168.0.9 --save
    """
    common.require_root("forward add")
    rule = forwards.parse(protocol, ports, targets, source)
    attached, saved = rules.put(wan, rule, rules.Saving(save, config))
    rules.print_added(rule, _fields(rule), saved, json=json, done="forwarded")
    from xdpmasq import forwarding  # noqa: PLC0415  heavy

    # The gateway's own way to its forwards is lo, where the agent attaches once there is one.
    rules.await_agent(attached, forwarding.is_served, "lo for the gateway's own connections to forwards")


@app.command("del")
def delete(
    protocol: str = rules.PROTOCOL,
    ports: str = PORTS,
    *,
    source: str = FROM,
    kill: bool = rules.KILL,
    save: bool = rules.SAVE,
    config: str = rules.CONFIG,
    wan: str = common.WHICH,
    json: bool = common.JSON,
) -> None:
    """End a forward. Its running sessions go on, unless they are to be ended as well.

    \b
    Examples:
      xdpmasq forward del tcp 8080
      xdpmasq forward del udp 5000-5010 --kill
      xdpmasq forward del tcp 80 --from 198.51.100.0/24
      xdpmasq forward del tcp default --save
    """
    common.require_root("forward del")
    named = forwards.named_as(protocol, ports, source)
    rule, left, ended, saved = rules.take(wan, named, rules.Saving(save, config), kill=kill)
    rules.print_taken(rule, _fields(rule), left, ended, saved, done="no longer forwarded", kill=kill, json=json)


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
    found = rules.listed(wan, "forward")
    rows = [
        {**_fields(each.rule), "opened": each.opened, "running": running, "left_s": left_s}
        for each, running, left_s in found
    ]
    rules.print_list(rows, _table, json=json, none="nothing is forwarded")


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
