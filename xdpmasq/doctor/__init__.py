"""Looks at this machine without changing it, and says what stands in the way of the NAT.

Each check yields findings. What netlink cannot tell is read under /proc and /sys, or comes from `nft` and
`iptables-save` where those exist. Nothing loads a kernel module.
"""

from collections.abc import Collection, Sequence

from xdpmasq.config import Mode
from xdpmasq.doctor import forwarding, interfaces, machine, nat, queues
from xdpmasq.doctor.finding import Finding
from xdpmasq.doctor.host import Host
from xdpmasq.net import netdev

CHECKS = (*machine.CHECKS, *interfaces.CHECKS, *queues.CHECKS, *forwarding.CHECKS, *nat.CHECKS)


def run(wans: Sequence[str], lans: Sequence[str], mode: Mode = "auto", ours: Collection[int] = ()) -> list[Finding]:
    """All findings for this machine and, where named, its interfaces.

    Args:
        wans: names or patterns of the interfaces towards the Internet, if any is meant already.
        lans: names or patterns (``lan*``) of the interfaces towards the hosts.
        mode: what `attach` would be told.
        ours: ids of xdpmasq's programs, which are no strangers on the XDP hook.
    """
    present = tuple(netdev.links())
    host = Host(
        present=present,
        wans=tuple(link for name in wans for link in netdev.match_links([name], present)[:1]),
        lans=tuple(netdev.match_links(lans, present)),
        mode=mode,
        ours=ours,
    )
    missing = [_missing(name, present) for name in (*wans, *lans) if not netdev.match_links([name], present)]
    return [*missing, *(finding for check in CHECKS for finding in check(host))]


def _missing(name: str, present: Sequence[netdev.Link]) -> Finding:
    error = netdev.no_such_interface(name, present)
    if netdev.is_pattern(name):
        return Finding("interface", "warn", f"no interface fits {name} yet", error.why)
    return Finding("interface", "block", error.what, f"{error.why}; {error.do}")
