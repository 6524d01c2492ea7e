"""``xdpmasq redirect``: ports that the gateway answers in place of others (transparent proxies)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import typer

from xdpmasq import redirects
from xdpmasq.cli import common, rules

PORTS = typer.Argument(..., metavar="PORTS", help="80, or a range as 5000-5010.", show_default=False)
TO = typer.Argument(..., metavar="PORT", help="The gateway's own port; of a range the first.", show_default=False)
ON = typer.Option(
    ..., "--on", metavar="lan|wan", show_default=False,
    help="lan: what internal hosts send to anybody outside; wan: what comes from outside to the external address.",
)  # fmt: skip
FROM = typer.Option(
    "", "--from", metavar="PREFIX", help="Only from these: internal hosts, on wan remotes.", show_default=False
)
NOT_TO = typer.Option(
    [], "--not-to", metavar="PREFIX", help="Destinations left alone; repeatable.", show_default=False
)
ROW = "%-3s  %-5s  %-11s  %-11s  %-18s  %-18s  %10s  %8s"

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def show(ctx: typer.Context, *, wan: str = common.WHICH, json: bool = common.JSON) -> None:
    """Answer ports of others by a service of the gateway: a transparent proxy, the LAN's own DNS.

    Redirects are there at once, and stay while xdpmasq is attached. With --save they are written in the configuration
    file as well, and are there after the next start. Packets to the gateway itself or between LANs are left alone, as
    is what the gateway sends.

    \b
    Examples:
      xdpmasq redirect
      xdpmasq redirect add tcp 80 3128 --on lan
      xdpmasq redirect del tcp 80 --on lan
    """
    rules.bare(ctx, list_, wan=wan, json=json)


@app.command()
def add(
    protocol: str = rules.PROTOCOL,
    ports: str = PORTS,
    to: str = TO,
    *,
    on: str = ON,
    source: str = FROM,
    not_to: list[str] = NOT_TO,
    save: bool = rules.SAVE,
    config: str = rules.CONFIG,
    wan: str = common.WHICH,
    json: bool = common.JSON,
) -> None:
    """Redirect ports to the gateway itself.

    The service sees its client's real address, and the client sees the answer come from whom it called. On lan, TCP
    connections that are there already go on as they are. On wan, internal hosts that call the external address are
    not redirected.

    \b
    Examples:
      xdpmasq redirect add tcp 80 3128 --on lan --not-to 198.51.100.0/24
      xdpmasq redirect add udp 53 53 --on lan
      xdpmasq redirect add tcp 80 8080 --on wan
    """
    common.require_root("redirect add")
    rule = redirects.parse(protocol, ports, to, on, source=source, not_to=not_to)
    attached, saved = rules.put(wan, rule, rules.Saving(save, config))
    rules.print_added(rule, _fields(rule), saved, json=json, done="redirected")
    if rule.from_inside:
        from xdpmasq import redirecting  # noqa: PLC0415  heavy

        # What brings the answers back is attached to the LANs by the agent, once there is a redirect.
        rules.await_agent(attached, redirecting.is_served, "the LANs for the first redirect")


@app.command("del")
def delete(
    protocol: str = rules.PROTOCOL,
    ports: str = PORTS,
    *,
    on: str = ON,
    source: str = FROM,
    kill: bool = rules.KILL,
    save: bool = rules.SAVE,
    config: str = rules.CONFIG,
    wan: str = common.WHICH,
    json: bool = common.JSON,
) -> None:
    """End a redirect. Its running connections go on, unless they are to be ended as well.

    \b
    Examples:
      xdpmasq redirect del tcp 80 --on lan
      xdpmasq redirect del tcp 80 --on wan --from 198.51.100.0/24 --kill
    """
    common.require_root("redirect del")
    named = redirects.named(protocol, ports, on, source)
    rule, left, ended, saved = rules.take(wan, named, rules.Saving(save, config), kill=kill)
    rules.print_taken(rule, _fields(rule), left, ended, saved, done="no longer redirected", kill=kill, json=json)


@app.command("list")
def list_(*, wan: str = common.WHICH, json: bool = common.JSON) -> None:
    """List redirects, with the connections opened through each so far, and those running.

    \b
    Examples:
      xdpmasq redirect list
      xdpmasq redirect list --json | jq '.[] | select(.on == "lan")'
    """
    common.require_root("redirect list")
    found = rules.listed(wan, "redirect")
    rows = [{**_fields(each.rule), "opened": each.opened, "running": running} for each, running, _ in found]
    rules.print_list(rows, _table, json=json, none="nothing is redirected")


def _fields(rule: Any) -> dict[str, Any]:
    """A redirect for scripts; the keys are a contract with them."""
    return {
        "on": rule.on,
        "protocol": rule.protocol,
        "ports": {"first": rule.first, "last": rule.last},
        "to": rule.to[0],
        "from": str(rule.source) if rule.source else None,
        "not_to": [str(each) for each in rule.spared],
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield ROW % ("ON", "PROTO", "PORTS", "TO", "FROM", "NOT TO", "OPENED", "RUNNING")
    for row in rows:
        first, last = row["ports"].values()
        ports, counts = f"{first}-{last}".removesuffix(f"-{first}"), (f"{row['opened']:,}", f"{row['running']:,}")
        spared, *more = row["not_to"] or [""]
        yield ROW % (row["on"], row["protocol"], ports, row["to"], row["from"] or "anywhere", spared, *counts)
        for each in more:
            yield (ROW % ("", "", "", "", "", each, "", "")).rstrip()
