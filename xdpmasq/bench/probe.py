"""A client and a server on either side of the gateway, in one thread: is it there, what does it make of a datagram?

A datagram sent from a socket runs through the whole gateway inside ``sendto()``, up to the other socket's queue: the
veths' softirqs are raised on the sender's core and done before the call returns. So one thread can be both ends, and
the round trip holds no wake-up of anybody.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from ipaddress import IPv4Address
from types import TracebackType

from xdpmasq.bench.generator import Expectation
from xdpmasq.bench.topology import LAN_SOCKETS, TTL, WAN_SOCKETS, Topology, public_addresses

_PORT = 9000
_IP_RECVTTL = 12  # linux/in.h; Python does not have it
_PAYLOAD = bytes(22)  # a frame of 64 bytes


class Probe:
    """A context manager.

    Args:
        patience_s: how long an answer may take.
    """

    def __init__(self, network: Topology, patience_s: float = 0.02) -> None:
        self._network = network
        with network.inside("lan"):
            self.client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with network.inside("wan"):
            self.server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.server.setsockopt(socket.IPPROTO_IP, _IP_RECVTTL, 1)
        self.server.bind((WAN_SOCKETS, _PORT))
        self.client.setsockopt(socket.IPPROTO_IP, _IP_RECVTTL, 1)
        self.client.bind((LAN_SOCKETS, _PORT))
        self.client.connect((WAN_SOCKETS, _PORT))
        for each in (self.client, self.server):
            each.settimeout(patience_s)

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.client.close()
        self.server.close()

    def is_translated(self) -> bool:
        """Whether a datagram arrives from one of the public addresses."""
        with contextlib.suppress(OSError):
            self.client.send(_PAYLOAD)
            return self._is_public(self.server.recvfrom(64)[1][0])
        return False

    def _is_public(self, address: str) -> bool:
        return IPv4Address(address) in public_addresses(self._network.externals)

    def echo(self) -> None:
        """One round trip. Raises: TimeoutError."""
        self.client.send(_PAYLOAD)
        data, peer = self.server.recvfrom(64)
        self.server.sendto(data, peer)
        self.client.recv(64)

    def problems(self, expected: Expectation) -> list[str]:
        """What is wrong with a round trip, in words. Checksums are the kernel's to look at: a wrong one is a loss."""
        try:
            self.client.send(_PAYLOAD)
            data, out_ttl, peer = _received(self.server)
            self.server.sendto(data, peer)
            _, in_ttl, _ = _received(self.client)
        except TimeoutError:
            return ["a datagram or its answer was lost"]
        found = []
        if self._is_public(peer[0]) != expected.translated:
            found.append(f"the server sees {peer[0]}")
        if {out_ttl, in_ttl} != {TTL - expected.hops}:
            found.append(f"TTL {out_ttl} outbound and {in_ttl} inbound, {TTL - expected.hops} expected")
        return found


def _received(where: socket.socket) -> tuple[bytes, int, tuple[str, int]]:
    data, more, _, peer = where.recvmsg(64, 64)
    ttl = next(struct.unpack("=i", value)[0] for _, kind, value in more if kind == socket.IP_TTL)
    return data, ttl, peer
