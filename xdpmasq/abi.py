"""What the C programs and Python have to agree on: the enums, bits and sizes of bpf/types.h, flow.h and reaper.c."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address
from typing import Literal

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.uint32]
Role = Literal["lan", "wan", "lo", "other"]

CLASSES = ("tcp", "udp", "icmp")
CLASS_ROOM = 4
PORTS = 65536
EXTERNAL_SLOTS = len(CLASSES) * PORTS  # of one external address
FURTHER_BASE = EXTERNAL_SLOTS  # where there is one

ROLES: dict[Role, int] = {"lo": 0, "lan": 1, "wan": 2, "other": 3}
XDP_FROM, XDP_TO = 1, 2
PREFIX_OWN, PREFIX_INTERNAL, PREFIX_PRIVATE = 1, 2, 3
LIFE_LIVE, LIFE_RESTING, LIFE_OPENING, LIFE_STATE = 1, 2, 3, 3
LIFE_SESSION, LIFE_STATIC, LIFE_FURTHER_MASK = 4, 8, 0xFFFFFF00
REAP_EXPIRED, REAP_FORCED, REAP_RESTED, REAP_CLAIM, REAP_KEEP, REAP_YIELD, REAP_HOLD, REAP_TAKE, REAP_OPEN = range(9)
REAP_BLOCK_IDLE, REAP_BLOCK_FREE, REAP_BLOCK_CLOSE, REAP_BLOCK_OPEN, REAP_BLOCK_TAKE = range(9, 14)
BLOCK_FREE, BLOCK_MOVING, BLOCK_TAKEN, BLOCK_IDLE, BLOCK_OUTSIDE = range(5)
BLOCKS = 256
REAP_MAX = 16
CHOICE_MAX, CHOICE_ADDR_AT, EXTERNAL_ROOM = 64, 32, 64


def addr(address: IPv4Address | None) -> tuple[tuple[int]]:
    """An ``addr_t`` for numpy: network byte order in memory."""
    return ((int.from_bytes(address.packed, "little") if address else 0,),)


# Keys as they are in memory, for those who cannot wait for numpy.

_WORD, _MAPPING_KEY = struct.Struct("=I"), struct.Struct("!HBB")


def mapping_key(address: IPv4Address, port: int, class_: int, wan: int) -> bytes:
    """``struct mapping_key`` of an internal endpoint."""
    return address.packed + _MAPPING_KEY.pack(port, class_, wan)


def control_key(mapping: int, remote: bytes) -> bytes:
    """``struct control_key`` of a control session.

    Args:
        mapping: its slot.
        remote: address and port, as on the wire.
    """
    return _WORD.pack(mapping) + remote + bytes(2)


def pinhole_key(mapping: int, remote: IPv4Address | None) -> bytes:
    """``struct pinhole_key``."""
    return _WORD.pack(mapping) + (remote or IPv4Address(0)).packed


def slot_of(key: bytes) -> int:
    """The mapping's slot, with which such a key begins."""
    slot: int = _WORD.unpack_from(key)[0]
    return slot


def addr_hash(address: IPv4Address) -> int:
    """``addr_hash`` of bpf/flow.h."""
    mixed = addr(address)[0][0] * 0x9E3779B1 & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 15) * 0x85EBCA6B & 0xFFFFFFFF
    return mixed ^ mixed >> 13
