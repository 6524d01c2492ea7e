"""Being told of changes to the kernel's network configuration, as by `ip monitor`."""

import errno
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

NLMSG_HEADER = struct.Struct("=IHHII")
SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP = 1
SO_RCVBUFFORCE = 33
BUFFER = 4 << 20  # bytes; a burst of some ten thousand messages
DATAGRAMS = 1024  # read in one drain, so that a storm cannot hold the agent's loop

# RTNLGRP_*: link, neigh, tc, v4 address, route, rule, v6 address, route, rule, nexthop
GROUPS = (1, 3, 4, 5, 7, 8, 9, 11, 19, 32)
# RTM_* types come in fours from RTM_NEWLINK = 16
KINDS = {
    0: "links", 1: "addresses", 2: "routes", 3: "neighbours", 4: "routes", 22: "routes",
    5: "filters", 7: "filters",
}  # fmt: skip


@dataclass(frozen=True)
class Changes:
    """What kinds of things changed; rules and next-hop objects count as routes, qdiscs as filters.

    ``lost`` means that messages were dropped: everything has to be read again.
    """

    links: bool = False
    addresses: bool = False
    routes: bool = False
    neighbours: bool = False
    lost: bool = False
    filters: bool = False

    def __bool__(self) -> bool:
        return any(vars(self).values())


class Watch:
    """A netlink socket that becomes readable when the kernel's network configuration changes.

    Own changes (attaching programs) are reported like anyone's. Neighbour messages come for every
    state change; compare :func:`xdpmasq.net.neighbours.resolved` to see real ones.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0
        )
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        self._socket.bind((0, 0))
        for group in GROUPS:
            with suppress(OSError):  # a kernel without this group
                self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def drain(self) -> Changes:
        """Reads what is pending, without blocking, and says which kinds came."""
        kinds: set[str] = set()
        for _ in range(DATAGRAMS):
            try:
                kinds |= _kinds(self._socket.recv(1 << 16))
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                kinds.add("lost")
        return Changes(**dict.fromkeys(kinds, True))


def _kinds(datagram: bytes) -> set[str]:
    kinds, offset = set(), 0
    while offset + NLMSG_HEADER.size <= len(datagram):
        length, kind, *_ = NLMSG_HEADER.unpack_from(datagram, offset)
        if name := KINDS.get((kind - 16) // 4):
            kinds.add(name)
        offset += max((length + 3) & ~3, NLMSG_HEADER.size)
    return kinds
