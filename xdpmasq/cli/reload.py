"""``xdpmasq reload``: a changed configuration file takes effect."""

import typer

from xdpmasq.cli import common
from xdpmasq.errors import UsageError

AGENT = typer.Option(0, "--agent", metavar="PID", help="The one of this agent.", show_default=False)


def reload(*, wan: str = common.WHICH, agent: int = AGENT) -> None:
    """Have the agent read its configuration file again; no packet and no session is lost.

    The file is checked first: when anything is wrong with it, nothing changes. Forwards, redirects and triggers that
    the file no longer has are taken out; those of the command line stay. Other WANs, or more external addresses than
    the tables were made for, need `detach` and `attach`. SIGHUP does the same.

    \b
    Example:
      xdpmasq reload
    """
    common.require_root("reload")
    if wan and agent:
        raise UsageError("--wan and --agent name different things", "", "give one of them")
    from xdpmasq import control, datapath, reloading  # noqa: PLC0415  heavy

    reloading.ask(datapath.find(control.served_by(agent) if agent else wan or None))
    print("the configuration is in force")
