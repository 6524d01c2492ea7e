"""Calls of PPTP (RFC 2637): GRE packets have the receiver's number of a call, so two hosts may choose the same.

Outside, a host's call has another number where its own is taken. The kernel's table ``calls`` leads from there to the
host, and ``callers`` says which hosts may send GRE to a remote beside others.
"""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Any

import numpy as np

from xdpmasq import abi, bpf, expiry
from xdpmasq.alg.api import Refused
from xdpmasq.tables import Tables

NUMBERS = 65536
TRIES = 64


def open_(tables: Tables, external: int, host: IPv4Address, call: int, remote: IPv4Address) -> int:
    """A host's call with a remote; returns its number outside, the same again for the same call.

    Args:
        external: index of the address that the remote knows.

    Raises:
        Refused: there is no room.
    """
    if (known := outside(tables, external, host, call, remote)) is not None:
        return known
    record = np.zeros((), tables.maps["calls"].value)
    record["internal"]["word"][0] = abi.addr(host)[0][0]
    record["call"], record["last_seen"] = socket.htons(call), bpf.jiffies()
    for number in (call, *random.SystemRandom().sample(range(1, NUMBERS), TRIES)):
        try:
            key = (abi.addr(remote), socket.htons(number), external)
            tables.maps["calls"].set(key, record, bpf.UPDATE_NOEXIST)
            tables.maps["callers"].set((abi.addr(remote), abi.addr(host)), bpf.jiffies())
        except FileExistsError:
            continue
        except OSError as error:
            raise Refused("the table of calls is full" if error.errno == errno.E2BIG else str(error)) from error
        return number
    raise Refused("no number is left for the call")


def count(tables: Tables, host: IPv4Address) -> int:
    """How many a host has."""
    table, (word,) = tables.maps["calls"], abi.addr(host)[0]
    return sum(
        int((values["internal"]["word"][:, 0] == word).sum()) for _, values in table.items(chunk=table.max_entries)
    )


def outside(tables: Tables, external: int, host: IPv4Address, call: int, remote: IPv4Address) -> int | None:
    """The number that a host's call has outside."""
    return next((number for there, number in _of(tables, host, call) if there == (remote, external)), None)


def inside(tables: Tables, external: int, host: IPv4Address, number: int, remote: IPv4Address) -> int | None:
    """The number of a host's call that has this one outside."""
    record = tables.maps["calls"].get((abi.addr(remote), socket.htons(number), external))
    if record is None or IPv4Address(record["internal"]["word"][:1].tobytes()) != host:
        return None
    return socket.ntohs(int(record["call"]))


def forget(tables: Tables, ticks: int) -> None:
    """Ends what has been silent for so many jiffies."""
    for name in ("calls", "callers"):
        table = tables.maps[name]
        for keys, values in table.items(chunk=table.max_entries):
            stamps = values["last_seen"] if values.dtype.names else values
            for key in keys[expiry.age(bpf.jiffies(), stamps.astype(np.uint32)) > ticks]:
                table.delete(key)


def _of(tables: Tables, host: IPv4Address, call: int) -> Iterator[tuple[tuple[IPv4Address, int], int]]:
    """Of a host's call remote and external address, and the number there."""
    table, (word,) = tables.maps["calls"], abi.addr(host)[0]
    for keys, values in table.items(chunk=table.max_entries):
        own = (values["internal"]["word"][:, 0] == word) & (values["call"] == socket.htons(call))
        for key in keys[own]:
            yield (_address(key["remote"]), int(key["external"])), socket.ntohs(int(key["call"]))


def _address(field: Any) -> IPv4Address:
    return IPv4Address(field["word"][:1].tobytes())
