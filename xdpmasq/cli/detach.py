"""``xdpmasq detach``: stop masquerading, leave the machine as it was found."""

from collections.abc import Iterator, Mapping
from typing import Any

from xdpmasq.cli import common


def detach(*, wan: str = common.WHICH, json: bool = common.JSON) -> None:
    """Stop masquerading, and clean up.

    Removes every program and map, restores sysctls, ends the agent.

    \b
    Examples:
      xdpmasq detach
      xdpmasq detach --wan eth0
    """
    common.require_root("detach")
    from xdpmasq import control  # noqa: PLC0415  heavy

    removed = control.detach(wan or None)
    if json:
        common.print_json(removed)
    else:
        print("\n".join(_lines(removed)))


def _lines(removed: Mapping[str, Any]) -> Iterator[str]:
    sessions = common.plural(removed["sessions"], "session")
    yield f"detached from {', '.join(removed['interfaces']) or 'no interface'}; {sessions} ended"
    for name, value in removed["sysctls"].items():
        yield f"  {name} is {value} again"
