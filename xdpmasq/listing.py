"""Sessions as text, for people and as JSON: a million of them, many at a time.

Every address is turned into text once, and rows are formatted by one ``%`` each.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np

from xdpmasq.abi import PORTS
from xdpmasq.sessions import ALL_STATES, ICMP, PROTOCOLS, TRAFFIC, Array, Endpoints, Table

_CHUNK = 65536  # rows formatted at a time, which bounds memory
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
        np.array(ALL_STATES, object)[table.state].tolist(),
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
    return np.array([form % port for port in range(PORTS)], object)


def _joined(endpoints: Endpoints, portless: Array | None) -> list[str]:
    six = endpoints.addr.shape[1] > 1
    ports = _port_texts("]:%d" if six else ":%d")[endpoints.port]
    if portless is not None:
        ports[portless] = "]" if six else ""
    texts = addresses(endpoints) + ports
    return list(("[" + texts if six else texts).tolist())
