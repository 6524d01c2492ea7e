"""Which ALGs read what: names, servers' ports and internal prefixes, in the configuration and in the kernel's table.

The table is the only truth while the datapath is there, so ALGs are switched with the agent dead, too.
"""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import numpy as np

from xdpmasq import bpf, datapath, expiry
from xdpmasq.alg import registry
from xdpmasq.datapath import CLASSES, Tables
from xdpmasq.errors import ConfigError, UsageError

EVERYBODY = IPv4Network("0.0.0.0/0")
ALG_ANY = 32  # bits of ``struct alg_key`` before the address
PORTS_MOST = 16  # of one ALG


@dataclass(frozen=True, order=True)
class Use:
    """An ALG that is on.

    Attributes:
        ports: the servers', with their protocols.
        internal: the hosts whose sessions it reads; a session belongs to one of them whoever opened it.
    """

    name: str
    ports: tuple[tuple[str, int], ...]
    internal: tuple[IPv4Network, ...] = (EVERYBODY,)

    @classmethod
    def parse(cls, name: str, ports: Sequence[str] = (), internal: Sequence[str] = ()) -> Use:
        """As users write it: ports as "tcp 21"; none: the ALG's own.

        Raises:
            UsageError: there is no such ALG, port or prefix.
        """
        try:
            own = registry.find(name).ports
            given = [_port(each) for each in ports] or [(each, port) for each in own for port in own[each]]
            by_protocol = {each: [port for protocol, port in given if protocol == each] for each, _ in given}
            registry.by_port({name: by_protocol})
            prefixes = [_prefix(each) for each in internal] or [EVERYBODY]
        except ConfigError as error:
            raise UsageError(error.what, error.why, error.do) from error
        if len(given) > PORTS_MOST:
            raise UsageError(f"{len(given)} ports for the ALG {name}", "", f"there is room for {PORTS_MOST}")
        return cls(name, tuple(sorted(set(given))), tuple(sorted(set(prefixes))))

    def as_fields(self) -> dict[str, Any]:
        """For :meth:`parse`, and for scripts."""
        ports = [f"{protocol} {port}" for protocol, port in self.ports]
        internal = [str(each) for each in self.internal if each != EVERYBODY]
        return {"name": self.name, "ports": ports, "internal": internal}


def default() -> tuple[Use, ...]:
    """FTP: nothing else is on unless somebody wants it (RFC 4787 REQ-10, and slipstreaming)."""
    return (Use.parse("ftp"),)


def check(uses: Iterable[Use]) -> None:
    """Raises UsageError: two read the same sessions."""
    readers: dict[tuple[str, int], str] = {}
    for use in uses:
        for place in use.ports:
            other = readers.setdefault(place, use.name)
            if other != use.name:
                protocol, port = place
                what = f"the ALGs {other} and {use.name} both read {protocol} port {port}"
                raise UsageError(what, "", "disable one of them, or give one other ports")


def read(tables: Tables) -> tuple[Use, ...]:
    """Those that are on."""
    ports: defaultdict[str, set[tuple[str, int]]] = defaultdict(set)
    prefixes: defaultdict[str, set[IPv4Network]] = defaultdict(set)
    table = tables.maps["algs"]
    for keys, values in table.items(chunk=table.max_entries):
        for key, value in zip(keys, values, strict=True):
            if value["passing"]:
                continue
            name = value["name"].tobytes().rstrip(b"\0").decode()
            ports[name].add((CLASSES[int(key["class"])], socket.ntohs(int(key["port"]))))
            address = IPv4Address(key["addr"]["word"][:1].tobytes())
            prefixes[name].add(IPv4Network((address, int(key["bits"]) - ALG_ANY)))
    return tuple(Use(name, tuple(sorted(ports[name])), tuple(sorted(prefixes[name]))) for name in sorted(ports))


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


def follow(tables: Tables, name: str, host: IPv4Address, port: int, ticks: int) -> None:
    """Has an ALG read sessions of a host with another TCP port, for so many jiffies."""
    (key,) = _keys(Use(name, (("tcp", port),), (IPv4Network(host),)))
    if (there := tables.maps["algs"].get(key)) is None or there["passing"]:
        tables.maps["algs"].set(key, _record(tables, name, (bpf.jiffies() + ticks) % 2**32))


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
            datapath.addr(network.network_address),
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


def _port(text: str) -> tuple[str, int]:
    protocol, _, number = text.replace(":", " ").strip().partition(" ")
    if protocol not in ("tcp", "udp") or not number.strip().isdigit():
        raise ConfigError(f"no port: {text}", 'write it as "tcp 21"')
    return protocol, int(number)


def _prefix(text: str) -> IPv4Network:
    try:
        return IPv4Network(text)
    except ValueError as error:
        raise ConfigError(f"no prefix: {text}", str(error), "write it as 192.168.0.0/24") from error
