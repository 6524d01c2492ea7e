"""Which ALGs read what: names, servers' ports and internal prefixes, as users write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import Any

from xdpmasq.alg import registry
from xdpmasq.errors import ConfigError, UsageError

EVERYBODY = IPv4Network("0.0.0.0/0")
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
    return (Use("ftp", (("tcp", 21),)),)


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
