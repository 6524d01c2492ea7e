"""Port blocks (RFC 6888 REQ-14), where they are on: what the agent does for them, and what is to be read of them.

Packets take blocks (bpf/block.h). Each tick gives back those in which no port has been in use or at rest since the
one before, and keeps those from being taken that are not whole: at the edges of the pool, or with ports of forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

import numpy as np
import numpy.typing as npt

from xdpmasq import bpf
from xdpmasq.abi import (
    BLOCK_FREE,
    BLOCK_IDLE,
    BLOCK_OUTSIDE,
    BLOCK_TAKEN,
    BLOCKS,
    CLASSES,
    EXTERNAL_SLOTS,
    PORTS,
    REAP_BLOCK_CLOSE,
    REAP_BLOCK_FREE,
    REAP_BLOCK_IDLE,
    REAP_BLOCK_OPEN,
    REAP_BLOCK_TAKE,
    Slots,
    addr,
)
from xdpmasq.tables import Tables


@dataclass(frozen=True)
class Block:
    """One that an internal host has.

    Attributes:
        external: index of the external address.
        first, last: ports.
        taken_at: jiffies.
    """

    external: int
    first: int
    last: int
    owner: IPv4Address
    taken_at: int


def size(tables: Tables) -> int:
    """Ports of each block; 0: there are none."""
    bits = int(tables.settings["block_bits"]) if "blocks" in tables.maps else 0
    return 1 << bits if bits else 0


def taken(tables: Tables) -> Iterator[Block]:
    """Those that hosts have."""
    ports, rows = size(tables), _rows(tables)
    for number in np.flatnonzero((rows["state"] == BLOCK_TAKEN) | (rows["state"] == BLOCK_IDLE)).tolist():
        row, first = rows[number], number % BLOCKS * ports
        owner = IPv4Address(row["owner"]["word"][:1].tobytes())
        yield Block(number // BLOCKS, first, first + ports - 1, owner, int(row["taken_at"]))


def use(tables: Tables) -> npt.NDArray[np.int64]:
    """For each external address how many hosts have, and how many are free."""
    states = _rows(tables)["state"].reshape(-1, BLOCKS)[:, : PORTS // size(tables)]
    held = (states == BLOCK_TAKEN) | (states == BLOCK_IDLE)
    return np.stack([held.sum(axis=1), (states == BLOCK_FREE).sum(axis=1)], axis=1)


def of_host(tables: Tables, host: IPv4Address, external: int) -> list[range]:
    """The ports of a host's blocks on one external address."""
    ports, tenant = size(tables), tables.maps["tenants"].get(addr(host))
    numbers = [] if tenant is None else [int(each) - 1 for each in tenant["block"] if each]
    firsts = [number % BLOCKS * ports for number in numbers if number // BLOCKS == external]
    return [range(first, first + ports) for first in firsts]


def take(tables: Tables, reaper: bpf.Program, host: IPv4Address, external: int) -> None:
    """Another one for a host, if there is one and it may have more."""
    tables.reap(reaper, np.array([external, addr(host)[0][0]], np.uint32), REAP_BLOCK_TAKE)


def _rows(tables: Tables) -> bpf.Array:
    return tables.maps["blocks"].view().copy()


class Upkeep:
    """One tick after another.

    Args:
        static: the slots of forwards and leases.
    """

    def __init__(self, tables: Tables, reaper: bpf.Program, static: Callable[[], Slots]) -> None:
        self._tables, self._reaper, self._static = tables, reaper, static
        self._without: set[bytes] = set()  # tenants that had no block

    def run(self) -> None:
        """A tick."""
        if not size(self._tables):
            return
        states = _rows(self._tables)["state"]  # before the ports: see block.h
        busy = self._busy()
        for state, is_busy, order in (
            (BLOCK_IDLE, False, REAP_BLOCK_FREE),
            (BLOCK_TAKEN, False, REAP_BLOCK_IDLE),
            (BLOCK_FREE, True, REAP_BLOCK_CLOSE),
            (BLOCK_OUTSIDE, False, REAP_BLOCK_OPEN),
        ):
            numbers = np.flatnonzero((states == state) & (busy == is_busy)).astype(np.uint32)
            self._tables.reap(self._reaper, numbers, order)

    def forget(self) -> None:
        """Removes tenants that have had no block since the last time: a packet may just be about to give them one."""
        if not size(self._tables):
            return
        table, before, self._without = self._tables.maps["tenants"], self._without, set()
        for keys, tenants in table.items(chunk=table.max_entries):
            for key in keys[(tenants["block"] == 0).all(axis=1)]:
                if key.tobytes() in before:
                    table.delete(key)
                else:
                    self._without.add(key.tobytes())

    def _busy(self) -> npt.NDArray[np.bool_]:
        """For each block whether ports in it are claimed, but for those of others' forwards in hosts' blocks; places
        without a block are.
        """
        ports, tables = size(self._tables), self._tables
        claims = tables.claims[: tables.further_base // 64].copy()
        for slot in self._foreign().tolist():
            claims[slot // 64] &= ~np.uint64(1 << slot % 64)
        words = claims.reshape(tables.externals, len(CLASSES), PORTS // ports, ports // 64)
        busy = np.ones((tables.externals, BLOCKS), bool)
        busy[:, : PORTS // ports] = words.any(axis=(1, 3))
        return busy.reshape(-1)

    def _foreign(self) -> Slots:
        """Static slots in blocks of hosts that are not theirs."""
        slots, blocks = self._static(), _rows(self._tables)
        slots = slots[slots < self._tables.further_base]
        mine: Any = blocks[slots // EXTERNAL_SLOTS * BLOCKS + slots % PORTS // size(self._tables)]
        held = (mine["state"] == BLOCK_TAKEN) | (mine["state"] == BLOCK_IDLE)
        theirs = self._tables.rows(slots)["in"]["new_addr"]["word"][:, 0] == mine["owner"]["word"][:, 0]
        foreign: Slots = slots[held & ~theirs]
        return foreign
