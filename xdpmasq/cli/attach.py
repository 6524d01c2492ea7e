"""``xdpmasq attach``: start masquerading, with the agent in the background."""

from xdpmasq import background
from xdpmasq.cli import common


def attach(
    *,
    wan: list[str] = common.WAN,
    lan: list[str] = common.LAN,
    mode: str = common.MODE,
    config: str = common.CONFIG,
    json: bool = common.JSON,
) -> None:
    """Start masquerading, and return once it works.

    The agent stays in the background. Should it ever die, attaching again adopts what goes on without it: no session
    is lost.

    \b
    Examples:
      xdpmasq attach --wan eth0 --lan eth1
      xdpmasq attach --wan eth0 --lan eth1 --lan 'ppp*' --mode xdp
      xdpmasq attach --wan eth0 --wan eth1 --lan eth2
      xdpmasq attach --config /etc/xdpmasq/config.toml
    """
    common.require_root("attach")
    wanted = common.configuration(wan, lan, mode, config)
    with common.busy("starting; the first time the programs are compiled, up to a minute on a small machine"):
        status = background.start(wanted)
    if json:
        common.print_json(status)
    else:
        print("\n".join(common.summary_lines(status)))
