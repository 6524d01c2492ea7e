"""Ending idle sessions and returning rested ports.

Idle slots are found here, by numpy over the mmap-ed table; they are changed by the reaper in the kernel,
which looks again, so a packet that comes at the last moment keeps its session.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from xdpmasq import bpf
from xdpmasq.abi import (
    CLASS_ROOM,
    CLASSES,
    LIFE_FURTHER_MASK,
    LIFE_LIVE,
    LIFE_RESTING,
    LIFE_SESSION,
    LIFE_STATE,
    LIFE_STATIC,
    PORTS,
    REAP_EXPIRED,
    REAP_RESTED,
    Slots,
)
from xdpmasq.tables import Tables

TCP_FIN, TCP_RST, TCP_ACK = 0x01, 0x04, 0x10
HOST_S = 60  # an internal host with nothing open is forgotten after this
SCARCE = 64  # a pool of which only one port in so many is free has none to spare for a rest
Ticks = npt.NDArray[np.int64]


def age(now: int, stamps: npt.NDArray[np.uint32]) -> Ticks:
    """Jiffies since ``stamps``, negative where another CPU was ahead; right across the counter's wrap."""
    return (np.uint32(now) - stamps).astype(np.int32).astype(np.int64)


def idle_limits(settings: Any, tcp_out: Any, tcp_in: Any, mappings: Slots) -> Ticks:
    """Jiffies a session may be idle: ``session_idle_limit`` of bpf/flow.h, for many.

    Args:
        settings: ``struct settings``.
        tcp_out, tcp_in: ``tcp_seen`` of both flows.
        mappings: slots of the sessions' mappings, which tell the protocol.
    """
    both, any_ = tcp_out & tcp_in, tcp_out | tcp_in
    established = (both & TCP_ACK != 0) & (both & TCP_FIN == 0) & (any_ & TCP_RST == 0)
    by_class = np.array([settings["tcp_transitory"], settings["udp"], settings["icmp"]], np.int64)
    classes = mappings // PORTS % len(CLASSES)
    return np.where((classes == 0) & established, np.int64(settings["tcp_established"]), by_class[classes])


class Expiry:
    """One pass after another over the slots in use.

    Args:
        reserved: bitmap of the slots outside the pool, which are claimed for ever.
        rest_ticks: how long a closed mapping's port rests (RFC 6888 REQ-8).
        pause_ticks: how long any other closed slot rests; a packet that found it just before is done by then.
        kept: tells the slots outside the pool that are in use all the same.
        reap: what changes many slots by an order, if not at one stroke.

    Attributes:
        looked_at: slots of the last pass.
    """

    def __init__(
        self,
        tables: Tables,
        reaper: bpf.Program,
        reserved: npt.NDArray[np.uint64],
        rest_ticks: int,
        pause_ticks: int,
        *,
        kept: Callable[[], Slots] | None = None,
        reap: Callable[[Slots, int], None] | None = None,
    ) -> None:
        self._tables, self._reserved = tables, reserved
        self._reap = reap or (lambda slots, order: tables.reap(reaper, slots, order))
        self._rest, self._pause = rest_ticks, pause_ticks
        self._kept = kept
        self.looked_at = 0

    def run(self) -> None:
        """Reaps what is expired and returns what has rested."""
        slots = self._tables.used_slots(self._reserved)
        if self._kept and len(kept := self._kept()):
            slots = np.union1d(slots, kept)
        self.looked_at = len(slots)
        if len(slots):
            # The clock is read before the stamps: a packet meanwhile can only make a session younger.
            now, rows = bpf.jiffies(), self._tables.rows(slots)
            self._reap(self._expired(slots, rows, now), REAP_EXPIRED)
            self._reap(self._rested(slots, rows, now), REAP_RESTED)

    def _expired(self, slots: Slots, rows: bpf.Array, now: int) -> Slots:
        settings = self._tables.settings
        is_live = rows["life"] & LIFE_STATE == LIFE_LIVE
        live, rows = slots[is_live], rows[is_live]
        life, out, in_ = rows["life"], rows["out"], rows["in"]
        idle = age(now, out["last_seen"])
        if settings["inbound_refresh"]:
            idle = np.minimum(idle, age(now, in_["last_seen"]))
        limits = idle_limits(settings, out["tcp_seen"], in_["tcp_seen"], rows["mapping"])
        unused = (life & LIFE_SESSION == 0) & (life & LIFE_FURTHER_MASK == 0)
        waiting = (life & LIFE_STATIC != 0) & (life & LIFE_SESSION == 0)  # a forwarded port outlives its sessions
        expired: Slots = live[((idle > limits) | unused) & ~waiting]
        return expired

    def _rested(self, slots: Slots, rows: bpf.Array, now: int) -> Slots:
        is_resting = rows["life"] & LIFE_STATE == LIFE_RESTING
        resting: Slots = slots[is_resting]
        rows = rows[is_resting]
        if not len(resting):
            return resting
        mapping = resting < self._tables.further_base
        rest = np.where(mapping, self._rest, self._pause)
        rest[mapping] = np.where(self._is_scarce()[resting[mapping]], self._pause, self._rest)
        rested: Slots = resting[age(now, rows["out"]["last_seen"]) > rest]
        return rested

    def _is_scarce(self) -> npt.NDArray[np.bool_]:
        """For each slot of an external endpoint whether its pool is all but used up."""
        words = self._tables.claims[: self._tables.further_base // 64]
        taken = np.unpackbits(words.view(np.uint8), bitorder="little").reshape(-1, len(CLASSES), PORTS)
        scarce = np.zeros(taken.shape, bool)
        for nth, pool in enumerate(self._tables.settings["pool"]):
            ports = np.concatenate([np.arange(a, a + n) for a, n in zip(pool["first"], pool["count"], strict=True)])
            if len(ports):
                free = np.count_nonzero(taken[:, nth % CLASS_ROOM, ports] == 0, axis=1)
                scarce[:, nth % CLASS_ROOM, ports] = (free * SCARCE < len(ports))[:, None]
        return scarce.reshape(-1)


def forget_hosts(tables: Tables) -> None:
    """Removes internal hosts that have nothing open and opened nothing for a while.

    A host that opens a session at this very moment could be counted in a place that is no longer its own; after a
    minute's silence that is next to impossible.
    """
    table, settings = tables.maps["hosts"], tables.settings
    for keys, hosts in table.items(chunk=table.max_entries):
        quiet = age(bpf.jiffies(), hosts["refilled_at"]) > HOST_S * int(settings["hz"])
        for key in keys[quiet & (hosts["sessions"] == 0) & (hosts["mappings"] == 0).all(axis=1)]:
            table.delete(key)


def forget_bindings(tables: Tables) -> None:
    """Removes the idle ones among the bindings of protocols without ports; they last as long as UDP's mappings."""
    table, settings = tables.maps["bindings"], tables.settings
    for keys, bindings in table.items(chunk=table.max_entries):
        for key in keys[age(bpf.jiffies(), bindings["last_seen"]) > int(settings["udp"])]:
            table.delete(key)
