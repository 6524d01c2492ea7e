"""Which hook an interface gets, by the mode, and why.

By `--mode auto` native XDP where a hardware driver has it and can redirect; TC everywhere else. Virtual devices
carry 64 kB super-packets, which TC keeps whole and XDP cannot (docs/architecture.md). Never generic XDP.
"""

from collections.abc import Sequence
from typing import Literal

from xdpmasq import kernel, vlans
from xdpmasq.abi import PORTS
from xdpmasq.config import Mode
from xdpmasq.errors import InterfaceError
from xdpmasq.net import features
from xdpmasq.net.netdev import Link

Hook = Literal["xdp", "tc"]

# The first kernel whose driver takes XDP programs and redirects, by the name that `ethtool -i` shows.
# From 6.3 on the kernel says itself what a device can do, and this table is not asked.
NATIVE_XDP: dict[str, tuple[int, int]] = {
    "am65-cpsw-nuss": (6, 10),
    "atlantic": (5, 19),
    "bnxt_en": (4, 17),
    "cpsw": (5, 3),
    "ena": (5, 12),
    "fec": (6, 2),
    "fsl_dpaa": (5, 11),
    "fsl_dpaa2_eth": (5, 0),
    "fsl_enetc": (5, 13),
    "fsl_enetc_vf": (5, 13),
    "i40e": (4, 14),
    "ice": (5, 5),
    "igb": (5, 10),
    "igc": (5, 13),
    "ixgbe": (4, 14),
    "lan966x-switch": (6, 2),
    "mana": (5, 17),
    "mlx5_core": (4, 18),
    "mtk_soc_eth": (6, 0),
    "mvneta": (5, 5),
    "mvpp2": (5, 9),
    "netsec": (5, 3),
    "qede": (5, 11),
    "rvu_nicpf": (5, 16),
    "sfc": (5, 5),
    "st_gmac": (5, 13),
    "st_xgmac": (5, 13),
    "tsnep": (6, 3),
}

# Have native XDP, but are virtual: TC keeps their super-packets whole.
VIRTUAL = ("bonding", "hv_netvsc", "tap", "tun", "veth", "vif", "virtio_net", "vmxnet3")


def choose(mode: Mode, link: Link, links: Sequence[Link], uplinks: Sequence[Link]) -> tuple[Hook, str]:
    """The hook for an interface, and the reason in words.

    Raises:
        InterfaceError: the mode is XDP, which it cannot do.
    """
    if link.name == "lo":
        return "tc", "for the gateway's own way to its forwards"
    if mode == "tc":
        return "tc", "--mode tc"
    if link.index >= PORTS:
        return "tc", f"its interface index {link.index} is beyond {PORTS - 1}"
    if mode == "xdp":
        if not link.ethernet:
            raise InterfaceError(
                f"{link.name} cannot do XDP", "it has no Ethernet header", "choose --mode tc or auto"
            )
        return "xdp", "--mode xdp"
    hook, why = auto(link, links)
    if hook == "xdp" and uplinks and all(auto(each, links)[0] == "tc" for each in uplinks):
        names = " and ".join(each.name for each in uplinks)
        return "tc", f"{names}, the WAN, is on TC, so nothing could be redirected to it"
    return hook, why


def auto(link: Link, links: Sequence[Link]) -> tuple[Hook, str]:
    """The hook that `auto` takes on an interface, and the reason in words; of a VLAN the device below decides."""
    device = vlans.wire_of(link, links).device
    hook, why = xdp_policy(device)
    if hook == "xdp" and (trouble := vlans.trouble(device, links)):
        return "tc", f"{trouble.why}: {trouble.do}"
    return hook, why


def xdp_policy(link: Link) -> tuple[Hook, str]:
    """The hook for a device by its kind and driver, and the reason in words."""
    if not link.ethernet:
        return "tc", "it has no Ethernet header"
    if link.kind or link.driver in VIRTUAL:
        return (
            "tc",
            f"{link.kind or link.driver} is a virtual device, whose super-packets only TC keeps whole",
        )
    if not native_xdp(link):
        return "tc", f"driver {link.driver or '(unnamed)'} has no native XDP with redirect that is known of"
    return "xdp", f"driver {link.driver} has native XDP"


def native_xdp(link: Link) -> bool:
    """Whether the driver takes an XDP program and can redirect from it."""
    if link.xdp_features is not None:
        needed = features.BASIC | features.REDIRECT
        return link.xdp_features & needed == needed
    return link.driver in VIRTUAL or NATIVE_XDP.get(link.driver, (99, 0)) <= kernel.release()


def takes_frames(link: Link) -> bool:
    """Whether XDP can redirect *to* the link; to one that cannot, redirected frames are lost.

    Ask after attaching a program to it: many drivers have a transmit queue for XDP only then.
    """
    if link.xdp_features is not None:
        return bool(link.xdp_features & features.NDO_XMIT)
    return link.ethernet and native_xdp(link)
