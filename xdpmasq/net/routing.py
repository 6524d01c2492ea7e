"""Routes: those there are, the one that a packet would take, and our own of type `local`."""

import errno
import ipaddress
import socket
from dataclasses import dataclass
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from xdpmasq.net import netlink
from xdpmasq.net.inet import FAMILIES, IPAddress, IPNetwork, Version

RTN_UNICAST = 1
_LOCAL = {"type": "local", "table": 255, "scope": "host"}


@dataclass(frozen=True)
class Route:
    """A unicast route; one of several next hops makes one each.

    Attributes:
        mtu: RTAX_MTU in bytes; 0: the interface's.
    """

    prefix: IPNetwork
    oif: int
    gateway: IPAddress | None
    table: int
    mtu: int = 0


def routes(family: Version = 4) -> list[Route]:
    """All unicast routes of all tables. Slow where a full BGP table is: about 0.1 ms a route."""
    messages = netlink.dump(lambda ipr: ipr.get_routes(family=FAMILIES[family]))
    return [hop for message in messages if message["type"] == RTN_UNICAST for hop in _routes_of(message)]


def route_to(target: IPAddress, source: IPAddress | None = None, iif: int = 0) -> Route | None:
    """The route that the kernel would take to that address; None when unreachable.

    Args:
        source, iif: as for a packet of that source, that came in by the interface of that index; default: from here.
    """
    came = {"src": str(source), "iif": iif} if source else {}
    try:
        with IPRoute() as ipr:
            return next(iter(_routes_of(next(iter(ipr.route("get", dst=str(target), **came))))), None)
    except NetlinkError:
        return None


def local_route_add(network: ipaddress.IPv4Network, index: int) -> bool:
    """Makes these addresses the host's own, so that it answers ARP for them; False when they are."""
    try:
        with IPRoute() as ipr:
            ipr.route("add", dst=str(network), oif=index, **_LOCAL)
    except NetlinkError as error:
        if error.code != errno.EEXIST:
            raise netlink.failure(f"cannot take {network} over", index, error) from error
        return False
    return True


def local_route_del(network: ipaddress.IPv4Network) -> bool:
    """False when there is none."""
    try:
        with IPRoute() as ipr:
            ipr.route("del", dst=str(network), **_LOCAL)
    except NetlinkError:
        return False
    return True


def _routes_of(message: Any) -> list[Route]:
    any_address = "::/0" if message["family"] == socket.AF_INET6 else "0.0.0.0/0"
    destination = message.get_attr("RTA_DST")
    prefix = ipaddress.ip_network(f"{destination}/{message['dst_len']}" if destination else any_address)
    table = int(message.get_attr("RTA_TABLE") or message["table"])
    metrics = message.get_attr("RTA_METRICS")
    mtu = int(metrics.get_attr("RTAX_MTU") or 0) if metrics else 0
    hops = message.get_attr("RTA_MULTIPATH")
    if hops:
        return [Route(prefix, int(hop["oif"]), _gateway(hop), table, mtu) for hop in hops]
    return [Route(prefix, int(message.get_attr("RTA_OIF") or 0), _gateway(message), table, mtu)]


def _gateway(hop: Any) -> IPAddress | None:
    via = hop.get_attr("RTA_VIA")  # an IPv4 route over an IPv6 next hop
    gateway = hop.get_attr("RTA_GATEWAY") or (via and via["addr"])
    return ipaddress.ip_address(gateway) if gateway else None
