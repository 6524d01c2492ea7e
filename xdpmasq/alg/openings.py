"""What the NAT does for one control session: its pinholes, and whose its endpoints are.

The agent's side of what ALGs may ask for; the bounds are here.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any

import numpy as np

from xdpmasq import abi, calls
from xdpmasq.abi import CLASSES, EXTERNAL_SLOTS, LIFE_LIVE, LIFE_STATE, PORTS
from xdpmasq.alg import switches
from xdpmasq.alg.api import Address, Control, Endpoint, Refused
from xdpmasq.errors import BusyError
from xdpmasq.pinholes import LASTS_S, Pinholes, Wish
from xdpmasq.ports import Endpoint as Mapped
from xdpmasq.tables import Tables

MOST_OF_A_HOST = 256  # pinholes; and calls
MOST_OF_A_MESSAGE = 64  # calls of SessionsOpenings.open
CLI_S = 0.2  # that a message may wait for a command at work


@dataclass
class SessionsOpenings:
    """What one control session may have: :class:`xdpmasq.alg.api.Openings`.

    Attributes:
        owner: :func:`xdpmasq.abi.control_key`.
        most: ports that are open at once; also of :attr:`followed`.
        followed: ports.
        asked: calls of :meth:`open` for the message that is being read.
    """

    pinholes: Pinholes
    tables: Tables
    owner: bytes
    wan: int
    control: Control
    most: int
    alg: str
    followed: set[int] = field(default_factory=set)
    asked: int = 0

    def open(
        self,
        protocol: str,
        internal: Endpoint,
        *,
        remote: Address | None,
        remote_port: int | None = None,
        lasts_s: float = 120.0,
        sessions: int = 1,
        pair: bool = False,
    ) -> Endpoint:
        self.asked += 1
        if self.asked > MOST_OF_A_MESSAGE:
            raise Refused(f"one message asks for more than {MOST_OF_A_MESSAGE}")
        if internal.address != self.control.internal.address:
            raise Refused(f"{internal} is not of the host that says so")
        assert isinstance(internal.address, IPv4Address)
        call = protocol == "gre" and remote == self.control.remote.address
        has = calls.count(self.tables, internal.address) if call else self.pinholes.count(internal.address)
        if has >= MOST_OF_A_HOST:
            raise Refused(f"{internal.address} has {MOST_OF_A_HOST} already")
        if call:
            return Endpoint(self.control.external.address, calls.open_(*self._call(internal.port)))
        if protocol not in CLASSES[:2]:
            raise Refused(f"no pinholes for {protocol}")
        if not 1024 <= internal.port <= PORTS - 1 - pair or (pair and internal.port % 2):
            raise Refused(f"port {internal.port}")
        assert remote is None or isinstance(remote, IPv4Address)
        wish = Wish(
            protocol, internal.address, internal.port, remote, remote_port or 0, lasts_s, sessions=sessions, pair=pair
        )
        if not self._has(wish):
            self.pinholes.keep_latest(self.owner, self.most - len(wish.endpoints))
        try:
            with self.pinholes.turns.changing(CLI_S):
                return self._outside(self.pinholes.open(self.owner, self.wan, wish))
        except BusyError as error:
            raise Refused(error.what) from error

    def external(self, protocol: str, internal: Endpoint) -> Endpoint | None:
        if internal.address != self.control.internal.address:
            return None
        if protocol == "gre":
            number = calls.outside(*self._call(internal.port))
            return None if number is None else Endpoint(self.control.external.address, number)
        slot = self.pinholes.ports(self.wan).mapped(_mapped(protocol, internal))
        return None if slot is None else self._outside(slot)

    def internal(self, protocol: str, external: Endpoint) -> Endpoint | None:
        if external.address != self.control.external.address:
            return None
        if protocol == "gre":
            number = calls.inside(*self._call(external.port))
            return None if number is None else Endpoint(self.control.internal.address, number)
        base = self._external * EXTERNAL_SLOTS
        row = self.tables.rows(np.array([base + CLASSES.index(protocol) * PORTS + external.port], np.uint32))[0]
        found = Endpoint(_address(row["in"]["new_addr"]), socket.ntohs(int(row["in"]["new_port"])))
        mine = int(row["life"]) & LIFE_STATE == LIFE_LIVE and found.address == self.control.internal.address
        return found if mine else None

    def _outside(self, slot: int) -> Endpoint:
        """A host mostly has one external address, which the session's own endpoint has, too."""
        same = slot // EXTERNAL_SLOTS == self._external
        address = self.control.external.address if same else self.pinholes.ports(self.wan).address(slot)
        return Endpoint(address, slot % PORTS)

    def _call(self, number: int) -> tuple[Tables, int, IPv4Address, int, IPv4Address]:
        host, remote = self.control.internal.address, self.control.remote.address
        assert isinstance(host, IPv4Address)
        assert isinstance(remote, IPv4Address)
        return self.tables, self._external, host, number, remote

    @property
    def _external(self) -> int:
        """The index of the session's external address."""
        return abi.slot_of(self.owner) // EXTERNAL_SLOTS

    def follow(self, endpoint: Endpoint) -> None:
        host = self.control.internal.address
        if endpoint.address not in (host, self.control.remote.address):
            raise Refused(f"{endpoint} is neither of the host nor of its remote")
        assert isinstance(host, IPv4Address)
        still = {port for port in self.followed if switches.is_followed(self.tables, host, port)}
        self.followed.intersection_update(still)
        if endpoint.port not in still and len(still) >= self.most:
            raise Refused(f"{self.most} others are followed")
        self.followed.add(endpoint.port)
        switches.follow(self.tables, self.alg, host, endpoint.port, self._lasts)

    def follow_on(self, port: int) -> None:
        """If sessions with that port are read because another one has had them followed: for longer."""
        host = self.control.internal.address
        assert isinstance(host, IPv4Address)
        if switches.is_followed(self.tables, host, port):
            switches.follow(self.tables, self.alg, host, port, self._lasts)

    @property
    def _lasts(self) -> int:
        """Jiffies."""
        return LASTS_S * int(self.tables.settings["hz"])

    def _has(self, wish: Wish) -> bool:
        slot = self.pinholes.ports(self.wan).mapped(wish.endpoints[0])
        return slot is not None and self.pinholes.is_open(slot, wish.remote)


def _mapped(protocol: str, internal: Endpoint) -> Mapped:
    assert isinstance(internal.address, IPv4Address)
    return Mapped(protocol, internal.address, internal.port)


def _address(field: Any) -> IPv4Address:
    return IPv4Address(field["word"][:1].tobytes())
