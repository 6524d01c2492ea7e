"""``xdpmasq doctor``: what on this machine stands in the way."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from xdpmasq.cli import common
from xdpmasq.config import MODES, Mode
from xdpmasq.configfile import load
from xdpmasq.errors import MasqError, UsageError

if TYPE_CHECKING:
    from xdpmasq.doctor.finding import Finding

COLOURS = {"ok": "green", "warn": "yellow", "block": "red"}


def doctor(
    *,
    wan: list[str] = common.WAN,
    lan: list[str] = common.LAN,
    mode: str = common.MODE,
    config: str = common.CONFIG,
    json: bool = common.JSON,
) -> None:
    """Check this machine for what stands in the way.

    Looks at kernel, bcc, drivers, offloads, other people's NAT rules; changes nothing. Without
    interfaces named, those of a running xdpmasq are looked at. Exit status 1 if something blocks.

    \b
    Examples:
      xdpmasq doctor
      xdpmasq doctor --wan eth0 --lan eth1
    """
    wans, lans, chosen = _wanted(wan, lan, mode, config)
    from xdpmasq import doctor as checks  # noqa: PLC0415  heavy

    findings = checks.run(wans, lans, chosen, _own_programs())
    if json:
        common.print_json([asdict(each) for each in findings])
    else:
        typer.echo("\n".join(_lines(findings)))
    if any(each.level == "block" for each in findings):
        raise typer.Exit(1)


def _wanted(
    wans: Sequence[str], lans: Sequence[str], mode: str, file: str
) -> tuple[Sequence[str], Sequence[str], Mode]:
    """Options, else the file, else what runs."""
    if mode and mode not in MODES:
        raise UsageError(f"there is no mode {mode}", "", f"give one of {', '.join(MODES)}")
    if file:
        config = load(Path(file))
        return wans or config.wans, lans or config.lans, cast(Mode, mode) or config.mode
    if wans or lans:
        return wans, lans, cast(Mode, mode) or "auto"
    wans, lans, running = _running()
    return wans, lans, cast(Mode, mode) or running


def _running() -> tuple[Sequence[str], Sequence[str], Mode]:
    from xdpmasq import datapath  # noqa: PLC0415  heavy

    try:
        attached = datapath.find()
    except (MasqError, OSError):  # nothing runs, or it is not ours to see: then without interfaces
        return (), (), "auto"
    return attached.wan_names, attached.manifest["lans"], attached.manifest["mode"]


def _own_programs() -> set[int]:
    """Ids of our programs on the interfaces here, which doctor is not to take for a stranger's."""
    from xdpmasq import bpf, datapath, hooks  # noqa: PLC0415  heavy
    from xdpmasq.net import netdev  # noqa: PLC0415  heavy

    own = set()
    try:
        for number in (number for link in netdev.links() for number in datapath.program_ids(link)):
            with bpf.Program.by_id(number) as program:
                if program.name.startswith(hooks.PROGRAM):
                    own.add(number)
    except OSError:  # not root: doctor itself will say so
        pass
    return own


def _lines(findings: Sequence["Finding"]) -> Iterator[str]:
    width = max((len(each.check) for each in findings), default=0)
    for each in findings:
        level = typer.style(f"{each.level:5}", fg=COLOURS[each.level])
        yield f"{level}  {each.check:{width}}  {each.message}"
        if each.do:
            yield f"{'':7}{'':{width}}  → {each.do}"
    blocking = sum(each.level == "block" for each in findings)
    warnings = sum(each.level == "warn" for each in findings)
    yield f"{blocking} blocking, {common.plural(warnings, 'warning')}"
