"""Which ALGs are on, in the kernel's table: the only truth while the datapath is there, with and without an agent."""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import numpy as np

from xdpmasq import abi, bpf, expiry
from xdpmasq.abi import CLASSES
from xdpmasq.algs import Use, check
from xdpmasq.tables import Tables

ALG_ANY = 32  # bits of ``struct alg_key`` before the address


def read(tables: Tables) -> tuple[Use, ...]:
    """Those that are on."""
    ports: defaultdict[str, set[tuple[str, int]]] = defaultdict(set)
    prefixes: defaultdict[str, set[IPv4Network]] = defaultdict(set)
    table = tables.maps["algs"]
    for keys, values in table.items(chunk=table.max_entries):
        for key, value in zip(keys, values, strict=True):
            if value["passing"]:
                continue
            name = name_of(value)
            ports[name].add((CLASSES[int(key["class"])], socket.ntohs(int(key["port"]))))
            address = IPv4Address(key["addr"]["word"][:1].tobytes())
            prefixes[name].add(IPv4Network((address, int(key["bits"]) - ALG_ANY)))
    return tuple(Use(name, tuple(sorted(ports[name])), tuple(sorted(prefixes[name]))) for name in sorted(ports))


def names(tables: Tables) -> set[str]:
    """Of those that read something."""
    table = tables.maps["algs"]
    found = {bytes(name) for _, values in table.items(chunk=table.max_entries) for name in values["name"]}
    return {name.rstrip(b"\0").decode() for name in found}


def name_of(record: Any) -> str:
    """Of ``struct alg``."""
    name: str = record["name"].tobytes().rstrip(b"\0").decode()
    return name


def put(tables: Tables, use: Use) -> None:
    """Switches an ALG on, in place of what it had; for sessions that are opened from now on.

    Raises:
        UsageError: another one reads the same sessions.
    """
    others = [each for each in read(tables) if each.name != use.name]
    check([*others, use])
    for key in {*_keys(use)}:
        tables.maps["algs"].set(key, _record(tables, use.name))
    for mine in read(tables):
        if mine.name == use.name:
            _delete(tables, {*_keys(mine)} - {*_keys(use)})
    _count(tables)


def take(tables: Tables, name: str) -> bool:
    """Switches an ALG off; sessions that it reads go on, unread. False: it was not on."""
    mine = [each for each in read(tables) if each.name == name]
    for use in mine:
        _delete(tables, _keys(use))
    _count(tables)
    return bool(mine)


def replace(tables: Tables, wanted: Iterable[Use]) -> None:
    """Switches these on, and all others off."""
    for use in read(tables):
        take(tables, use.name)
    for use in wanted:
        put(tables, use)


def follow(tables: Tables, name: str, host: IPv4Address, port: int, ticks: int) -> None:
    """Has an ALG read sessions of a host with another TCP port, for so many jiffies."""
    (key,) = _keys(Use(name, (("tcp", port),), (IPv4Network(host),)))
    if (there := tables.maps["algs"].get(key)) is None or there["passing"]:
        tables.maps["algs"].set(key, _record(tables, name, (bpf.jiffies() + ticks) % 2**32))


def is_followed(tables: Tables, host: IPv4Address, port: int) -> bool:
    (key,) = _keys(Use("", (("tcp", port),), (IPv4Network(host),)))
    there = tables.maps["algs"].get(key)
    return there is not None and bool(there["passing"])


def forget(tables: Tables) -> None:
    """Ends what :func:`follow` began, when its time is over."""
    table, now = tables.maps["algs"], bpf.jiffies()
    for keys, values in table.items(chunk=table.max_entries):
        for key in keys[(values["passing"] != 0) & (expiry.age(now, values["expires"]) > 0)]:
            table.delete(key)


def _record(tables: Tables, name: str, expires: int | None = None) -> Any:
    record = np.zeros((), tables.maps["algs"].value)
    record["name"] = np.frombuffer(name.encode().ljust(record["name"].nbytes, b"\0"), record["name"].dtype)
    record["passing"], record["expires"] = expires is not None, expires or 0
    return record


def _keys(use: Use) -> list[tuple[Any, ...]]:
    return [
        (
            ALG_ANY + network.prefixlen,
            CLASSES.index(protocol),
            socket.htons(port),
            abi.addr(network.network_address),
        )
        for protocol, port in use.ports
        for network in use.internal
    ]


def _delete(tables: Tables, keys: Iterable[tuple[Any, ...]]) -> None:
    for key in keys:
        tables.maps["algs"].delete(key)


def _count(tables: Tables) -> None:
    """How many there are, for the programs: with none nothing is looked for."""
    tables.maps["alg_count"].set(0, len(read(tables)), bpf.UPDATE_ANY)
