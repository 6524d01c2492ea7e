"""``xdpmasq status``: one screen that says whether it works, and what it does."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import typer

from xdpmasq.cli import common

if TYPE_CHECKING:
    from xdpmasq.datapath import Attached
    from xdpmasq.rates import Rates

MEASURE_S = 0.3
DROPS = 6  # reasons on the screen, the most frequent ones


def status(*, wan: str = common.WHICH, json: bool = common.JSON) -> None:
    """Show whether it works, since when, how fast, how full it is, and what was dropped and why.

    What goes on at this moment is measured for a third of a second; scripts find it in `xdpmasq top --once --json`.

    \b
    Examples:
      xdpmasq status
      xdpmasq status --json
    """
    common.require_root("status")
    from xdpmasq import datapath, rates, source  # noqa: PLC0415  heavy

    attached = datapath.find(wan or None)
    if json:
        common.print_json(describe(attached))
        return
    before = rates.look(attached)
    time.sleep(MEASURE_S)
    measured = rates.between(before, rates.look(attached))
    typer.echo("\n".join(_screen(describe(attached), source.counters(), measured)))


def _uptime_s(manifest: Mapping[str, Any]) -> float:
    """Since it was attached; a former version's manifest tells by the clock only, which may have been set since."""
    if "attached_boot_s" in manifest:
        return time.clock_gettime(time.CLOCK_BOOTTIME) - float(manifest["attached_boot_s"])
    return time.time() - float(manifest["attached_at"])


def describe(attached: "Attached") -> dict[str, Any]:
    """The state of a running datapath; the keys are a contract with scripts."""
    from xdpmasq import blocks, health, sessions  # noqa: PLC0415  heavy

    manifest, settings, view = attached.manifest, attached.settings, attached.sessions
    table = sessions.read(view, settings, attached.now(), attached.hz)
    counters = attached.counters()
    why_not = health.why_not(manifest)
    return {
        "version": manifest["version"],
        "working": not why_not,
        "why_not": why_not,
        "attached_at": manifest["attached_at"],
        "uptime_s": round(_uptime_s(manifest), 1),
        "agent": {"alive": attached.agent_alive, "pid": manifest["agent_pid"] if attached.agent_alive else None},
        "wan": manifest["wan"],
        "external": manifest["external"],
        "wans": [{"name": name, "external": address} for name, address in health.wans_of(manifest)],
        "lans": manifest["lans"],
        "mode": manifest["mode"],
        "interfaces": manifest["interfaces"],
        "punt": _punt(manifest, attached.agent_alive),
        "pcp": _pcp(manifest, attached.agent_alive),
        "metrics": _metrics(manifest) if attached.agent_alive else None,
        "sessions": {"total": len(table), **table.counts()},
        "further_sessions": {
            "used": int((table.slot >= attached.further_base).sum()),
            "room": attached.further,
        },
        "ports": sessions.port_use(view, settings),
        "port_blocks": _port_blocks(attached) if blocks.size(attached) else None,
        "packets": {kind: _sum(counters, f"{kind}_") for kind in ("fast", "slow")},
        "bytes": _bytes(attached),
        "drops": {name: count for name, count in counters.items() if name.startswith("drop_") and count},
        "counters": counters,
    }


def _bytes(attached: "Attached") -> dict[str, int]:
    """Of IP, translated on each path."""
    found = {"fast": 0, "slow": 0}
    for (_, name), (_, octets) in attached.translations().items():
        found[name.partition("_")[0]] += octets
    return found


def _port_blocks(attached: "Attached") -> dict[str, int]:
    """Of all external addresses together."""
    from xdpmasq import blocks  # noqa: PLC0415  heavy

    used, free = blocks.use(attached).sum(axis=0).tolist()
    return {"size": blocks.size(attached), "used": used, "available": used + free}


def _metrics(manifest: Mapping[str, Any]) -> str | None:
    """Where Prometheus finds them."""
    wanted = manifest["config"].get("metrics", {})
    return str(wanted["listen"]) if wanted.get("enabled") else None


def _punt(manifest: Mapping[str, Any], agent_alive: bool) -> dict[str, Any]:
    """The agent's port for what programs cannot settle: it has one or says why not, and it takes it with it."""
    return dict(manifest["punt"]) if agent_alive else {"name": None, "why_not": "the agent is not running"}


def _pcp(manifest: Mapping[str, Any], agent_alive: bool) -> dict[str, Any]:
    """Where the agent hears what hosts ask for, and how many requests it has answered and dropped."""
    told = manifest["pcp"]
    listening = told["listening"] if agent_alive else []
    return {"listening": listening, **{key: told[key] for key in ("enabled", "answered", "dropped")}}


def _sum(counters: Mapping[str, int], prefix: str) -> int:
    return sum(count for name, count in counters.items() if name.startswith(prefix))


def _screen(fields: Mapping[str, Any], helps: Mapping[str, str], measured: "Rates") -> Iterator[str]:
    yield _headline(fields)
    yield ""
    yield _line("agent", _agent(fields["agent"]))
    if fields["agent"]["alive"] and not fields["punt"]["name"]:
        lacking = "out-of-order fragments are dropped, refusals are silent"
        yield _line("", f"no punt port: {fields['punt']['why_not']}; {lacking}")
    if fields["metrics"]:
        yield _line("metrics", fields["metrics"])
    addresses = [f"{each['external'] or 'no address yet'} on {each['name']}" for each in fields["wans"]]
    yield from _labelled("external", addresses)
    yield _line("internal", ", ".join(fields["lans"]))
    yield from _labelled(f"mode {fields['mode']}", common.interface_lines(fields["interfaces"]))
    if fields["pcp"]["enabled"]:
        yield _line("pcp", _asked(fields["pcp"]))
    yield _line("traffic", ", ".join(common.traffic(measured)))
    yield _line("sessions", _by_protocol(fields["sessions"], fields["sessions"]["total"]))
    further = fields["further_sessions"]
    yield _line("", f"{_of(further['used'], further['room'])} places for further ones of a mapping taken")
    yield from _labelled("ports", list(_ports(fields["ports"])))
    if held := fields["port_blocks"]:
        yield _line("", f"{_of(held['used'], held['available'])} blocks of {held['size']:,} taken")
    yield _line("packets", _by_path(fields["packets"], "{:,}".format))
    yield _line("bytes", _by_path(fields["bytes"], lambda octets: common.scaled(octets, "B")))
    yield from _labelled("drops", list(_drops(fields["drops"], helps, measured.drops)) or ["none"])


def _headline(fields: Mapping[str, Any]) -> str:
    since = f"since {common.moment(fields['attached_at'])} ({common.duration(fields['uptime_s'])})"
    if fields["working"]:
        return f"xdpmasq {fields['version']}: {typer.style('working', fg='green')} {since}"
    state = typer.style("not working", fg="red")
    return f"xdpmasq {fields['version']}: {state}: {fields['why_not']}; attached {since}"


def _line(label: str, text: str) -> str:
    return f"  {label:10}{text}"


def _labelled(label: str, lines: list[str]) -> Iterator[str]:
    for number, text in enumerate(lines):
        yield _line("" if number else label, text)


def _agent(agent: Mapping[str, Any]) -> str:
    if agent["alive"]:
        return f"running, process {agent['pid']}"
    gone = typer.style("not running", fg="yellow")
    return f"{gone}: traffic goes on, but nothing follows changes; `xdpmasq attach` starts it again"


def _asked(pcp: Mapping[str, Any]) -> str:
    where = ", ".join(pcp["listening"]) or "nowhere"
    return f"listening at {where}; {pcp['answered']:,} requests answered, {pcp['dropped']:,} dropped"


def _by_protocol(counts: Mapping[str, int], total: int) -> str:
    return f"{total:,}: " + ", ".join(f"{name.upper()} {counts[name]:,}" for name in ("tcp", "udp", "icmp"))


def _ports(ports: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    for name, use in ports.items():
        more = "".join(f", {use[kind]:,} {kind}" for kind in ("resting", "forwarded") if use[kind])
        yield f"{name.upper():4} {_of(use['used'], use['available'])} in use{more}"


def _of(used: int, room: int) -> str:
    return f"{used:,} of {room:,}" + (f" ({used / room:.1%})" if room else "")


def _by_path(sums: Mapping[str, int], told: Callable[[int], str]) -> str:
    total = sum(sums.values())
    share = f", {sums['fast'] / total:.1%} on the fast path" if total else ""
    return f"XDP {told(sums['fast'])}, TC {told(sums['slow'])}{share}"


def _drops(drops: Mapping[str, int], helps: Mapping[str, str], now: Mapping[str, float]) -> Iterator[str]:
    for name, count in sorted(drops.items(), key=lambda each: -each[1])[:DROPS]:
        more = f", {now[name]:,.0f}/s now" if name in now else ""
        yield f"{count:>10,}  {helps.get(name, name).removeprefix('dropped: ')} ({name}){more}"
    if len(drops) > DROPS:
        yield f"and for {common.plural(len(drops) - DROPS, 'more reason')}, see --json"
