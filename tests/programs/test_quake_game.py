"""Quake: DarkPlaces serves a game, and qstat asks about it; a client, which would want a screen, is played by us.

::

    a-box, b-box ─ lan0 masq-gate wan0 203.0.113.1 ─ internet .10

DarkPlaces plays where it is asked, at port 26000, so the ALG is needed where that has another number outside.
Mode: tc.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator

import pytest
import quakedata
from netkit import Gateway

from xdpmasq import algs
from xdpmasq.lab import Lab
from xdpmasq.lab.servers import Server
from xdpmasq.lab.topology import HOSTS, INTERNET, PUBLIC

CONNECT = struct.pack("!HHB", 0x8000, 12, 1) + b"QUAKE\0\x03"  # CCREQ_CONNECT
ACCEPTED = re.compile(rb"\x80\0\0\x09\x81(....)", re.DOTALL)
RELIABLE, ACK = 0x0009, 0x0002  # NETFLAG_DATA | NETFLAG_EOM, NETFLAG_ACK


class QuakeServer(Server):
    name = "darkplaces"

    def __init__(self, lab: Lab, role: str = "internet", address: str = INTERNET) -> None:
        super().__init__(lab, role, address)
        quakedata.write(self.directory)
        options = ["-basedir", self.directory, "-ip", address, "+sv_protocolname", "QUAKE", "+map", "start"]
        self._start(["env", f"HOME={self.directory}", "/usr/games/darkplaces-server", *options], "udp", 26000)


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with Gateway.in_new_lab("tc", attach=False) as made:
        made.attach_with(algs=(algs.Use.parse("quake"),))
        yield made


@pytest.fixture(scope="module")
def outside(gateway: Gateway) -> QuakeServer:
    return QuakeServer(gateway.lab)


@pytest.fixture(scope="module")
def inside(gateway: Gateway) -> QuakeServer:
    return QuakeServer(gateway.lab, "b-box", HOSTS["b-box"])


def joins(gateway: Gateway, role: str, called: tuple[str, int]) -> int:
    """Connects, is greeted from the port that it is told, and says that it has heard; returns that port."""
    with gateway.udp(role) as client:
        client.sendto(CONNECT, called)
        text, source = client.recvfrom(2000)
        assert source == called
        accepted = ACCEPTED.match(text)
        assert accepted, text
        game = called[0], int.from_bytes(accepted[1], "little")
        greeting, source = client.recvfrom(2000)
        assert source == game
        flags, length, number = struct.unpack_from("!HHI", greeting)
        assert (flags, length) == (RELIABLE, len(greeting))
        assert b"Server: DarkPlaces" in greeting
        client.sendto(struct.pack("!HHI", ACK, 8, number), game)
        return game[1]


def is_listed(gateway: Gateway, role: str, called: tuple[str, int]) -> bool:
    """By qstat, with its map."""
    output = gateway.lab.exec(role, ["quakestat", "-qs", f"{called[0]}:{called[1]}"]).stdout
    return bool(re.search(rf"^{re.escape(called[0])}\S* +0/ *\d+ +\S* *start ", output, re.MULTILINE))


def test_a_client_inside(gateway: Gateway, outside: QuakeServer, tell: Callable[[str], None]) -> None:
    assert is_listed(gateway, "a-box", (INTERNET, 26000))
    assert joins(gateway, "a-box", (INTERNET, 26000)) == 26000
    tell("Quake, DarkPlaces outside: qstat inside sees its map, a client inside is greeted")


def test_a_server_inside(gateway: Gateway, inside: QuakeServer, tell: Callable[[str], None]) -> None:
    """Behind a forward from another port."""
    with gateway.forward("udp", "27000", f"{HOSTS['b-box']}:26000"):
        assert is_listed(gateway, "internet", (PUBLIC, 27000))
        assert joins(gateway, "internet", (PUBLIC, 27000)) == 27000
        gateway.masq("alg", "disable", "quake")
        with pytest.raises(AssertionError, match="26000"):
            joins(gateway, "internet", (PUBLIC, 27000))
        gateway.masq("alg", "enable", "quake")
    tell("Quake, DarkPlaces inside: qstat outside sees its map, a client outside is greeted, and not without the ALG")
