"""How much is going on: what the tables grew by between two looks at them.

Like :mod:`xdpmasq.sessions`, it works on whole columns. A session that has come since the first look counts with all
that it has carried; one that has ended since does not count.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from xdpmasq import listing, sessions
from xdpmasq.selection import Selection
from xdpmasq.sessions import TRAFFIC, Array, Endpoints, Table

if TYPE_CHECKING:
    from xdpmasq.datapath import Attached

SORTS = ("rate", "packets", "sessions", "host")
OUT_PACKETS, OUT_BYTES, IN_PACKETS, IN_BYTES = range(len(TRAFFIC))  # columns of speeds


@dataclass(frozen=True)
class Look:
    """What stood in the tables at a moment.

    Attributes:
        at: of the monotonic clock, seconds.
        further: sessions that are not the first of their mapping, and how many of those there is room for.
        ports: see :func:`sessions.port_use`.
    """

    at: float
    table: Table
    counters: Mapping[str, int]
    further: tuple[int, int]
    ports: Mapping[str, Mapping[str, int]]


def look(attached: Attached) -> Look:
    """Looks; some 50 ms for 200,000 sessions."""
    settings, view = attached.settings, attached.sessions
    at = time.monotonic()
    table = sessions.read(view, settings, attached.now(), attached.hz)
    further = int(np.count_nonzero(table.slot >= attached.further_base))
    ports = sessions.port_use(view, settings)
    return Look(at, table, attached.counters(), (further, attached.further), ports)


@dataclass(frozen=True)
class Rates:
    """What came between two looks.

    Attributes:
        seconds: how long that was.
        now: the second look.
        speed: by session of ``now.table`` the columns :data:`TRAFFIC`, a second.
        counters: the same of every counter.
    """

    seconds: float
    now: Look
    speed: Array
    counters: Mapping[str, float]

    @property
    def total(self) -> Array:
        """:data:`TRAFFIC` of all sessions, a second."""
        return np.asarray(self.speed.sum(axis=0))

    @property
    def fast_share(self) -> float | None:
        """The part of the translated packets that XDP translated; None when there were none."""
        fast, slow = (self._sum(kind) for kind in ("fast_", "slow_"))
        return fast / (fast + slow) if fast + slow else None

    @property
    def drops(self) -> dict[str, float]:
        """Packets dropped a second by counter, those with most first; of counters that stood still none."""
        found = [(name, each) for name, each in self.counters.items() if name.startswith("drop_") and each > 0]
        return dict(sorted(found, key=lambda pair: -pair[1]))

    def _sum(self, prefix: str) -> float:
        return sum(each for name, each in self.counters.items() if name.startswith(prefix))


def between(before: Look, after: Look) -> Rates:
    """The rates from one look to a later one."""
    seconds = max(after.at - before.at, 1e-3)
    counters = {name: (count - before.counters.get(name, 0)) / seconds for name, count in after.counters.items()}
    return Rates(seconds, after, _grown(before.table, after.table) / seconds, counters)


def _grown(before: Table, after: Table) -> Array:
    carried, earlier = (np.stack([getattr(each, name) for name in TRAFFIC], axis=1) for each in (after, before))
    if not len(before):
        return carried.astype(float)
    at = np.minimum(np.searchsorted(before.slot, after.slot), len(before) - 1)  # slots are in order
    same = (before.slot[at] == after.slot) & (before.opened_at[at] == after.opened_at)
    same &= (carried >= earlier[at]).all(axis=1)  # opened twice in one jiffy
    return np.where(same[:, None], carried - earlier[at], carried).astype(float)


@dataclass(frozen=True)
class Top:
    """The first few hosts, or sessions, in some order.

    Attributes:
        addr: internal addresses, as in :class:`Endpoints`.
        sessions: how many each host has; of sessions ones.
        speed: the columns :data:`TRAFFIC`, a second.
        table: of sessions; of hosts None.
        among: how many there are altogether.
    """

    addr: Array
    sessions: Array
    speed: Array
    table: Table | None
    among: int

    def __len__(self) -> int:
        return len(self.speed)

    @property
    def names(self) -> list[str]:
        """Of hosts."""
        return list(listing.addresses(Endpoints(self.addr, self.sessions)))


def top(rates: Rates, selection: Selection, sort: str, count: int, *, hosts: bool) -> Top:
    """The first ``count`` of those that fit, by one of :data:`SORTS`."""
    fits = np.flatnonzero(selection.mask(rates.now.table))
    addr, speed = rates.now.table.internal.addr[fits], rates.speed[fits]
    number = np.ones(len(fits))
    if hosts:
        addr, number, speed = _by_host(addr, speed)
    chosen = _first(_key(sort, addr, number, speed), _key("host", addr, number, speed), count)
    table = None if hosts else rates.now.table[fits[chosen]]
    return Top(addr[chosen], number[chosen], speed[chosen], table, len(addr))


def _by_host(addr: Array, speed: Array) -> tuple[Array, Array, Array]:
    words = addr.shape[1]
    keys = np.ascontiguousarray(addr).view("u4" if words == 1 else "u4,u4,u4,u4").ravel()
    found, sums = sessions.summed(keys, [np.ones(len(keys)), *speed.T])
    return found.view("u4").reshape(-1, words), sums[:, 0], sums[:, 1:]


def _key(sort: str, addr: Array, number: Array, speed: Array) -> Array:
    """What is the smaller the further in front."""
    if sort == "host":
        return np.asarray(sessions.host_order(addr[:, -1]).astype(float))
    columns = {"rate": (OUT_BYTES, IN_BYTES), "packets": (OUT_PACKETS, IN_PACKETS)}
    return -number if sort == "sessions" else -speed[:, columns[sort]].sum(axis=1)


def _first(key: Array, equals: Array, count: int) -> Array:
    """Places of the smallest, in order; not all are sorted for that. Among equal ones the second key decides."""
    some = np.argpartition(key, count)[:count] if count < len(key) else np.arange(len(key))
    return np.asarray(some[np.lexsort((equals[some], key[some]))])


# --- for scripts -----------------------------------------------------------------------------------


def as_fields(rates: Rates, first: Top) -> dict[str, Any]:
    """For JSON; the keys are a contract, see ``xdpmasq top --help``."""
    now = rates.now
    used, room = now.further
    return {
        "time": round(time.time(), 3),
        "interval_s": round(rates.seconds, 3),
        **_directions(rates.total),
        "fast_share": rates.fast_share,
        "sessions": {"total": len(now.table), **now.table.counts()},
        "further_sessions": {"used": used, "room": room},
        "ports": now.ports,
        "drops_per_s": rates.drops,
        "among": first.among,
        "top": _rows(first),
    }


def _rows(first: Top) -> list[dict[str, Any]]:
    if first.table is None:
        heads = [{"host": name, "sessions": int(n)} for name, n in zip(first.names, first.sessions, strict=True)]
    else:
        ends = ("protocol", "state", "internal", "external", "remote")
        texts = [text for block in listing.json_objects(first.table) for text in block]
        heads = [{name: json.loads(text)[name] for name in ends} for text in texts]
    return [head | _directions(speed) for head, speed in zip(heads, first.speed, strict=True)]


def _directions(speed: Array) -> dict[str, dict[str, float]]:
    out_packets, out_bytes, in_packets, in_bytes = (round(each, 1) for each in speed.tolist())
    return {
        "out": {"bytes_per_s": out_bytes, "packets_per_s": out_packets},
        "in": {"bytes_per_s": in_bytes, "packets_per_s": in_packets},
    }
