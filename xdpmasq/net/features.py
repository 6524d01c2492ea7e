"""What devices can do with XDP, as the kernel says it from 6.3 on: the generic netlink family `netdev`."""

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
    try:
        with GenericNetlinkSocket() as generic:
            generic.bind("netdev", _DevMessage)
            query = _DevMessage()
            query["cmd"], query["version"] = netdev_cmd_dev_get, 1
            answers = generic.nlm_request(query, msg_type=generic.prid, msg_flags=nlm_f_request_dump)
            keys = ("NETDEV_A_DEV_IFINDEX", "NETDEV_A_DEV_XDP_FEATURES")
            return dict(tuple(each.get_attr(key) for key in keys) for each in answers)
    except (NetlinkError, NetlinkDumpInterrupted):
        return {}
