"""From the raw session table to rows for people and scripts: who talks to whom, as whom, since when.

Everything works on whole columns, since a table may hold a million sessions: numpy decides and
selects, every address is turned into text once, and rows are formatted by one ``%`` each. Nothing here
talks to the kernel: the arrays come from :mod:`xdpmasq.datapath` and may change while they are read.
"""

from __future__ import annotations

import functools
import re
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

import numpy as np
import numpy.typing as npt

from xdpmasq.errors import UsageError

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
_ALL_STATES = (*STATES, *BESIDE)
_STATE = {name: number for number, name in enumerate(_ALL_STATES)}

_PORTS = 65536
_LIFE_STATE, _LIFE_LIVE, _LIFE_RESTING, _LIFE_SESSION, _LIFE_STATIC = 3, 1, 2, 4, 8
_FIN, _SYN, _RST, _ACK = 0x01, 0x02, 0x04, 0x10
_CHUNK = 65536  # rows formatted at a time, which bounds memory


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
    protocol = (rows["mapping"] // _PORTS % len(PROTOCOLS)).astype(np.uint8)
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
    wanted = np.uint64(_LIFE_STATE | _LIFE_SESSION)
    return np.asarray(life & wanted == np.uint64(_LIFE_LIVE | _LIFE_SESSION))


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
    slots = externals * len(PROTOCOLS) * _PORTS
    wanted = np.uint64(_LIFE_STATE | _LIFE_STATIC)
    life = (sessions["life"][:slots] & wanted).reshape(externals, len(PROTOCOLS), _PORTS)
    return {
        name: {
            "used": int((life[:, number] == _LIFE_LIVE).sum()),
            "resting": int((life[:, number] == _LIFE_RESTING).sum()),
            "forwarded": int((life[:, number] & _LIFE_STATIC != 0).sum()),
            "available": int(settings["pool"][number]["count"].sum()) * externals,
        }
        for number, name in enumerate(PROTOCOLS)
    }


# --- selecting -------------------------------------------------------------------------------------

# ADDR, ADDR/BITS, [ADDR6/BITS], each also with :PORT, or :PORT alone
_ENDPOINT = re.compile(r"(?:\[(?P<bracketed>[^\]]+)\]|(?P<plain>[^:\[\]]*))(?::(?P<port>\d{1,5}))?")


@dataclass(frozen=True)
class Endpoint:
    """What an endpoint must be; None is anything."""

    prefix: IPv4Network | IPv6Network | None = None
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """From ``192.168.0.2``, ``192.168.0.0/24``, ``192.168.0.2:5000`` or ``:5000``; empty is anything.

        Raises:
            UsageError: it is none of these.
        """
        do = "give ADDR, ADDR/BITS, ADDR:PORT or :PORT, as in 192.168.0.2:5000"
        match = _ENDPOINT.fullmatch(text)
        if not match:
            raise UsageError(f"{text} is not an endpoint", "", do)
        address = match["bracketed"] or match["plain"]
        port = int(match["port"]) if match["port"] else None
        if port is not None and port >= _PORTS:
            raise UsageError(f"{text} is not an endpoint", f"ports end at {_PORTS - 1}", do)
        try:
            return cls(ip_network(address) if address else None, port)
        except ValueError as error:
            raise UsageError(f"{text} is not an endpoint", str(error), do) from error

    def mask(self, endpoints: Endpoints) -> Array:
        """Which rows fit."""
        fits = np.ones(len(endpoints.port), bool)
        if self.prefix:
            bits = np.frombuffer(self.prefix.netmask.packed, np.uint32)
            network = np.frombuffer(self.prefix.network_address.packed, np.uint32)
            if len(bits) != endpoints.addr.shape[1]:
                return np.zeros_like(fits)
            fits &= (endpoints.addr & bits == network).all(axis=1)
        return fits if self.port is None else fits & (endpoints.port == self.port)


@dataclass(frozen=True)
class Selection:
    """Which sessions are meant; empty fields are anything."""

    protocol: str = ""
    state: str = ""
    internal: Endpoint = field(default_factory=Endpoint)
    external: Endpoint = field(default_factory=Endpoint)
    remote: Endpoint = field(default_factory=Endpoint)

    @classmethod
    def parse(
        cls, protocol: str = "", internal: str = "", external: str = "", remote: str = "", state: str = ""
    ) -> Selection:
        """From the words of a command line, in any case.

        Raises:
            UsageError: a word is none of those allowed.
        """
        return cls(
            protocol=_word("protocol", protocol.lower(), PROTOCOLS),
            state=_word("state", state.upper().replace("-", "_"), _ALL_STATES),
            internal=Endpoint.parse(internal),
            external=Endpoint.parse(external),
            remote=Endpoint.parse(remote),
        )

    @property
    def is_everything(self) -> bool:
        return self == Selection()

    def __call__(self, table: Table) -> Table:
        """The rows that fit."""
        fits = self.mask(table)
        return table if fits.all() else table[fits]

    def mask(self, table: Table) -> Array:
        """Which rows fit."""
        fits = np.ones(len(table), bool)
        if self.protocol:
            fits &= table.protocol == PROTOCOLS.index(self.protocol)
        if self.state:
            fits &= table.state == _STATE[self.state]
        for name in ("internal", "external", "remote"):
            wanted: Endpoint = getattr(self, name)
            if wanted != Endpoint():
                fits &= wanted.mask(getattr(table, name))
        return fits


def _word(what: str, word: str, allowed: tuple[str, ...]) -> str:
    if word and word not in allowed:
        raise UsageError(f"there is no {what} {word}", "", f"give one of {', '.join(allowed)}")
    return word


# --- showing ---------------------------------------------------------------------------------------

_NUMBERS = "%11s %13s %11s %13s %7s %7s"
_HEADINGS = ("OUT-PACKETS", "OUT-BYTES", "IN-PACKETS", "IN-BYTES", "IDLE", "LEFT")
_JSON = (
    '{"protocol": "%s", "state": "%s", "internal": {"address": "%s", "port": %d}, '
    '"external": {"address": "%s", "port": %d}, "remote": {"address": "%s", "port": %s}, '
    '"out": {"packets": %d, "bytes": %d}, "in": {"packets": %d, "bytes": %d}, '
    '"idle_s": %.1f, "remaining_s": %.1f}'
)


def _row(table: Table) -> str:
    width = 21 if table.internal.addr.shape[1] == 1 else 47
    return f"%-5s %-11s %-{width}s %-{width}s %-{width}s {_NUMBERS}"


def heading(table: Table) -> str:
    """The line above :func:`lines`."""
    return _row(table) % ("PROTO", "STATE", "INTERNAL", "EXTERNAL", "REMOTE", *_HEADINGS)


def lines(table: Table) -> Iterator[list[str]]:
    """A line of fixed width for each session, many at a time. Times are whole seconds.

    The port of ICMP queries is their identifier; the remote of one has none.
    """
    form = _row(table)
    for part in _parts(table):
        yield list(map(form.__mod__, zip(*_text_columns(part), strict=True)))


def json_objects(table: Table) -> Iterator[list[str]]:
    """A JSON object (as text) for each session, many at a time."""
    for part in _parts(table):
        yield list(map(_JSON.__mod__, zip(*_json_columns(part), strict=True)))


def _parts(table: Table) -> Iterator[Table]:
    for start in range(0, len(table), _CHUNK):
        yield table[start : start + _CHUNK]


def ends(table: Table) -> list[list[str]]:
    """Protocol, state, internal, external and remote endpoint, as columns of text."""
    return [
        *_words(table),
        *(_joined(each, None) for each in (table.internal, table.external)),
        _joined(table.remote, table.protocol == ICMP),
    ]


def _text_columns(table: Table) -> list[list[Any]]:
    return [
        *ends(table),
        *_traffic(table),
        table.idle_s.astype(np.int64).tolist(),
        table.remaining_s.astype(np.int64).tolist(),
    ]


def _json_columns(table: Table) -> list[list[Any]]:
    ports = _port_texts("%d")[table.remote.port]
    ports[table.protocol == ICMP] = "null"
    return [
        *_words(table),
        *(addresses(table.internal).tolist(), table.internal.port.tolist()),
        *(addresses(table.external).tolist(), table.external.port.tolist()),
        *(addresses(table.remote).tolist(), ports.tolist()),
        *_traffic(table),
        table.idle_s.tolist(),
        table.remaining_s.tolist(),
    ]


def _words(table: Table) -> tuple[list[str], list[str]]:
    return (
        np.array(PROTOCOLS, object)[table.protocol].tolist(),
        np.array(_ALL_STATES, object)[table.state].tolist(),
    )


def _traffic(table: Table) -> Iterator[list[int]]:
    for name in TRAFFIC:
        yield getattr(table, name).tolist()


def addresses(endpoints: Endpoints) -> Array:
    """Each address as text; every different one is written once."""
    words = endpoints.addr.shape[1]
    family = socket.AF_INET if words == 1 else socket.AF_INET6
    records = np.ascontiguousarray(endpoints.addr).view("u4" if words == 1 else "u4,u4,u4,u4").ravel()
    different, which = np.unique(records, return_inverse=True)
    return np.array([socket.inet_ntop(family, each.tobytes()) for each in different], object)[which]


@functools.cache
def _port_texts(form: str) -> Array:
    return np.array([form % port for port in range(_PORTS)], object)


def _joined(endpoints: Endpoints, portless: Array | None) -> list[str]:
    six = endpoints.addr.shape[1] > 1
    ports = _port_texts("]:%d" if six else ":%d")[endpoints.port]
    if portless is not None:
        ports[portless] = "]" if six else ""
    texts = addresses(endpoints) + ports
    return list(("[" + texts if six else texts).tolist())
