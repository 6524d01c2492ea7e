"""Does the kernel's own NAT, or its conntrack, come into ours?"""

from collections.abc import Iterator

from xdpmasq.doctor.finding import Finding
from xdpmasq.doctor.host import Host
from xdpmasq.net import sysctl


def check_nat(host: Host) -> Iterator[Finding]:
    if not host.wans:
        return
    inside = [prefix for lan in host.lans for prefix in host.networks(lan)]
    rules = [rule for rule in host.ruleset.nat if any(rule.concerns(wan.name, inside) for wan in host.wans)]
    for rule in rules:
        message = f"{rule.where} also translates sources: its packets stay on the kernel's NAT"
        yield Finding("nat", "warn", message, rule.remove)
    if host.ruleset.unread:
        message = f"whether nftables rules translate the same packets is not known: {host.ruleset.unread}"
        yield Finding("nat", "warn", message, "install nftables and run doctor as root")
    elif not rules:
        yield Finding("nat", "ok", "no nftables or iptables rule would translate the same packets")


def check_conntrack(host: Host) -> Iterator[Finding]:
    liberal = sysctl.read("net.netfilter.nf_conntrack_tcp_be_liberal")
    if liberal != "0" or not any(map(host.uses_xdp, host.ports)) or not host.ruleset.uses_conntrack:
        return
    message = (
        "rules match on the state of connections, but conntrack does not see what XDP forwards and will "
        "call later segments invalid"
    )
    yield Finding("conntrack", "warn", message, "sysctl -w net.netfilter.nf_conntrack_tcp_be_liberal=1")


CHECKS = (check_nat, check_conntrack)
