"""IPFIX messages (RFC 7011) about NAT events (RFC 8158): bytes only, no sockets and no clocks."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from xdpmasq.records import BLOCK, CLOSED, MAPPING, OPENED, REFUSED, Record

VERSION = 10
DOMAIN = 1  # observation domain: one NAT instance
LEAST = 512  # bytes that any path takes (RFC 7011 section 10.3.3)

_PROTOCOLS = {"tcp": 6, "udp": 17, "icmp": 1}
# natEvent by what is recorded (RFC 8158 section 5.2)
_EVENTS = {
    **{("session", OPENED): 4, ("session", CLOSED): 5, (MAPPING, OPENED): 8, (MAPPING, CLOSED): 9},
    **{(BLOCK, OPENED): 16, (BLOCK, CLOSED): 17},
}
_EXHAUSTED, _QUOTA = 3, 13
_QUOTA_SESSIONS, _QUOTA_USER = 1, 3  # natQuotaExceededEvent

# Information elements (IANA): number and bytes.
_TIME, _EVENT = (323, 8), (230, 1)  # observationTimeMilliseconds, natEvent
_BINDING = (
    *(_TIME, _EVENT, (8, 4), (225, 4)),  # sourceIPv4Address, postNATSourceIPv4Address
    *((4, 1), (7, 2), (227, 2)),  # protocolIdentifier, sourceTransportPort, postNAPTSourceTransportPort
)
# destinationIPv4Address and destinationTransportPort, and both after the NAT, which leaves them as they are
_REMOTE = ((12, 4), (226, 4), (11, 2), (228, 2))
_TEMPLATES = {
    256: _BINDING,
    257: (*_BINDING, *_REMOTE),
    258: (_TIME, _EVENT, (466, 4), (473, 4), (8, 4)),  # natQuotaExceededEvent, maxEntriesPerUser
    259: (_TIME, _EVENT, (466, 4), (471, 4)),  # maxSessionEntries
    260: (_TIME, _EVENT, (283, 4)),  # natPoolId
    # portRangeStart, portRangeEnd, portRangeStepSize, portRangeNumPorts
    261: (_TIME, _EVENT, (8, 4), (225, 4), (361, 2), (362, 2), (363, 2), (364, 2)),
}
_FORMS = {
    number: struct.Struct("!" + "".join({8: "Q", 4: "I", 2: "H", 1: "B"}[size] for _, size in fields))
    for number, fields in _TEMPLATES.items()
}
_HEADER, _SET = struct.Struct("!HHIII"), struct.Struct("!HH")


def templates() -> bytes:
    """The set of all templates."""
    texts = b"".join(
        _SET.pack(number, len(fields)) + b"".join(_SET.pack(*field) for field in fields)
        for number, fields in _TEMPLATES.items()
    )
    return _SET.pack(2, _SET.size + len(texts)) + texts


def encode(record: Record) -> tuple[int, bytes] | None:
    """The number of its template and a data record; None: there is no such NAT event."""
    start = (max(0, round(record.at * 1000)),)
    if record.event == REFUSED:
        return _refused(record, start)
    event = _EVENTS.get((record.kind, record.event))
    if event is None or record.external is None:
        return None
    (inside, inside_port), (outside, outside_port) = record.internal, record.external
    if record.kind == BLOCK:
        ports = (outside_port, record.last, 1, record.last - outside_port + 1)
        return 261, _FORMS[261].pack(*start, event, int(inside), int(outside), *ports)
    fields = (*start, event, int(inside), int(outside), _PROTOCOLS[record.protocol], inside_port, outside_port)
    if record.remote is None:
        return 256, _FORMS[256].pack(*fields)
    remote, port = record.remote
    return 257, _FORMS[257].pack(*fields, int(remote), int(remote), port, port)


def _refused(record: Record, start: tuple[int]) -> tuple[int, bytes] | None:
    match record.why:
        case "host_limit":
            fields = (_QUOTA, _QUOTA_USER, record.limit, int(record.internal[0]))
            return 258, _FORMS[258].pack(*start, *fields)
        case "sessions_full":
            return 259, _FORMS[259].pack(*start, _QUOTA, _QUOTA_SESSIONS, record.limit)
        case "ports_exhausted" | "no_external":
            return 260, _FORMS[260].pack(*start, _EXHAUSTED, record.wan)
    return None


def message(sets: bytes, at: float, sequence: int) -> bytes:
    """Sets with the header before them; ``sequence`` counts the data records sent before."""
    return _HEADER.pack(VERSION, _HEADER.size + len(sets), int(at), sequence % 2**32, DOMAIN) + sets


def data_sets(records: Sequence[tuple[int, bytes]], most: int) -> Iterator[tuple[bytes, int]]:
    """Data sets, and how many records are in them, of which each with a header is no longer than ``most`` bytes."""
    room, sets, count, number, body = most - _HEADER.size, b"", 0, 0, b""
    for template, record in records:
        more = len(record) + (_SET.size if template != number else 0)
        if count and len(sets) + len(body) + (_SET.size if body else 0) + more > room:
            yield sets + _closed(number, body), count
            sets, count, number, body = b"", 0, 0, b""
        if template != number:
            sets, number, body = sets + _closed(number, body), template, b""
        body += record
        count += 1
    if count:
        yield sets + _closed(number, body), count


def _closed(template: int, body: bytes) -> bytes:
    return _SET.pack(template, _SET.size + len(body)) + body if body else b""
