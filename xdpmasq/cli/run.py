"""``xdpmasq run``: the same as attach in the foreground, for systemd."""

import logging

from xdpmasq.cli import common


def run(
    *,
    wan: list[str] = common.WAN,
    lan: list[str] = common.LAN,
    mode: str = common.MODE,
    config: str = common.CONFIG,
) -> None:
    """Start masquerading, and stay in the foreground.

    This is attach for systemd. Stopping it leaves the translation running, as the kernel does it;
    `xdpmasq detach` ends that.

    \b
    Examples:
      xdpmasq run --config /etc/xdpmasq/config.toml
      xdpmasq run --wan eth0 --lan eth1
    """
    common.require_root("run")
    wanted = common.configuration(wan, lan, mode, config)
    from xdpmasq import daemon  # noqa: PLC0415  heavy

    logging.basicConfig(format="%(message)s", level=logging.INFO)  # systemd adds time and name
    daemon.run(wanted)
