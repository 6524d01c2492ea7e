"""``xdpmasq alg``: protocols that carry addresses, read and edited on their way."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from xdpmasq.cli import common, rules
from xdpmasq.errors import UsageError

if TYPE_CHECKING:
    from xdpmasq.datapath import Attached
    from xdpmasq.pinholes import Pinhole

NAME = typer.Argument(..., metavar="NAME", help="As in `xdpmasq alg list`.", show_default=False)
PORTS = typer.Option(
    [], "--port", metavar="'tcp PORT'", show_default=False,
    help="A port of the servers, as 'tcp 2121'; may be repeated. Default: the protocol's own.",
)  # fmt: skip
INTERNAL = typer.Option(
    [], "--internal", metavar="PREFIX", show_default=False,
    help="Only for these internal hosts; may be repeated. Default: for all.",
)  # fmt: skip
ROW = "%-8s  %-3s  %-22s  %-18s  %8s  %7s  %8s"
PINHOLE = "%-4s  %-21s  %-21s  %-21s  %5s  %6s"

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def show(ctx: typer.Context, *, wan: str = common.WHICH, json: bool = common.JSON) -> None:
    """Have protocols work that carry addresses in their texts: active FTP, SIP, IRC's DCC and others.

    By default only FTP is on. An ALG opens ports to whoever makes a host's program say the right words: switch on
    what is needed, for the hosts that need it.

    \b
    Examples:
      xdpmasq alg
      xdpmasq alg enable sip --internal 192.168.0.0/28
      xdpmasq alg disable ftp
    """
    if ctx.invoked_subcommand is None:
        list_(wan=wan, json=json)
    elif wan or json:
        verb = ctx.invoked_subcommand
        raise UsageError(f"options stand before {verb}", "", f"write them after it: xdpmasq alg {verb} …")


@app.command("list")
def list_(*, wan: str = common.WHICH, json: bool = common.JSON) -> None:
    """List the ALGs that there are, what they have done since the agent's start, and the pinholes that are open.

    \b
    Examples:
      xdpmasq alg list
      xdpmasq alg list --json | jq '.pinholes[].internal'
    """
    common.require_root("alg list")
    from xdpmasq import pinholes  # noqa: PLC0415  heavy
    from xdpmasq.alg import registry, switches  # noqa: PLC0415

    attached = _find(wan)
    on = {use.name: use.as_fields() for use in switches.read(attached)}
    counts = attached.manifest.get("algs", {}) if attached.agent_alive else {}
    rows = [
        {"name": name, "enabled": name in on, **on.get(name, {}), **counts.get(name, {})} for name in registry.names()
    ]
    opened = pinholes.listed(attached)
    if json:
        common.print_json({"algs": rows, "pinholes": [_fields(each) for each in opened]})
        return
    for line in (*_table(rows), *_pinholes(opened)):
        print(line)


@app.command()
def enable(
    name: str = NAME,
    *,
    port: list[str] = PORTS,
    internal: list[str] = INTERNAL,
    save: bool = rules.SAVE,
    config: str = rules.CONFIG,
    wan: str = common.WHICH,
    json: bool = common.JSON,
) -> None:
    """Switch an ALG on, for sessions that are opened from now on; or change for which it is on.

    \b
    Examples:
      xdpmasq alg enable irc --save
      xdpmasq alg enable ftp --port 'tcp 21' --port 'tcp 2121' --internal 192.168.0.0/24
    """
    common.require_root("alg enable")
    from xdpmasq import algs, presence, saving  # noqa: PLC0415  heavy
    from xdpmasq.alg import switches  # noqa: PLC0415

    use = algs.Use.parse(name, port, internal)
    with presence.changing(), contextlib.ExitStack() as undo:
        attached = _find(wan)
        draft = rules.Saving(save, config).draft(attached, saving.with_alg, use)
        if draft:
            undo.enter_context(draft)
        before = switches.read(attached)
        switches.put(attached, use)
        undo.callback(switches.replace, attached, before)
        if draft:
            draft.keep()
        undo.pop_all()
    saved = rules.Saved.of(draft)
    if json:
        common.print_json(use.as_fields() | saved.fields())
    else:
        print(f"{name} reads {_ports(use.as_fields())} of {_hosts(use.as_fields())}{saved.words('says so already')}")


@app.command()
def disable(
    name: str = NAME,
    *,
    save: bool = rules.SAVE,
    config: str = rules.CONFIG,
    wan: str = common.WHICH,
    json: bool = common.JSON,
) -> None:
    """Switch an ALG off. Sessions that it reads go on; it edits nothing in them any more.

    \b
    Examples:
      xdpmasq alg disable ftp
      xdpmasq alg disable sip --save
    """
    common.require_root("alg disable")
    from xdpmasq import presence, saving  # noqa: PLC0415  heavy
    from xdpmasq.alg import registry, switches  # noqa: PLC0415

    with presence.changing():
        attached = _find(wan)
        on = {use.name for use in switches.read(attached)}
        if name not in (*on, *registry.names()):
            raise UsageError(f"there is no ALG {name}", "", f"there are {', '.join(registry.names())}")
        draft = rules.Saving(save, config).draft(attached, saving.without_alg, name)
        if draft:
            with draft:
                draft.keep()
        was_on = switches.take(attached, name)
    saved = rules.Saved.of(draft)
    if json:
        common.print_json({"disabled": was_on} | saved.fields())
    else:
        print((f"{name} is off" if was_on else f"{name} was not on") + saved.words("says so already"))


def _find(wan: str) -> "Attached":
    from xdpmasq import datapath  # noqa: PLC0415  heavy

    return datapath.find(wan or None)


def _fields(hole: "Pinhole") -> dict[str, Any]:
    """A pinhole for scripts; the keys are a contract with them."""
    return {
        "protocol": hole.protocol,
        "internal": {"address": str(hole.internal.address), "port": hole.internal.port},
        "external": {"address": str(hole.external.address), "port": hole.external.port},
        "remote": {"address": str(hole.remote) if hole.remote else None, "port": hole.remote_port or None},
        "sessions_left": hole.left,
        "left_s": round(hole.left_s),
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield ROW % ("ALG", "ON", "READS", "OF", "MESSAGES", "EDITED", "UNCHANGED")
    for row in rows:
        if row["enabled"]:
            failed = sum(row.get(each, 0) for each in ("unparsed", "refused", "failed", "late", "unasked"))
            counts = f"{row.get('messages', 0):,}", f"{row.get('edited', 0):,}", f"{failed:,}"
            yield ROW % (row["name"], "on", _ports(row), _hosts(row), *counts)
        else:
            yield ROW % (row["name"], "off", *[""] * 5)


def _pinholes(opened: Sequence["Pinhole"]) -> Iterator[str]:
    if not opened:
        return
    yield ""
    yield PINHOLE % ("OPEN", "TO", "AS", "FOR", "TIMES", "LEFT")
    for hole in opened:
        remote = f"{hole.remote or 'anybody'}{f':{hole.remote_port}' if hole.remote_port else ''}"
        times = "any" if hole.left is None else str(hole.left)
        yield PINHOLE % (
            hole.protocol,
            hole.internal,
            hole.external,
            remote,
            times,
            common.duration(int(hole.left_s)),
        )


def _ports(fields: Mapping[str, Any]) -> str:
    return ", ".join(fields["ports"])


def _hosts(fields: Mapping[str, Any]) -> str:
    return ", ".join(fields["internal"]) or "every host"
