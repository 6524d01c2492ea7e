"""The wire between two TUN devices: what the kernel sends into one comes out of the other.

It stands in for a PPP or DSL line, whose device has no Ethernet header. Started by the lab as
``python -m xdpmasq.lab.relay NAMESPACE DEVICE NAMESPACE DEVICE on|off``; the last word tells whether
super-packets and partial checksums cross the line as they are (virtio-net headers), or are resolved
before it.
"""

import contextlib
import fcntl
import os
import select
import struct
import sys

from xdpmasq.lab.netns import entered

# linux/if_tun.h
_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4 = 0x01, 0x02

_LONGEST = 65536 + 12  # an IP packet and its virtio-net header
_BURST = 64

READY = "ready"


def main(arguments: list[str]) -> None:
    near_namespace, near_device, far_namespace, far_device, offloads = arguments
    near = open_tun(near_namespace, near_device, offloads == "on")
    far = open_tun(far_namespace, far_device, offloads == "on")
    print(READY, flush=True)  # noqa: T201 - the lab reads this line, nobody else
    relay(near, far)


def open_tun(namespace: str, device: str, offloads: bool) -> int:
    """Make the TUN device, which lives until the returned non-blocking file descriptor is closed."""
    with entered(namespace):
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = _IFF_TUN | _IFF_NO_PI | (_IFF_VNET_HDR if offloads else 0)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", device.encode(), flags))
    if offloads:
        fcntl.ioctl(fd, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4)
    return fd


def relay(near: int, far: int) -> None:
    """Carry packets both ways until the process is ended."""
    other_end = {near: far, far: near}
    poll = select.poll()
    for fd in other_end:
        poll.register(fd, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            _carry(fd, other_end[fd])


def _carry(source: int, sink: int) -> None:
    # Bounded, so that a busy direction does not starve the other.
    with contextlib.suppress(BlockingIOError):
        for _ in range(_BURST):
            packet = os.read(source, _LONGEST)
            # A device that is down, or a full one, loses the packet, as a wire would.
            with contextlib.suppress(OSError):
                os.write(sink, packet)


if __name__ == "__main__":
    main(sys.argv[1:])
