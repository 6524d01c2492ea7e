"""The neighbour tables (ARP, NDP)."""

import socket

from xdpmasq.net import netlink

# reachable, stale, delay, probe, permanent; NUD_NOARP is multicast and loopback, which comes and goes
NUD_RESOLVED = 0x02 | 0x04 | 0x08 | 0x10 | 0x80


def resolved() -> dict[tuple[int, str], bytes]:
    """Link-layer addresses by (interface index, IP address), of both families; resolved entries only."""
    messages = netlink.dump(lambda ipr: ipr.get_neighbours(family=socket.AF_UNSPEC))
    return {
        (int(message["ifindex"]), str(message.get_attr("NDA_DST"))): bytes.fromhex(mac.replace(":", ""))
        for message in messages
        if message["state"] & NUD_RESOLVED and (mac := message.get_attr("NDA_LLADDR"))
    }
