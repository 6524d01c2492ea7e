"""Which sessions are meant, by the words of a command line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_network

import numpy as np

from xdpmasq.abi import PORTS
from xdpmasq.errors import UsageError
from xdpmasq.sessions import ALL_STATES, PROTOCOLS, Array, Endpoints, Table

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
        if port is not None and port >= PORTS:
            raise UsageError(f"{text} is not an endpoint", f"ports end at {PORTS - 1}", do)
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
            state=_word("state", state.upper().replace("-", "_"), ALL_STATES),
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
            fits &= table.state == ALL_STATES.index(self.state)
        for name in ("internal", "external", "remote"):
            wanted: Endpoint = getattr(self, name)
            if wanted != Endpoint():
                fits &= wanted.mask(getattr(table, name))
        return fits


def _word(what: str, word: str, allowed: tuple[str, ...]) -> str:
    if word and word not in allowed:
        raise UsageError(f"there is no {what} {word}", "", f"give one of {', '.join(allowed)}")
    return word
