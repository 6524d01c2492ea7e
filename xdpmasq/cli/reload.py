"""``xdpmasq reload``: a changed configuration file takes effect."""

from xdpmasq.cli import common


def reload(*, wan: str = common.WHICH) -> None:
    """Have the agent read its configuration file again; no packet and no session is lost.

    The file is checked first: when anything is wrong with it, nothing changes. Forwards, redirects and triggers that
    the file no longer has are taken out; those of the command line stay. Other WANs, or more external addresses than
    the tables were made for, need `detach` and `attach`. SIGHUP does the same.

    \b
    Example:
      xdpmasq reload
    """
    common.require_root("reload")
    from xdpmasq import datapath, reloading  # noqa: PLC0415  heavy

    reloading.ask(datapath.find(wan or None))
    print("the configuration is in force")
