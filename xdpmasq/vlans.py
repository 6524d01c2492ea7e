"""VLANs as XDP meets them: tags in the frames of the device below.

TC programs sit on a VLAN device as on any other Ethernet interface. XDP only works on the device below, where it
has to see the tags itself: a device that takes them off (rx-vlan-offload) makes frames of every VLAN look untagged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xdpmasq.errors import InterfaceError
from xdpmasq.net import ethtool
from xdpmasq.net.netdev import Link, Vlan

TAGS = 2  # as in bpf/types.h
TAG_LENGTH = 4  # bytes
# Features that take tags off, by the kernel's names, which `ethtool -K` takes as well.
STRIPPING = frozenset({"rx-vlan-hw-parse", "rx-vlan-stag-hw-parse"})


@dataclass(frozen=True)
class Wire:
    """Where the frames of an interface pass, and how they look there.

    Attributes:
        device: the interface itself, or the one below a VLAN.
        tags: of its frames, the outermost first.
    """

    device: Link
    tags: tuple[Vlan, ...] = ()

    @property
    def mtu(self) -> int:
        """The longest IP packet that the device takes from XDP: the kernel lets a frame have one tag more than it."""
        return self.device.mtu - TAG_LENGTH * max(0, len(self.tags) - 1)


def wire_of(link: Link, links: Sequence[Link]) -> Wire:
    """The wire of an interface.

    That of a VLAN which XDP cannot serve, being below too many others or above a device in another network
    namespace, is the VLAN device itself: it has no native XDP.
    """
    device: Link | None = link
    tags: tuple[Vlan, ...] = ()
    while device and (vlan := device.vlan):
        device, tags = next((each for each in links if each.index == vlan.parent), None), (vlan, *tags)
    return Wire(device, tags) if device and len(tags) <= TAGS else Wire(link)


def trouble(device: Link, links: Sequence[Link]) -> InterfaceError | None:
    """Why XDP on this device would take frames of its VLANs for others', or None."""
    if not any(each.vlan and each.vlan.parent == device.index for each in links):
        return None
    features = sorted(STRIPPING & ethtool.offloads(device.name))
    if not features:
        return None
    return InterfaceError(
        f"{device.name} cannot do XDP",
        f"{device.name} takes VLAN tags off before XDP sees them",
        f"`ethtool -K {device.name} {' '.join(f'{each} off' for each in features)}`, or --mode tc",
    )
