"""Protocols without ports, and SCTP: one host inside for each remote (address-only mapping), and no leak.

::

    a-box .2 ─┐                                             ┌─ .10 internet
    b-box .3 ─┴─ lan0 masq-gate 203.0.113.1 wan0 ─ exchange ┴─ .11
"""

import os
import socket
import struct
from collections.abc import Iterator

import pytest
from netkit import Gateway, receive

from xdpmasq.lab.topology import INTERNET, INTERNET_TOO, PUBLIC

GRE, ESP, AH, IPIP, SCTP = 47, 50, 51, 4, 132


@pytest.fixture(autouse=True)
def _forgotten(gateway: Gateway) -> Iterator[None]:
    """Whom a remote belongs to lasts for minutes."""
    yield
    table = gateway.tables.maps["bindings"]
    for keys, _ in table.items(chunk=table.max_entries):
        for key in keys:
            table.delete(key)


def speaker(gateway: Gateway, role: str, protocol: int, remote: str = "", *, timeout_s: float = 2) -> socket.socket:
    """A raw socket; the kernel makes the IP headers, and fragments."""
    with gateway.inside(role):
        made = socket.socket(socket.AF_INET, socket.SOCK_RAW, protocol)
    made.settimeout(timeout_s)
    if remote:
        made.connect((remote, 0))
    return made


def hears(listener: socket.socket, text: bytes, source: str) -> bool:
    came = receive(listener, lambda packet: packet[20:] == text)
    return socket.inet_ntoa(came[12:16]) == source


@pytest.mark.parametrize("protocol", [GRE, ESP, AH, IPIP, 99], ids=["GRE", "ESP", "AH", "IPIP", "unknown"])
def test_two_hosts_with_a_remote_each(gateway: Gateway, protocol: int) -> None:
    with speaker(gateway, "internet", protocol) as far:
        for box, remote in (("a-box", INTERNET), ("b-box", INTERNET_TOO)):
            with speaker(gateway, box, protocol, remote) as near:
                for size in (100, 3000):  # the larger in fragments
                    text, back = os.urandom(size), os.urandom(size)
                    near.send(text)
                    assert hears(far, text, PUBLIC)
                    if remote == INTERNET:
                        far.sendto(back, (PUBLIC, 0))
                        assert hears(near, back, remote)


@pytest.mark.req("6888-11")
@pytest.mark.parametrize("protocol", [GRE, ESP], ids=["GRE", "ESP"])
def test_the_second_host_is_refused(gateway: Gateway, protocol: int) -> None:
    """And told; the first goes on."""
    with (
        speaker(gateway, "internet", protocol, timeout_s=0.3) as far,
        speaker(gateway, "a-box", protocol, INTERNET) as first,
        speaker(gateway, "b-box", protocol, INTERNET) as second,
        gateway.counting() as grown,
    ):
        first.send(b"first here")
        assert hears(far, b"first here", PUBLIC)
        second.send(b"too late")
        with pytest.raises(OSError, match="No route to host"):
            second.recv(100)
        with pytest.raises(TimeoutError):
            hears(far, b"too late", PUBLIC)
        far.sendto(b"for the first", (PUBLIC, 0))
        assert hears(first, b"for the first", INTERNET)
    assert grown["drop_portless_taken"] == 1


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def sctp(sport: int, dport: int) -> bytes:
    """An INIT chunk; the checksum covers no addresses (RFC 9260)."""
    chunk = struct.pack("!BBHIIHHI", 1, 0, 20, 0x12345678, 65536, 1, 1, 7)
    unsummed = struct.pack("!HHII", sport, dport, 0, 0) + chunk
    return unsummed[:8] + struct.pack("<I", crc32c(unsummed)) + unsummed[12:]


def test_sctp_associations_are_told_apart_by_ports(gateway: Gateway) -> None:
    """Two hosts with one remote, with other ports; with the same ones the second is refused."""
    assert crc32c(b"123456789") == 0xE3069283
    with (
        speaker(gateway, "internet", SCTP, timeout_s=0.5) as far,
        speaker(gateway, "a-box", SCTP, INTERNET) as one,
        speaker(gateway, "b-box", SCTP, INTERNET) as two,
    ):
        for near, port in ((one, 5001), (two, 5002)):
            near.send(sctp(port, 3868))
            assert hears(far, sctp(port, 3868), PUBLIC)
            far.sendto(sctp(3868, port), (PUBLIC, 0))
            assert hears(near, sctp(3868, port), INTERNET)
        two.send(sctp(5001, 3868))
        with pytest.raises(OSError, match="No route to host"):
            two.recv(100)


def test_none_when_told_so(gateway: Gateway) -> None:
    with (
        gateway.settings(drop_other=1),
        gateway.counting() as grown,
        speaker(gateway, "internet", 99, timeout_s=0.3) as far,
        speaker(gateway, "a-box", 99, INTERNET) as near,
    ):
        near.send(b"strange")
        with pytest.raises(TimeoutError):
            hears(far, b"strange", PUBLIC)
    assert grown["drop_protocol"] == 1
