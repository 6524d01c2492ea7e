"""The kernel's connection tracking: how much it may hold, raising that on purpose, and emptying a namespace's.

``nf_conntrack_max`` and the size of the hash table belong to the whole machine. Other network namespaces can read
them, but the kernel lets only the initial one change them; so a benchmark in namespaces cannot have its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from xdpmasq.bench.topology import Topology
from xdpmasq.errors import HostError

_MAX = Path("/proc/sys/net/netfilter/nf_conntrack_max")
_BUCKETS = Path("/proc/sys/net/netfilter/nf_conntrack_buckets")
_COUNT = Path("/proc/sys/net/netfilter/nf_conntrack_count")
_SPARE = 1.05  # beyond the flows that are to fit

_NETLINK_NETFILTER = 12
_CT_DELETE = 1 << 8 | 2  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE
_REQUEST_AND_ACK = 0x5


def most() -> int | None:
    """How many connections a namespace may have; None where nothing is tracked (or not limited)."""
    with contextlib.suppress(FileNotFoundError):
        return int(_MAX.read_text()) or None
    return None


def holds(flows: int) -> bool:
    """Whether so many connections fit."""
    limit = most()
    return limit is None or flows <= limit


@contextlib.contextmanager
def raised(flows: int) -> Iterator[None]:
    """Inside, the whole machine may track so many connections, in a hash table as large; then as before.

    Raises:
        HostError: the kernel does not let us.
    """
    if holds(flows):
        yield
        return
    before = {path: path.read_text() for path in (_BUCKETS, _MAX)}
    try:
        try:
            for path in before:
                path.write_text(str(int(flows * _SPARE)))
        except OSError as error:
            do = "run it on the host itself, or leave --raise-conntrack out"
            raise HostError(
                "connection tracking cannot be given more room", f"{path}: {error.strerror}", do
            ) from error
        yield
    finally:
        for path, text in before.items():
            with contextlib.suppress(OSError):
                path.write_text(text)


def count(network: Topology) -> int:
    """Connections of the gateway."""
    with network.inside("gate"):
        return int(_COUNT.read_text()) if _COUNT.exists() else 0


def forget(network: Topology) -> None:
    """Empties the gateway's connection tracking.

    An nfnetlink IPCTNL_MSG_CT_DELETE that names no connection means all of the namespace.
    """
    header = struct.pack("=IHHII", 20, _CT_DELETE, _REQUEST_AND_ACK, 1, 0)
    with network.inside("gate"), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
        netlink.send(header + struct.pack("=BBH", socket.AF_UNSPEC, 0, 0))
        code = -struct.unpack_from("=i", netlink.recv(4096), 16)[0]
    if code not in (0, errno.EINVAL):  # EINVAL: a kernel without connection tracking
        raise HostError("the gateway's connections cannot be forgotten", os.strerror(code))


def memory_bytes() -> int:
    """What the machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
