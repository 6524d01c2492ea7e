"""Making a TAP."""

import fcntl
import os
import socket
import struct
from dataclasses import dataclass

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from xdpmasq.errors import HostError
from xdpmasq.net import netlink, sysctl

DEVICE = "/dev/net/tun"
TUNSETIFF = 0x400454CA
IFF_TAP = 0x2
IFF_NO_PI = 0x1000


@dataclass(frozen=True)
class Tap:
    """A TAP device of this process; it is there until ``fd`` is closed."""

    fd: int
    name: str
    index: int


def tap_create(name: str, mtu: int, queue: int) -> Tap:
    """A TAP, non-blocking and up, without IPv6: the kernel itself sends nothing into it.

    Args:
        name: may have a ``%d``, for which the kernel puts the first free number.
        queue: frames that wait to be read, at most.

    Raises:
        HostError: there are no TAPs here, or not for us.
        InterfaceError: it does not come up.
    """
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _no_tap(error) from error
    try:
        return _tap_of(fd, name, mtu, queue)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            raise _no_tap(error) from error
        raise


def _tap_of(fd: int, name: str, mtu: int, queue: int) -> Tap:
    request = struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI)
    made = fcntl.ioctl(fd, TUNSETIFF, request)[:16].split(b"\0")[0].decode()
    index = socket.if_nametoindex(made)
    if sysctl.read(without_ipv6 := ("net", "ipv6", "conf", made, "disable_ipv6")) == "0":
        sysctl.write(without_ipv6, 1)
    try:
        with IPRoute(ext_ack=True) as ipr:
            ipr.link("set", index=index, mtu=mtu, txqlen=queue, state="up")
    except NetlinkError as error:
        raise netlink.failure(f"cannot bring {made} up", index, error) from error
    return Tap(fd, made, index)


def _no_tap(error: OSError) -> HostError:
    do = "modprobe tun; a container must be given that device"
    return HostError("cannot create a TAP", f"{DEVICE}: {error.strerror}", do)
