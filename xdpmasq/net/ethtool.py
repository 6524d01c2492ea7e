"""What drivers tell by SIOCETHTOOL, as `ethtool -i` and `ethtool -k` show it."""

import array
import fcntl
import socket
import struct

SIOCETHTOOL = 0x8946
ETHTOOL_GDRVINFO = 0x3
ETHTOOL_GSTRINGS = 0x1B
ETHTOOL_GSSET_INFO = 0x37
ETHTOOL_GFEATURES = 0x3A
ETH_SS_FEATURES = 4
ETH_GSTRING_LEN = 32


def driver(name: str) -> str:
    """The driver's name, empty when it names none."""
    drvinfo = array.array("B", struct.pack("=I192x", ETHTOOL_GDRVINFO))
    if not _ask(name, drvinfo):
        return ""
    return drvinfo[4:36].tobytes().split(b"\0")[0].decode(errors="replace")


def offloads(name: str) -> frozenset[str]:
    """The features that are on, under ethtool's names (``rx-gro``, ``rx-lro``); empty when not told."""
    info = array.array("B", struct.pack("=IIQI", ETHTOOL_GSSET_INFO, 0, 1 << ETH_SS_FEATURES, 0))
    if not _ask(name, info):
        return frozenset()
    count = struct.unpack_from("=I", info, 16)[0]
    strings = array.array(
        "B", struct.pack(f"=III{count * ETH_GSTRING_LEN}x", ETHTOOL_GSTRINGS, ETH_SS_FEATURES, count)
    )
    blocks = (count + 31) // 32
    state = array.array("B", struct.pack(f"=II{blocks * 16}x", ETHTOOL_GFEATURES, blocks))
    if not (_ask(name, strings) and _ask(name, state)):
        return frozenset()
    active = [block[2] for block in struct.iter_unpack("=IIII", state[8:].tobytes())]
    names = [text[0].split(b"\0")[0].decode() for text in struct.iter_unpack("32s", strings[12:].tobytes())]
    return frozenset(text for bit, text in enumerate(names) if active[bit // 32] >> bit % 32 & 1)


def _ask(name: str, request: "array.array[int]") -> bool:
    """SIOCETHTOOL in place; False when the device does not answer it."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control, SIOCETHTOOL, struct.pack("16sP", name.encode(), request.buffer_info()[0]))
    except OSError:
        return False
    return True
