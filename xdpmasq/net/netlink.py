"""Asking rtnetlink by pyroute2, and putting its errors into our words."""

import errno
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted, NetlinkError

from xdpmasq.errors import HostError, InterfaceError

T = TypeVar("T")


def dump(request: Callable[[Any], Iterable[T]]) -> list[T]:
    """All messages of a dump, asked again when the kernel's table changed during it."""
    for _ in range(5):
        with suppress(NetlinkDumpInterrupted), IPRoute() as ipr:
            return list(request(ipr))
    raise HostError("the kernel's interface tables keep changing", "five dumps were interrupted", "try again")


def name_of(index: int) -> str:
    """The interface's name, or its number when it is gone: for messages."""
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"interface {index}"


def failure(what: str, index: int, error: NetlinkError, do: str = "") -> InterfaceError | HostError:
    """The kernel's answer in our words; ``error.args[1]`` is its extack text where it gave one."""
    if error.code == errno.EPERM:
        return HostError(what, "the kernel refused it: CAP_NET_ADMIN is needed", "run it as root")
    if error.code == errno.ENODEV:
        return InterfaceError(what, f"{name_of(index)} does not exist any more", "see `ip link`")
    return InterfaceError(what, f"the kernel says: {error.args[1]}", do)
