"""``xdpmasq detach``: stop masquerading, leave the machine as it was found."""

from collections.abc import Iterator, Mapping
from typing import Any

import typer

from xdpmasq.cli import common
from xdpmasq.errors import UsageError

ALL = typer.Option(False, "--all", help="All that run here; there may be none.")
AGENT = typer.Option(0, "--agent", metavar="PID", help="The one of this agent.", show_default=False)


def detach(*, wan: str = common.WHICH, every: bool = ALL, agent: int = AGENT, json: bool = common.JSON) -> None:
    """Stop masquerading, and clean up.

    Removes every program and map, restores sysctls, ends the agent.

    \b
    Examples:
      xdpmasq detach
      xdpmasq detach --wan eth0
      xdpmasq detach --all
    """
    if (bool(wan), every, bool(agent)).count(True) > 1:
        raise UsageError("--wan, --all and --agent name different things", "", "give one of them")
    common.require_root("detach")
    from xdpmasq import control  # noqa: PLC0415  heavy

    if every:
        removed = [control.detach(each) for each in control.running()]
    else:
        removed = [control.detach(control.served_by(agent) if agent else wan or None)]
    if json:
        common.print_json(removed if every else removed[0])
    else:
        print("\n".join(line for each in removed for line in _lines(each)) or "nothing is attached")


def _lines(removed: Mapping[str, Any]) -> Iterator[str]:
    sessions = common.plural(removed["sessions"], "session")
    yield f"detached from {', '.join(removed['interfaces']) or 'no interface'}; {sessions} ended"
    for name, value in removed["sysctls"].items():
        yield f"  {name} is {value} again"
