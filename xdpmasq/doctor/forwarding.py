"""Does the kernel forward as NAT needs it, and leave it ports?"""

import ipaddress
from collections.abc import Iterator

from xdpmasq import settings, sysctls
from xdpmasq.doctor.finding import Finding
from xdpmasq.doctor.host import Host
from xdpmasq.net import routing, sysctl

POOL = range(1024, 65536)
FEW_PORTS = 4096


def check_forwarding(host: Host) -> Iterator[Finding]:
    if sysctl.read("net.ipv4.ip_forward") == "1":
        yield Finding("ip_forward", "ok", "IPv4 forwarding is on")
    else:
        yield Finding("ip_forward", "ok", "IPv4 forwarding is off; attach turns it on, detach restores it")


def check_rp_filter(host: Host) -> Iterator[Finding]:
    strict = [link.name for link in host.ports if sysctls.is_strict(link.name)]
    out = _default_route()
    wrong = [wan for wan in host.wans if wan.name in strict and out is not None and out != wan.index]
    if wrong and len(host.wans) == 1:
        name = wrong[0].name
        message = f"rp_filter is strict on {name}, but the default route leaves elsewhere: replies are dropped"
        yield Finding("rp_filter", "warn", message, f"sysctl -w net/ipv4/conf/{name}/rp_filter=2")
    elif wrong:
        names = ", ".join(wan.name for wan in host.wans if wan.name in strict)
        yield Finding("rp_filter", "ok", f"rp_filter is strict on {names}; attach makes it loose, detach restores it")
    else:
        where = f"strict on {', '.join(strict)}, where replies must use the way back" if strict else "not strict"
        yield Finding("rp_filter", "ok", f"rp_filter is {where}")


def check_route(host: Host) -> Iterator[Finding]:
    if host.wans and _default_route() is None:
        message = "there is no default route: only directly known prefixes are reached"
        yield Finding("route", "warn", message, f"ip route add default via … dev {host.wans[0].name}")


def _default_route() -> int | None:
    # 1.1.1.1 stands for the Internet; nothing is sent
    route = routing.route_to(ipaddress.IPv4Address("1.1.1.1"))
    return route.oif if route else None


def check_ports(host: Host) -> Iterator[Finding]:
    low, high = settings.own_ports()
    left = len(POOL) - len(range(max(low, POOL.start), min(high + 1, POOL.stop)))
    message = f"{left} ports an address for NAT beside the gateway's own {low}–{high}"
    if left >= FEW_PORTS:
        yield Finding("ports", "ok", message)
    else:
        do = "sysctl -w net.ipv4.ip_local_port_range='32768 60999'"
        yield Finding("ports", "warn" if left else "block", message, do)


CHECKS = (check_forwarding, check_rp_filter, check_route, check_ports)
