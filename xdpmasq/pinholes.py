"""Pinholes: for a while some remote may come to an internal endpoint, because an ALG has read that it will.

They stand in the kernel's table, and so outlive the agent. The port that is named to the remote is one that the agent
holds (:mod:`xdpmasq.ports`): the endpoint's own mapping, or a new one; it is given back when its last pinhole is
gone, and lives on as long as its sessions.
"""

from __future__ import annotations

import contextlib
import socket
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from xdpmasq import abi, bpf, calls, config, expiry, forwarding, presence, sessions
from xdpmasq.abi import CLASSES, EXTERNAL_SLOTS, LIFE_LIVE, LIFE_STATE, PORTS, REAP_YIELD
from xdpmasq.alg.api import Endpoint, Refused
from xdpmasq.ports import Endpoint as Mapped
from xdpmasq.ports import Ports
from xdpmasq.sessions import Table
from xdpmasq.tables import Tables

LASTS_S = 300  # at most
MOST_OF_A_TICK = 1024  # that are ended; to packets they are over anyway
OVERTAKEN_MOST = 3
ANYBODY = IPv4Address(0)


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


class Held(NamedTuple):
    """A pinhole in the kernel's table.

    Attributes:
        key: :func:`xdpmasq.abi.pinhole_key`.
        control: :func:`xdpmasq.abi.control_key` of who has asked for it.
        owned: its mapping's slot was made static for it.
    """

    key: bytes
    host: IPv4Address
    control: bytes
    owned: bool

    @property
    def slot(self) -> int:
        return abi.slot_of(self.key)


class _Index:
    """All that there are: only the agent makes and ends them, so no message has to wait for the table."""

    def __init__(self, keys: bpf.Array, values: bpf.Array) -> None:
        self._all: dict[bytes, Held] = {}
        self._groups: defaultdict[int | IPv4Address | bytes, dict[bytes, Held]] = defaultdict(dict)
        for nth in np.argsort(_left(bpf.jiffies(), values)):
            value = values[nth]
            self.put(
                Held(
                    keys[nth].tobytes(), _address(value["internal"]), value["control"].tobytes(), bool(value["owned"])
                )
            )

    def put(self, held: Held) -> None:
        """The newest, also where it was there before."""
        self.drop(held.key)
        self._all[held.key] = held
        for name in _groups(held):
            self._groups[name][held.key] = held

    def drop(self, key: bytes) -> None:
        held = self._all.pop(key, None)
        for name in _groups(held) if held else ():
            del self._groups[name][key]
            if not self._groups[name]:
                del self._groups[name]

    def of(self, group: int | IPv4Address | bytes) -> list[Held]:
        """Those of a slot, of a host, or of a control session."""
        return list(self._groups.get(group, {}).values())

    def __contains__(self, key: bytes) -> bool:
        return key in self._all


def _groups(held: Held) -> tuple[int, IPv4Address, bytes]:
    return held.slot, held.host, held.control


class Pinholes:
    """All of a datapath.

    Attributes:
        turns: for opening; commands take ports, too.
    """

    def __init__(self, tables: Tables, reaper: bpf.Program, pools: config.Ports, hz: int) -> None:
        self._tables, self._hz = tables, hz
        self._table = tables.maps["pinholes"]
        self._index = _Index(*self.records())
        self._clock = bpf.Clock(hz)
        self.set(reaper, pools)
        self._idle: set[int] = set()  # slots of ours that have no pinhole any more
        self.turns = presence.Turns()

    def set(self, reaper: bpf.Program, pools: config.Ports) -> None:
        """As another configuration has it; what is open stays."""
        self._reaper, self._pools = reaper, pools
        self._ports: dict[int, Ports] = {}

    def ports(self, wan: int) -> Ports:
        """Those of a WAN."""
        if wan not in self._ports:
            self._ports[wan] = Ports(self._tables, self._reaper, self._pools, lambda _: wan)
        return self._ports[wan]

    # --- reading

    def records(self) -> tuple[bpf.Array, bpf.Array]:
        """``struct pinhole_key`` and ``struct pinhole`` of all."""
        return records(self._tables)

    def count(self, host: IPv4Address) -> int:
        """How many lead to a host."""
        return len(self._index.of(host))

    def is_open(self, slot: int, remote: IPv4Address | None) -> bool:
        return abi.pinhole_key(slot, remote) in self._index

    # --- writing

    def open(self, owner: bytes, wan: int, wish: Wish) -> int:
        """One, or two neighbours; see :meth:`xdpmasq.alg.api.Openings.open`. Returns the slot, of two the first.

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
        return places[0][0]

    def keep_latest(self, owner: bytes, most: int) -> None:
        """Of the ports that a control session has open, the oldest go; the pool has them again with the next tick."""
        mine = self._index.of(owner)
        for held in mine[: max(0, len(mine) - most)]:
            self._idle.update(each.slot for each in self._index.of(held.slot) if each.owned)
            self._end(held.key)

    def end_those(self, ended: Callable[[bpf.Array, bpf.Array], npt.NDArray[np.bool_]]) -> None:
        """Ends some: which, is asked once, with the keys and values of all."""
        keys, values = self.records()
        gone = keys[ended(keys, values)]
        for key in gone:
            self._end(key.tobytes())
        self._idle.update(np.intersect1d(gone["mapping"], keys["mapping"][values["owned"] != 0]).tolist())
        idle, self._idle = self._idle, set()
        self._give_back(idle)

    def _end(self, key: bytes) -> None:
        self._table.delete(key)
        self._index.drop(key)

    def tick(self) -> None:
        """Ends those that are over, and those whose address is no longer ours."""
        self._clock = bpf.Clock(self._hz)
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
            places = self._places(ports, endpoints, before)
            try:
                published = all(ports.publish(each, slot) for each, (slot, _) in zip(endpoints, places, strict=True))
            except OSError as error:
                self._give_back([slot for slot, owned in places if owned])
                raise Refused("the table of mappings is full") from error
            if published or before == [ports.mapped(each) for each in endpoints]:
                return places
            self._give_back([slot for slot, owned in places if owned])
        raise Refused("it is given other mappings all the time")

    def _places(self, ports: Ports, endpoints: list[Mapped], slots: list[int | None]) -> list[tuple[int, bool]]:
        """See :meth:`_place`. Of two they are neighbours, beside the slot that one of them has already."""
        if len(endpoints) == 1:
            return [self._place(ports, endpoints[0], slots[0])]
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
                found.append(self._place(ports, endpoint, slots[nth]))
            elif ports.take(endpoint, (first + nth) % PORTS, exact=True) is not None:
                found.append((first + nth, True))
            else:
                self._give_back([slot for slot, owned in found if owned])
                raise Refused("the port beside its own is another's")
        return found

    def _place(self, ports: Ports, mapped: Mapped, slot: int | None) -> tuple[int, bool]:
        """The endpoint's slot, the one that it has if it has one; and whether it is ours to give back."""
        if slot is not None and ports.is_static(slot):
            return slot, slot in self._idle or any(each.owned for each in self._index.of(slot))
        held = ports.hold(mapped, slot) if slot is not None else None
        if held is None:
            held = ports.take(mapped)
        if held is None:
            raise Refused("no port is left")
        return held, True

    def _put(self, owner: bytes, slot: int, wish: Wish, port: int, owned: bool) -> None:
        value = np.zeros((), self._table.value)
        value["left"], value["counted"] = wish.sessions, wish.sessions > 0
        value["expires"] = self._clock.ticks_in(min(wish.lasts_s, LASTS_S))
        value["internal"]["word"][0] = abi.addr(wish.host)[0][0]
        value["internal_port"], value["remote_port"] = socket.htons(port), socket.htons(wish.remote_port)
        value["control"], value["owned"] = np.frombuffer(owner, value["control"].dtype)[0], owned
        held = Held(abi.pinhole_key(slot, wish.remote), wish.host, owner, owned)
        self._table.set(held.key, value)
        self._index.put(held)
        self._idle.discard(slot)

    def _give_back(self, slots: Iterable[int]) -> None:
        """Those that no pinhole, and no forward, has by now."""
        if unused := [slot for slot in slots if not self._index.of(slot)]:
            free = np.setdiff1d(np.array(unused, np.uint32), forwarding.forwarded_slots(self._tables))
            self._tables.reap(self._reaper, free, REAP_YIELD)


def _address(field: Any) -> IPv4Address:
    return IPv4Address(field["word"][:1].tobytes())


def _left(now: int, values: bpf.Array) -> expiry.Ticks:
    """Jiffies."""
    return -expiry.age(now, values["expires"].astype(np.uint32))


def _are_over(values: bpf.Array) -> npt.NDArray[np.bool_]:
    """By time, or as they have served as many sessions as they were for."""
    served = (values["counted"] != 0) & (values["left"].astype(np.int64) <= 0)
    return np.asarray((_left(bpf.jiffies(), values) < 0) | served)
