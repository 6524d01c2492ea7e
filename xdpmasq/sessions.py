"""From the raw session table to rows for people and scripts: who talks to whom, as whom, since when.

Everything works on whole columns, since a table may hold a million sessions. Nothing here talks to the kernel: the
arrays come from :mod:`xdpmasq.datapath` and may change while they are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from xdpmasq.abi import LIFE_LIVE, LIFE_RESTING, LIFE_SESSION, LIFE_STATE, LIFE_STATIC, PORTS

Array = npt.NDArray[Any]

PROTOCOLS = ("tcp", "udp", "icmp")  # by class, as in enum proto_class
TCP, UDP, ICMP = range(3)
TRAFFIC = ("out_packets", "out_bytes", "in_packets", "in_bytes")  # columns of a table
STATES = (
    *("SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT", "TIME_WAIT", "CLOSE"),
    *("UNREPLIED", "REPLIED"),
)
# What is listed beside sessions: connections that end at the gateway itself, and what a pinhole waits for.
BESIDE = ("REDIRECTED", "EXPECTED")
ALL_STATES = (*STATES, *BESIDE)
_STATE = {name: number for number, name in enumerate(ALL_STATES)}

_FIN, _SYN, _RST, _ACK = 0x01, 0x02, 0x04, 0x10


@dataclass(frozen=True)
class Endpoints:
    """A column of addresses (n × words, network byte order in memory) and ports (host byte order)."""

    addr: Array
    port: Array

    def __getitem__(self, index: Any) -> Endpoints:
        return Endpoints(self.addr[index], self.port[index])

    def sort_keys(self) -> list[Array]:
        """Keys for numpy.lexsort: by address, then port."""
        return [self.port, *(host_order(self.addr[:, word]) for word in reversed(range(self.addr.shape[1])))]


@dataclass(frozen=True)
class Table:
    """Sessions as columns of one length.

    Attributes:
        slot: place in the kernel's table.
        opened_at: jiffies; tells a session from a later one in the same slot.
        protocol: index into :data:`PROTOCOLS`.
        state: index into :data:`STATES`, and behind them :data:`BESIDE`.
        idle_s, remaining_s: seconds since the last packet, and until the session expires if none comes.
    """

    slot: Array
    opened_at: Array
    protocol: Array
    state: Array
    internal: Endpoints
    external: Endpoints
    remote: Endpoints
    out_packets: Array
    out_bytes: Array
    in_packets: Array
    in_bytes: Array
    idle_s: Array
    remaining_s: Array

    def __len__(self) -> int:
        return len(self.slot)

    def __getitem__(self, index: Any) -> Table:
        """Some rows: by slice, mask or positions."""
        return Table(**{each.name: getattr(self, each.name)[index] for each in fields(self)})

    def counts(self) -> dict[str, int]:
        """Sessions by protocol."""
        return dict(zip(PROTOCOLS, np.bincount(self.protocol, minlength=len(PROTOCOLS)).tolist(), strict=True))

    def ordered(self) -> Table:
        """By protocol, internal endpoint, remote endpoint."""
        # the last key of lexsort is the first to order by
        return self[np.lexsort([*self.remote.sort_keys(), *self.internal.sort_keys(), self.protocol])]


def read(sessions: Array, settings: Any, now: int, hz: int) -> Table:
    """The sessions in use; expired ones that wait for the reaper are left out.

    Args:
        sessions: ``struct session`` by slot.
        settings: ``struct settings``.
        now: jiffies.
        hz: jiffies a second.
    """
    slots = np.flatnonzero(in_use(sessions["life"])).astype(np.uint32)
    # Raw records copy several times faster than nested fields do.
    rows = sessions.view(f"V{sessions.itemsize}")[slots].view(sessions.dtype)
    protocol = (rows["mapping"] // PORTS % len(PROTOCOLS)).astype(np.uint8)
    idle, deciding = _idle(rows, settings, now)
    limit = _limit(rows, protocol, settings)
    alive = in_use(rows["life"]) & (deciding <= limit)
    table = _columns(slots, rows, protocol, idle / hz, (limit - deciding) / hz)
    return table if alive.all() else table[alive]


def _columns(slots: Array, rows: Array, protocol: Array, idle_s: Array, remaining_s: Array) -> Table:
    out, in_ = rows["out"], rows["in"]
    return Table(
        slot=slots,
        opened_at=rows["opened_at"],
        protocol=protocol,
        state=states(protocol, out["tcp_seen"], in_["tcp_seen"], rows["received"]["packets"]),
        internal=endpoints(in_["new_addr"], in_["new_port"]),
        external=endpoints(out["new_addr"], out["new_port"]),
        remote=endpoints(out["remote_addr"], out["remote_port"]),
        **traffic(rows),
        idle_s=idle_s,
        remaining_s=remaining_s,
    )


def beside(
    state: str,
    protocol: Array,
    ends: tuple[Endpoints, Endpoints, Endpoints],
    *,
    sent: tuple[Array, Array] | None = None,
    idle_s: Array | None = None,
    remaining_s: Array,
) -> Table:
    """Rows that are no sessions; instead of a slot they have a number.

    Args:
        state: one of :data:`BESIDE`.
        ends: internal, external and remote.
        sent: packets and bytes; None: none.
    """
    none = np.zeros(len(protocol), np.uint64)
    packets, octets = sent or (none, none)
    return Table(
        slot=np.arange(len(protocol), dtype=np.uint32),
        opened_at=none.astype(np.uint32),
        protocol=protocol.astype(np.uint8),
        state=np.full(len(protocol), _STATE[state], np.uint8),
        internal=ends[0],
        external=ends[1],
        remote=ends[2],
        out_packets=packets,
        out_bytes=octets,
        in_packets=none,
        in_bytes=none,
        idle_s=none.astype(float) if idle_s is None else idle_s,
        remaining_s=remaining_s,
    )


def joined(*tables: Table) -> Table:
    """All rows."""
    columns: dict[str, Any] = {}
    for each in fields(Table):
        parts = [getattr(table, each.name) for table in tables]
        if isinstance(parts[0], Endpoints):
            addr, port = (np.concatenate([getattr(part, name) for part in parts]) for name in ("addr", "port"))
            columns[each.name] = Endpoints(addr, port)
        else:
            columns[each.name] = np.concatenate(parts)
    return Table(**columns)


def traffic(rows: Array) -> dict[str, Array]:
    """What sessions have carried: IP lengths, from and to the internal host."""
    sent, received = rows["sent"], rows["received"]
    columns = (sent["packets"], sent["bytes"], received["packets"], received["bytes"])
    return dict(zip(TRAFFIC, columns, strict=True))


def in_use(life: Array) -> Array:
    wanted = np.uint64(LIFE_STATE | LIFE_SESSION)
    return np.asarray(life & wanted == np.uint64(LIFE_LIVE | LIFE_SESSION))


def endpoints(addr: Array, port: Array) -> Endpoints:
    """From columns of ``addr_t`` and ``__be16``."""
    return Endpoints(np.ascontiguousarray(addr["word"]), host_order(port))


def host_order(values: Array) -> Array:
    """Of integers in network byte order."""
    return values.view(values.dtype.newbyteorder(">")).astype(values.dtype)


def _idle(rows: Array, settings: Any, now: int) -> tuple[Array, Array]:
    """Jiffies since a packet of either direction, and since one that keeps the session alive (flow.h)."""
    moment = np.uint32(now & 0xFFFFFFFF)
    # Signed, because another CPU's jiffies may be ahead of ours by one.
    out = (moment - rows["out"]["last_seen"]).view(np.int32).astype(np.int64)
    in_ = (moment - rows["in"]["last_seen"]).view(np.int32).astype(np.int64)
    either = np.maximum(np.minimum(out, in_), 0)
    return either, either if settings["inbound_refresh"] else np.maximum(out, 0)


def _limit(rows: Array, protocol: Array, settings: Any) -> Array:
    """``session_idle_limit`` of flow.h, in jiffies."""
    out, in_ = rows["out"]["tcp_seen"], rows["in"]["tcp_seen"]
    both, any_ = out & in_, out | in_
    established = (both & _ACK != 0) & (both & _FIN == 0) & (any_ & _RST == 0)
    tcp = np.where(established, int(settings["tcp_established"]), int(settings["tcp_transitory"]))
    other = np.where(protocol == UDP, int(settings["udp"]), int(settings["icmp"]))
    return np.where(protocol == TCP, tcp, other)


def states(protocol: Array, out: Array, in_: Array, replies: Array) -> Array:
    """State by conntrack's words, seen from the internal host as in its own `ss`.

    FIN_WAIT: the internal side has closed; CLOSE_WAIT: the remote has; TIME_WAIT: both have.
    """
    both, any_ = out & in_, out | in_
    tcp = np.select(
        [
            any_ & _RST != 0,
            both & _FIN != 0,
            out & _FIN != 0,
            in_ & _FIN != 0,
            both & _ACK != 0,
            (out != 0) & (in_ != 0),
        ],
        [_STATE[name] for name in ("CLOSE", "TIME_WAIT", "FIN_WAIT", "CLOSE_WAIT", "ESTABLISHED", "SYN_RECV")],
        _STATE["SYN_SENT"],
    )
    other = np.where(replies != 0, _STATE["REPLIED"], _STATE["UNREPLIED"])
    return np.where(protocol == TCP, tcp, other).astype(np.uint8)


def summed(keys: Array, columns: Iterable[Array]) -> tuple[Array, Array]:
    """Columns added up by key: (the different keys in order, one row of sums for each)."""
    found, of = np.unique(keys, return_inverse=True)
    return found, np.stack([np.bincount(of, column, len(found)) for column in columns], axis=1)


def port_use(sessions: Array, settings: Any) -> dict[str, dict[str, int]]:
    """External ports by protocol: used by a mapping, resting after one, forwarded, and in the pool altogether."""
    externals = int(settings["externals"])
    slots = externals * len(PROTOCOLS) * PORTS
    wanted = np.uint64(LIFE_STATE | LIFE_STATIC)
    life = (sessions["life"][:slots] & wanted).reshape(externals, len(PROTOCOLS), PORTS)
    return {
        name: {
            "used": int((life[:, number] == LIFE_LIVE).sum()),
            "resting": int((life[:, number] == LIFE_RESTING).sum()),
            "forwarded": int((life[:, number] & LIFE_STATIC != 0).sum()),
            "available": int(settings["pool"][number]["count"].sum()) * externals,
        }
        for number, name in enumerate(PROTOCOLS)
    }
