"""Counting the session table: how many of what kind, how full, and who has carried most.

A table may hold a million sessions, and who counts them shares the interpreter with the agent, which must not wait.
So it is done in pieces that fit the processor's cache and take a millisecond at most.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xdpmasq import sessions
from xdpmasq.abi import CLASSES, LIFE_LIVE, LIFE_RESTING, LIFE_STATE, LIFE_STATIC, PORTS, Slots
from xdpmasq.tables import Tables

USES = ("used", "resting", "forwarded")  # of an external port
PIECE = 16384  # slots at a time: 2 MB of records
HOSTS_MOST = 65536  # internal hosts whose bytes are kept in mind

Counts = npt.NDArray[np.int64]
_PerHost = tuple[npt.NDArray[np.uint32], npt.NDArray[np.float64]]


@dataclass
class Census:
    """What was counted.

    Attributes:
        states: sessions by protocol (:data:`CLASSES`) and state (:data:`sessions.STATES`).
        carried: by protocol, the columns of :func:`sessions.traffic` added up.
        ports: external ports by external address (its index), protocol and :data:`USES`.
        further: places behind those of external ports that are taken.
    """

    states: Counts
    carried: dict[str, Counts]
    ports: Counts
    further: int = 0

    @property
    def total(self) -> int:
        """Sessions."""
        return int(self.states.sum())


def take(tables: Tables, hosts: Hosts | None = None) -> Census:
    """Counts what is in the tables now; sessions that are expired and not yet reaped are among it.

    Args:
        hosts: brought up to date as well.
    """
    kinds, externals = len(CLASSES), tables.externals
    found = Census(
        states=np.zeros((kinds, len(sessions.STATES)), np.int64),
        carried={name: np.zeros(kinds, np.int64) for name in sessions.TRAFFIC},
        ports=np.zeros((externals, kinds, len(USES)), np.int64),
    )
    for slots in _pieces(tables):
        records = tables.rows(slots)
        life = records["life"]
        _count_ports(found, slots[slots < tables.further_base], life)
        found.further += int(np.count_nonzero(slots >= tables.further_base))
        used = sessions.in_use(life)
        rows = records[used]
        _count_sessions(found, rows)
        if hosts:
            hosts.note(slots[used], rows)
            ended = ~used & (life & LIFE_STATE != 0)
            hosts.note(slots[ended], records[ended])
    if hosts:
        hosts.settle()
    return found


def _pieces(tables: Tables) -> Iterator[Slots]:
    """The slots in use, by the bitmap, which is a thousandth of the table."""
    words = PIECE // 64
    for start in range(0, len(tables.claims), words):
        bits = np.unpackbits(tables.claims[start : start + words].view(np.uint8), bitorder="little")
        slots = np.flatnonzero(bits)
        if len(slots):
            yield (slots + start * 64).astype(np.uint32)


def _count_ports(found: Census, slots: Slots, life: Any) -> None:
    life = life[: len(slots)]  # slots are in order: those of external ports come first
    places, state = slots // PORTS, life & LIFE_STATE
    static = life & LIFE_STATIC != 0
    for number, which in enumerate((~static & (state == LIFE_LIVE), ~static & (state == LIFE_RESTING), static)):
        column = found.ports[:, :, number]
        column += np.bincount(places[which], minlength=column.size).reshape(column.shape)


@functools.cache
def _states() -> npt.NDArray[np.uint8]:
    """``sessions.states`` as a table: by whether it is TCP, whether there were replies, and both sides' flags."""
    tcp, replied, out, in_ = np.meshgrid([0, 1], [0, 1], *[np.arange(256, dtype=np.uint8)] * 2, indexing="ij")
    return sessions.states(np.where(tcp, sessions.TCP, sessions.UDP), out, in_, replied)


def _count_sessions(found: Census, rows: Any) -> None:
    kinds, states = found.states.shape
    protocol = (rows["mapping"] // PORTS % kinds).astype(np.intp)
    traffic = sessions.traffic(rows)
    replied = (traffic["in_packets"] != 0).view(np.uint8)
    is_tcp = (protocol == sessions.TCP).view(np.uint8)
    cells = protocol * states + _states()[is_tcp, replied, rows["out"]["tcp_seen"], rows["in"]["tcp_seen"]]
    found.states += np.bincount(cells, minlength=found.states.size).reshape(found.states.shape)
    for name, column in traffic.items():
        # by way of floats, exact up to 2⁵³ of a piece
        found.carried[name] += np.bincount(protocol, column, kinds).astype(np.int64)


class Hosts:
    """What each internal host has carried since this was made, brought up to date by every :func:`take`.

    A session tells what it has carried; of one that was known before, only what came since is added. What it carried
    between the last look and the reuse of its slot is missed.

    Args:
        slots: places in the table.
    """

    def __init__(self, slots: int) -> None:
        self._opened_at = np.zeros(slots, np.uint32)  # tells a session from a later one in its slot
        self._seen = {name: np.zeros(slots, np.uint64) for name in ("out_bytes", "in_bytes")}
        self._begun = False
        self._parts: list[_PerHost] = []
        self.addresses = np.zeros(0, np.uint32)  # as in the table
        self.sums = np.zeros((0, 3))  # sessions in use, bytes out, bytes in

    def note(self, slots: Slots, rows: Any) -> None:
        """Some more of the table, ended sessions included."""
        known, traffic = self._opened_at[slots] == rows["opened_at"], sessions.traffic(rows)
        more = [sessions.in_use(rows["life"])]
        for name, seen in self._seen.items():
            before = np.where(known, seen[slots], 0) if self._begun else traffic[name]
            more.append(traffic[name] - before)
            seen[slots] = traffic[name]
        self._opened_at[slots] = rows["opened_at"]
        self._parts.append(sessions.summed(rows["in"]["new_addr"]["word"][:, 0], more))

    def settle(self) -> None:
        """All of the table has been noted."""
        self.sums[:, 0] = 0
        self._parts.append((self.addresses, self.sums))
        addresses, sums = (np.concatenate(each) for each in zip(*self._parts, strict=True))
        self.addresses, self.sums = sessions.summed(addresses, sums.T)
        self._parts, self._begun = [], True
        if len(self.addresses) > HOSTS_MOST:
            kept = np.sort(self.first(HOSTS_MOST))
            self.addresses, self.sums = self.addresses[kept], self.sums[kept]

    def first(self, count: int) -> npt.NDArray[np.intp]:
        """Places of those that have carried most."""
        return np.argsort(-self.sums[:, 1:].sum(axis=1), kind="stable")[:count]
