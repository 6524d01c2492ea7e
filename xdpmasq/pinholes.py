"""Pinholes: for a while some remote may come to an internal endpoint, because an ALG has read that it will.

They stand in the kernel's table, and so outlive the agent. The port that is named to the remote is one that the agent
holds (:mod:`xdpmasq.ports`): the endpoint's own mapping, or a new one; it is given back when its last pinhole is
gone, and lives on as long as its sessions.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any

import numpy as np
import numpy.typing as npt

from xdpmasq import abi, bpf, calls, config, expiry, forwarding, presence, sessions
from xdpmasq.abi import CLASSES, EXTERNAL_SLOTS, LIFE_LIVE, LIFE_STATE, PORTS, REAP_YIELD
from xdpmasq.alg import switches
from xdpmasq.alg.api import Address, Control, Endpoint, Refused
from xdpmasq.errors import BusyError
from xdpmasq.ports import Endpoint as Mapped
from xdpmasq.ports import Ports
from xdpmasq.sessions import Table
from xdpmasq.tables import Tables

LASTS_S = 300  # at most
MOST_OF_A_HOST = 256  # pinholes, and calls
MOST_OF_A_TICK = 1024  # that are ended; to packets they are over anyway
CLI_S = 0.2  # that a message may wait for a command at work
OVERTAKEN_MOST = 3
MOST_OF_A_MESSAGE = 64  # calls of SessionsOpenings.open, which take a millisecond each
ANYBODY = IPv4Address(0)

_MAPPING = struct.Struct("=I")


def control_key(mapping: int, remote: bytes) -> bytes:
    """``struct control_key`` of a control session.

    Args:
        mapping: its slot.
        remote: address and port, as on the wire.
    """
    return _MAPPING.pack(mapping) + remote + bytes(2)


@dataclass(frozen=True)
class Pinhole:
    """One, as people read it.

    Attributes:
        remote: None: anybody.
        remote_port: 0: any.
        left: sessions that it still serves; None: all that come.
        left_s: seconds until it is gone.
    """

    protocol: str
    internal: Endpoint
    external: Endpoint
    remote: IPv4Address | None
    remote_port: int
    left: int | None
    left_s: float


def records(tables: Tables) -> tuple[bpf.Array, bpf.Array]:
    """``struct pinhole_key`` and ``struct pinhole`` of all: there may be thousands, so nothing walks over them."""
    table = tables.maps["pinholes"]
    parts = list(table.items(chunk=table.max_entries))
    return np.concatenate([keys for keys, _ in parts]), np.concatenate([values for _, values in parts])


def counted(tables: Tables) -> dict[str, int]:
    """How many are open, by protocol."""
    keys, values = records(tables)
    classes = keys["mapping"][~_are_over(values)] // PORTS % len(CLASSES)
    return {name: int((classes == number).sum()) for number, name in enumerate(CLASSES[:2])}


def listed(tables: Tables) -> list[Pinhole]:
    """Those that are open."""
    now, settings, found = bpf.jiffies(), tables.settings, []
    keys, values = records(tables)
    are_open = ~_are_over(values)
    left = np.maximum(_left(now, values), 0)
    for key, value, ticks in zip(keys[are_open], values[are_open], left[are_open].tolist(), strict=True):
        slot, remote = int(key["mapping"]), _address(key["remote"])
        external = IPv4Address(settings["external"]["word"][slot // EXTERNAL_SLOTS, :1].tobytes())
        found.append(
            Pinhole(
                CLASSES[slot // PORTS % len(CLASSES)],
                Endpoint(_address(value["internal"]), socket.ntohs(int(value["internal_port"]))),
                Endpoint(external, slot % PORTS),
                None if remote == ANYBODY else remote,
                socket.ntohs(int(value["remote_port"])),
                int(value["left"]) if value["counted"] else None,
                ticks / int(settings["hz"]),
            )
        )
    return sorted(found, key=lambda each: (each.protocol, str(each.internal.address), each.internal.port))


def expected(tables: Tables) -> Table:
    """The same as rows beside sessions."""
    keys, values = records(tables)
    return _rows(tables, keys, values)[~_are_over(values)]


def flush(tables: Tables, choice: Callable[[Table], Table]) -> int:
    """Has those be over that are chosen from their rows; returns how many. To be taken away by the agent."""
    keys, values = records(tables)
    rows = _rows(tables, keys, values)
    chosen = choice(rows[~_are_over(values)]).slot
    values["expires"][chosen] = (bpf.jiffies() - 1) % 2**32
    for key, value in zip(keys[chosen], values[chosen], strict=True):
        with contextlib.suppress(FileNotFoundError):
            tables.maps["pinholes"].set(key, value, bpf.UPDATE_EXIST)
    return len(chosen)


def _rows(tables: Tables, keys: bpf.Array, values: bpf.Array) -> Table:
    slots, settings = keys["mapping"], tables.settings
    ends = (
        sessions.endpoints(values["internal"], values["internal_port"]),
        sessions.Endpoints(settings["external"]["word"][slots // EXTERNAL_SLOTS], (slots % PORTS).astype(np.uint16)),
        sessions.endpoints(keys["remote"], values["remote_port"]),
    )
    left = np.maximum(_left(bpf.jiffies(), values), 0) / int(settings["hz"])
    return sessions.beside("EXPECTED", slots // PORTS % len(CLASSES), ends, remaining_s=left)


@dataclass(frozen=True)
class Wish:
    """What is to be opened, for an endpoint of ``host``; ``pair``: for the next port, too.

    Attributes:
        remote: None: anybody.
        sessions: 0: all that come while it lasts.
    """

    protocol: str
    host: IPv4Address
    port: int
    remote: IPv4Address | None
    remote_port: int = 0
    lasts_s: float = LASTS_S
    sessions: int = 1
    pair: bool = False

    @property
    def endpoints(self) -> list[Mapped]:
        return [Mapped(self.protocol, self.host, self.port + nth) for nth in range(1 + self.pair)]


class Pinholes:
    """All of a datapath."""

    def __init__(self, tables: Tables, reaper: bpf.Program, pools: config.Ports, hz: int) -> None:
        self._tables, self._reaper, self._pools, self._hz = tables, reaper, pools, hz
        self._table = tables.maps["pinholes"]

    def ports(self, wan: int) -> Ports:
        return Ports(self._tables, self._reaper, self._pools, lambda _: wan)

    # --- reading

    def records(self) -> tuple[bpf.Array, bpf.Array]:
        """``struct pinhole_key`` and ``struct pinhole`` of all."""
        return records(self._tables)

    # --- writing

    def open(self, owner: bytes, wan: int, wish: Wish) -> Endpoint:
        """One, or two neighbours; see :meth:`xdpmasq.alg.api.Openings.open`.

        Raises:
            Refused: there is no port, or no room.
        """
        ports, endpoints = self.ports(wan), wish.endpoints
        places = self._published(ports, endpoints)
        try:
            for endpoint, (slot, owned) in zip(endpoints, places, strict=True):
                self._put(owner, slot, wish, endpoint.port, owned)
        except OSError as error:
            self._give_back([slot for slot, owned in places if owned])
            raise Refused("the table of pinholes is full") from error
        first = places[0][0]
        return Endpoint(ports.address(first), first % PORTS)

    def end_those(self, ended: Callable[[bpf.Array, bpf.Array], npt.NDArray[np.bool_]]) -> None:
        """Ends some: which, is asked once, with the keys and values of all."""
        keys, values = self.records()
        gone = keys[ended(keys, values)]
        for key in gone:
            self._table.delete(key)
        if len(gone):
            self._give_back(np.intersect1d(gone["mapping"], keys["mapping"][values["owned"] != 0]))

    def count(self, host: Address) -> int:
        """How many pinholes lead to a host, and how many calls it has."""
        (words,) = abi.addr(host if isinstance(host, IPv4Address) else None)[0]
        tables = (self._table, self._tables.maps["calls"])
        return sum(
            int((values["internal"]["word"][:, 0] == words).sum()) for each in tables for _, values in each.items()
        )

    def keep_latest(self, owner: bytes, most: int) -> None:
        """Of the ports that a control session has open, the oldest go."""
        now, mine = bpf.jiffies(), np.frombuffer(owner, self._tables.maps["controls"].key)

        def oldest(keys: bpf.Array, values: bpf.Array) -> npt.NDArray[np.bool_]:
            own = np.flatnonzero(values["control"] == mine)
            order = np.lexsort((-keys["mapping"][own].astype(np.int64), _left(now, values[own])))
            gone = np.zeros(len(keys), bool)  # by ports where they are of the same moment
            gone[own[order[: max(0, len(own) - most)]]] = True
            return gone

        self.end_those(oldest)

    def tick(self) -> None:
        """Ends those that are over, and those whose address is no longer ours."""
        calls.forget(self._tables, LASTS_S * self._hz)

        def ended(keys: bpf.Array, values: bpf.Array) -> npt.NDArray[np.bool_]:
            gone = _are_over(values) | self._are_lost(keys, values)
            return np.asarray(gone & (np.cumsum(gone) <= MOST_OF_A_TICK))

        self.end_those(ended)

    def _are_lost(self, keys: bpf.Array, values: bpf.Array) -> npt.NDArray[np.bool_]:
        """The external address is another, or the port, which was held for it, is somebody else's."""
        slots = keys["mapping"].astype(np.uint32)
        if not len(slots):
            return np.zeros(0, bool)
        rows = self._tables.rows(slots)
        are_there = (rows["life"] & LIFE_STATE == LIFE_LIVE) & (rows["in"]["new_addr"] == values["internal"])
        elsewhere = rows["out"]["new_addr"] != self._tables.settings["external"][slots // EXTERNAL_SLOTS]
        return np.asarray(elsewhere | ((values["owned"] != 0) & ~are_there))

    def _published(self, ports: Ports, endpoints: list[Mapped]) -> list[tuple[int, bool]]:
        """Where they are found from now on.

        A telephone that answers sends at once, and its sound overtakes the answer, which is read first: so a packet
        may make a mapping while we choose. That one is kept, as sessions run there.
        """
        for _ in range(OVERTAKEN_MOST):
            before = [ports.mapped(each) for each in endpoints]
            places = self._places(ports, endpoints) if len(endpoints) > 1 else [self._place(ports, endpoints[0])]
            try:
                published = all(ports.publish(each, slot) for each, (slot, _) in zip(endpoints, places, strict=True))
            except OSError as error:
                self._give_back([slot for slot, owned in places if owned])
                raise Refused("the table of mappings is full") from error
            if published or before == [ports.mapped(each) for each in endpoints]:
                return places
            self._give_back([slot for slot, owned in places if owned])
        raise Refused("it is given other mappings all the time")

    def _places(self, ports: Ports, endpoints: list[Mapped]) -> list[tuple[int, bool]]:
        """Of neighbours; where one has a mapping already, beside that."""
        slots = [ports.mapped(each) for each in endpoints]
        if slots == [None, None]:
            if pair := ports.take_pair(*endpoints):
                return [(slot, True) for slot in pair]
            raise Refused("no two neighbouring ports are left")
        first = slots[0] if slots[0] is not None else (slots[1] or 0) - 1
        if first % 2 or slots[1] not in (None, first + 1):
            raise Refused("its ports are mapped to others than neighbours")
        found = []
        for nth, endpoint in enumerate(endpoints):
            if slots[nth] is not None:
                found.append(self._place(ports, endpoint))
            elif ports.take(endpoint, (first + nth) % PORTS, exact=True) is not None:
                found.append((first + nth, True))
            else:
                self._give_back([slot for slot, owned in found if owned])
                raise Refused("the port beside its own is another's")
        return found

    def _place(self, ports: Ports, mapped: Mapped) -> tuple[int, bool]:
        """The endpoint's slot, and whether it is ours to give back."""
        slot = ports.mapped(mapped)
        if slot is not None and ports.is_static(slot):
            keys, values = self.records()
            return slot, bool(values["owned"][keys["mapping"] == slot].any())
        held = ports.hold(mapped, slot) if slot is not None else None
        if held is None:
            held = ports.take(mapped)
        if held is None:
            raise Refused("no port is left")
        return held, True

    def _put(self, owner: bytes, slot: int, wish: Wish, port: int, owned: bool) -> None:
        value = np.zeros((), self._table.value)
        value["left"], value["counted"] = wish.sessions, wish.sessions > 0
        value["expires"] = (bpf.jiffies() + int(min(wish.lasts_s, LASTS_S) * self._hz)) % 2**32
        value["internal"]["word"][0] = abi.addr(wish.host)[0][0]
        value["internal_port"], value["remote_port"] = socket.htons(port), socket.htons(wish.remote_port)
        value["control"], value["owned"] = np.frombuffer(owner, value["control"].dtype)[0], owned
        self._table.set((slot, abi.addr(wish.remote)), value)

    def _give_back(self, slots: npt.ArrayLike) -> None:
        """Those that no pinhole, and no forward, has by now."""
        kept = np.concatenate((self.records()[0]["mapping"], forwarding.forwarded_slots(self._tables)))
        self._tables.reap(self._reaper, np.setdiff1d(np.asarray(slots, np.uint32), kept), REAP_YIELD)


@dataclass
class SessionsOpenings:
    """What one control session may have: :class:`xdpmasq.alg.api.Openings`.

    Attributes:
        owner: see :func:`control_key`.
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
        if self.pinholes.count(internal.address) >= MOST_OF_A_HOST:
            raise Refused(f"{internal.address} has {MOST_OF_A_HOST} already")
        if protocol == "gre" and remote == self.control.remote.address:
            return Endpoint(self.control.external.address, calls.open_(*self._call(internal.port)))
        if protocol not in CLASSES[:2]:
            raise Refused(f"no pinholes for {protocol}")
        if not 1024 <= internal.port <= PORTS - 1 - pair or (pair and internal.port % 2):
            raise Refused(f"port {internal.port}")
        assert isinstance(internal.address, IPv4Address)
        assert remote is None or isinstance(remote, IPv4Address)
        wish = Wish(
            protocol, internal.address, internal.port, remote, remote_port or 0, lasts_s, sessions=sessions, pair=pair
        )
        if not self._has(wish):
            self.pinholes.keep_latest(self.owner, self.most - len(wish.endpoints))
        try:
            with presence.changing(CLI_S):  # commands take ports, too
                return self.pinholes.open(self.owner, self.wan, wish)
        except BusyError as error:
            raise Refused(error.what) from error

    def external(self, protocol: str, internal: Endpoint) -> Endpoint | None:
        if internal.address != self.control.internal.address:
            return None
        if protocol == "gre":
            number = calls.outside(*self._call(internal.port))
            return None if number is None else Endpoint(self.control.external.address, number)
        ports = self.pinholes.ports(self.wan)
        slot = ports.mapped(_mapped(protocol, internal))
        return None if slot is None else Endpoint(ports.address(slot), slot % PORTS)

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

    def _call(self, number: int) -> tuple[Tables, int, IPv4Address, int, IPv4Address]:
        host, remote = self.control.internal.address, self.control.remote.address
        assert isinstance(host, IPv4Address)
        assert isinstance(remote, IPv4Address)
        return self.tables, self._external, host, number, remote

    @property
    def _external(self) -> int:
        """The index of the session's external address."""
        mapping: int = _MAPPING.unpack_from(self.owner)[0]
        return mapping // EXTERNAL_SLOTS

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
        return slot is not None and self.tables.maps["pinholes"].get((slot, abi.addr(wish.remote))) is not None


def _mapped(protocol: str, internal: Endpoint) -> Mapped:
    assert isinstance(internal.address, IPv4Address)
    return Mapped(protocol, internal.address, internal.port)


def _address(field: Any) -> IPv4Address:
    return IPv4Address(field["word"][:1].tobytes())


def _left(now: int, values: bpf.Array) -> expiry.Ticks:
    """Jiffies."""
    return -expiry.age(now, values["expires"].astype(np.uint32))


def _are_over(values: bpf.Array) -> npt.NDArray[np.bool_]:
    """By time, or as they have served as many sessions as they were for."""
    served = (values["counted"] != 0) & (values["left"].astype(np.int64) <= 0)
    return np.asarray((_left(bpf.jiffies(), values) < 0) | served)
