"""Messages of H.323 calls, built by hand around logical channels as terminals send them."""

from ipaddress import IPv4Address

GUID = b"0123456789abcdef"


def tpkt(content: bytes) -> bytes:
    return b"\3\0" + (4 + len(content)).to_bytes(2, "big") + content


def q931(kind: int, information: bytes, *, element: int = 0x7E) -> bytes:
    size = (1 + len(information)).to_bytes(2, "big")
    return tpkt(bytes([8, 2, 0, 1, kind, 0xA1, 0x28, 2, 0x41, 0, element]) + size + b"\5" + information)


def at(address: IPv4Address, port: int) -> bytes:
    return address.packed + port.to_bytes(2, "big")


def sent(address: IPv4Address, reports: int) -> bytes:
    """OpenLogicalChannel of G.711 A-law to the other end: it sends its reports there."""
    return bytes.fromhex("00 00 00 0c 20 13 80 0b 05 00 01 00") + at(address, reports) + b"\0"


def wanted(address: IPv4Address, media: int, reports: int) -> bytes:
    """And from the other end: where media and reports are wanted."""
    head, middle = bytes.fromhex("40 00 01 06 04 01 00 4c 20 13 80 11 14 00 01 00"), b"\0"
    return head + at(address, media) + middle + at(address, reports)


def texts(*each: bytes) -> bytes:
    return bytes([len(each)]) + b"".join(bytes([len(text)]) + text for text in each)


def setup(to: bytes, by: bytes, *channels: bytes, tunnelled: tuple[bytes, ...] = ()) -> bytes:
    """Setup-UUIE with destCallSignalAddress, sourceCallSignalAddress, fastStart, and h245Control beside it."""
    call = bytes.fromhex("20 88 06 00 08 91 4a 00 04 02 00") + to + b"\0" + GUID
    fast = texts(*channels)
    more = bytes.fromhex("00 dd 1d 80 00 00 07 00") + by + bytes.fromhex("11 00") + GUID
    last = bytes([len(fast)]) + fast + bytes.fromhex("01 00 01 00 01 00 01 00")
    control = texts(*tunnelled)
    return q931(5, call + more + last + bytes.fromhex("10 c0 01 80") + bytes([len(control)]) + control)


def system(channel: bytes) -> bytes:
    """MultimediaSystemControlMessage: the request to open a channel."""
    return b"\3\0\0\0" + channel[3:] if channel[:1] == b"\0" else b"\3\x40\0\1" + channel[3:]


def acknowledged(address: IPv4Address, media: int, reports: int) -> bytes:
    """OpenLogicalChannelAck, as a MultimediaSystemControlMessage, with mediaChannel and mediaControlChannel."""
    head, middle = bytes.fromhex("22 c0 00 06 06 80 10 1c 00 00"), b"\0"
    return tpkt(head + at(address, media) + middle + at(address, reports))


def connect(h245: bytes) -> bytes:
    head = bytes.fromhex("22 c0 06 00 08 91 4a 00 04 00")
    middle, last = bytes.fromhex("02 00"), bytes.fromhex("1f 0c 00 11 00")
    return q931(7, head + h245 + middle + GUID + last + GUID + bytes.fromhex("01 00 01 00 10 80 01 00"))
