"""A host that asks for mappings by PCP (RFC 6887)."""

import contextlib
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

from netkit import Gateway

from xdpmasq.lab.topology import HOSTS

INSIDE, INSIDE_TOO = ("192.168.0.1", 5351), ("192.168.1.1", 5351)
NONCE = b"abcdefghijkl"
NUMBERS = {"tcp": 6, "udp": 17}


@dataclass(frozen=True)
class Answer:
    result: int
    lifetime: int
    epoch: int
    port: int = 0
    address: str = ""


def message(
    host: str, protocol: str, port: int, suggested: int = 0, lifetime: int = 600, *, nonce: bytes = NONCE
) -> bytes:
    """A MAP request (RFC 6887 section 11.1)."""
    client = bytes(10) + b"\xff\xff" + IPv4Address(host).packed
    body = nonce + struct.pack("!B3xHH", NUMBERS[protocol], port, suggested) + bytes(10) + b"\xff\xff" + bytes(4)
    return struct.pack("!BBHI", 2, 1, 0, lifetime) + client + body


def exchange(
    client: socket.socket, text: bytes, server: tuple[str, int] = INSIDE, patience_s: float = 1
) -> bytes | None:
    """The answer, or None; asks again, as clients do."""
    client.settimeout(patience_s / 2)
    for _ in range(2):
        client.sendto(text, server)
        with contextlib.suppress(TimeoutError):
            answer, sender = client.recvfrom(2000)
            assert sender == server
            return answer
    return None


def ask(gateway: Gateway, box: str, protocol: str, port: int, suggested: int = 0, **fields: Any) -> Answer:
    """PCP: a mapping is asked for from a box, of the gateway's address in its LAN."""
    server = INSIDE_TOO if box == "d-box" else INSIDE
    with gateway.udp(box) as client:
        text = exchange(client, message(HOSTS[box], protocol, port, suggested, **fields), server, 10)
    assert text
    _, opcode, _, result, lifetime, epoch = struct.unpack_from("!BBBBII", text)
    assert opcode == 0x81
    assigned, address = struct.unpack_from("!H16s", text, 42)
    return Answer(result, lifetime, epoch, assigned, str(IPv4Address(address[12:])))
