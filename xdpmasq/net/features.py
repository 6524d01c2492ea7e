"""What devices can do with XDP, as the kernel says it from 6.3 on: the generic netlink family `netdev`."""

from typing import Any

from pyroute2.netlink import genlmsg
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted, NetlinkError
from pyroute2.netlink.generic import GenericNetlinkSocket

from xdpmasq import kernel

# NETDEV_XDP_ACT_*
BASIC = 1
REDIRECT = 2
NDO_XMIT = 4


class _DevMessage(genlmsg):  # type: ignore[misc]
    nla_map = (
        ("NETDEV_A_DEV_UNSPEC", "none"),
        ("NETDEV_A_DEV_IFINDEX", "uint32"),
        ("NETDEV_A_DEV_PAD", "hex"),
        ("NETDEV_A_DEV_XDP_FEATURES", "uint64"),
    )


def of_xdp() -> dict[int, int]:
    """The bits of each device, by interface index; of an older kernel none."""
    if kernel.release() < (6, 3):
        return {}
    netdev_cmd_dev_get, nlm_f_request_dump = 1, 0x301
    found: dict[int, int] = {}

    def take(message: Any) -> bool:
        """The kernel does not mark these as parts of a dump: pyroute2 0.7 would take the first for all there are."""
        if message["header"]["type"] != generic.prid:
            return False
        found[message.get_attr("NETDEV_A_DEV_IFINDEX")] = message.get_attr("NETDEV_A_DEV_XDP_FEATURES")
        return True

    try:
        with GenericNetlinkSocket() as generic:
            generic.bind("netdev", _DevMessage)
            query = _DevMessage()
            query["cmd"], query["version"] = netdev_cmd_dev_get, 1
            generic.nlm_request(query, msg_type=generic.prid, msg_flags=nlm_f_request_dump, callback=take)
    except (NetlinkError, NetlinkDumpInterrupted):
        return {}
    return found
