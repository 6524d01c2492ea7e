"""External addresses in words: pools, who gets which, addresses of one's own (1:1), destinations that need none.

Everything here is written and read as text, the same in the configuration and on the way to an agent::

    addresses   203.0.113.1   203.0.113.4-203.0.113.7
    choices     192.168.1.0/24 as 203.0.113.5   192.168.2.0/24 as 203.0.113.6, 203.0.113.7
    one_to_one  192.168.0.9 as 203.0.113.9      192.168.8.0/29 as 203.0.113.64/29
    exempt      10.8.0.0/16                     198.51.100.7 udp 500-4500
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, summarize_address_range
from typing import Self

from xdpmasq.errors import UsageError

ADDRESSES_MOST = 32  # each has 25 MB of tables
EXEMPT_PORTS = 4  # for one destination
PROTOCOLS = {"tcp": 6, "udp": 17}
PORT_LAST = 65535
_EVERYBODY = IPv4Network("0.0.0.0/0")
_ADDRESSES = "write 203.0.113.4, or 203.0.113.4-203.0.113.7"
_PREFIX = "write it as 192.168.1.0/24, or 192.168.1.9"


@dataclass(frozen=True)
class Choice:
    """Which external addresses the hosts of an internal prefix may have."""

    internal: IPv4Network
    addresses: tuple[IPv4Address, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``PREFIX as ADDRESS, ADDRESS-ADDRESS``."""
        internal, others = _halves(text, "192.168.1.0/24 as 203.0.113.5")
        addresses = tuple(address for each in others.split(",") for address in addresses_of(each.strip()))
        return cls(_network(internal), addresses)

    def __str__(self) -> str:
        return f"{self.internal} as {', '.join(map(str, self.addresses))}"


@dataclass(frozen=True)
class OneToOne:
    """A prefix whose hosts have external addresses of their own, in the same order (RFC 2663, basic NAT)."""

    internal: IPv4Network
    external: IPv4Network

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``PREFIX as PREFIX`` of one length.

        Raises:
            UsageError: it is not that.
        """
        internal, external = map(_network, _halves(text, "192.168.0.9 as 203.0.113.9"))
        if internal.prefixlen != external.prefixlen:
            why = f"{internal} has {internal.num_addresses} addresses, {external} has {external.num_addresses}"
            raise UsageError(f"{text} is not one to one", why, "name prefixes of one length")
        return cls(internal, external)

    def __str__(self) -> str:
        return f"{self.internal} as {self.external}"


@dataclass(frozen=True)
class Exempt:
    """A destination that internal hosts reach under their own addresses (a VPN); protocol None: with everything."""

    destination: IPv4Network
    protocol: str | None = None
    first: int = 0
    last: int = PORT_LAST

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``PREFIX``, ``PREFIX PROTOCOL`` or ``PREFIX PROTOCOL PORT[-PORT]``.

        Raises:
            UsageError: it is none of these.
        """
        do = "write it as 10.8.0.0/16, or as 198.51.100.7 udp 500-4500"
        prefix, *words = text.split()
        if len(words) > 2 or (words and words[0] not in PROTOCOLS):
            raise UsageError(f"{text} is no destination", "after the prefix come tcp or udp, and ports", do)
        first, _, last = (words[1] if len(words) > 1 else f"0-{PORT_LAST}").partition("-")
        if not (first.isdigit() and (last or first).isdigit() and int(first) <= int(last or first) <= PORT_LAST):
            raise UsageError(f"{text} is no destination", f"ports are 0 to {PORT_LAST}, the lower first", do)
        return cls(_network(prefix), words[0] if words else None, int(first), int(last or first))

    def __str__(self) -> str:
        ports = "" if (self.first, self.last) == (0, PORT_LAST) else f" {self.first}-{self.last}"
        return f"{self.destination}{f' {self.protocol}' if self.protocol else ''}{ports}"


@dataclass(frozen=True)
class Place:
    """One of the external addresses in the tables, and the number of the WAN that it belongs to."""

    address: IPv4Address | None
    wan: int


@dataclass(frozen=True)
class Externals:
    """As whom the internal hosts appear.

    Attributes:
        addresses: the pool, of each WAN those that belong to it; none: the WAN's first address, whatever it is at the
            moment.
        answer_arp: the gateway answers for those that no WAN has.
    """

    addresses: tuple[IPv4Address, ...] = ()
    choices: tuple[Choice, ...] = ()
    one_to_one: tuple[OneToOne, ...] = ()
    exempt: tuple[Exempt, ...] = ()
    answer_arp: bool = False

    @classmethod
    def parse(
        cls,
        addresses: Iterable[str] = (),
        choices: Iterable[str] = (),
        one_to_one: Iterable[str] = (),
        exempt: Iterable[str] = (),
        answer_arp: bool = False,
    ) -> Self:
        """From texts.

        Raises:
            UsageError: one of them is not understood.
        """
        return cls(
            tuple(address for each in addresses for address in addresses_of(each)),
            tuple(map(Choice.parse, choices)),
            tuple(map(OneToOne.parse, one_to_one)),
            tuple(map(Exempt.parse, exempt)),
            answer_arp,
        )

    def as_fields(self) -> dict[str, object]:
        """What :meth:`parse` takes, as JSON can carry it."""
        return {
            "addresses": [str(each) for each in self.addresses],
            "choices": [str(each) for each in self.choices],
            "one_to_one": [str(each) for each in self.one_to_one],
            "exempt": [str(each) for each in self.exempt],
            "answer_arp": self.answer_arp,
        }

    @property
    def shared(self) -> list[IPv4Address]:
        """Every address that is named to masquerade as, each once: the pool, then those of the choices."""
        return list(dict.fromkeys((*self.addresses, *(one for each in self.choices for one in each.addresses))))

    def room(self, wans: int = 1) -> int:
        """How many addresses to masquerade as there can be at once."""
        return len(self.shared) + wans - bool(self.addresses)

    def places(
        self, primaries: Sequence[IPv4Address | None], owners: Mapping[IPv4Network, int]
    ) -> tuple[list[Place], dict[tuple[int, IPv4Network], list[int]]]:
        """The addresses to masquerade as.

        Args:
            primaries: each WAN's first address.
            owners: the WAN of each :meth:`named` address.

        Returns:
            The addresses by index, one of each WAN first; and by WAN and internal prefix the indices of those that
            its hosts may have.
        """
        pools = [self._pool(wan, primary, owners) for wan, primary in enumerate(primaries)]
        places = [Place(pool[0], wan) for wan, pool in enumerate(pools)]
        firsts = {place.address for place in places}
        wan_of = {each: owners[IPv4Network(each)] for each in self.shared if IPv4Network(each) in owners}
        places += [Place(each, wan) for each, wan in wan_of.items() if each not in firsts]
        index = {place.address: nth for nth, place in reversed([*enumerate(places)])}
        chosen = {(wan, _EVERYBODY): [index[one] for one in pool if one] for wan, pool in enumerate(pools)}
        for each in self.choices:
            for one in each.addresses:
                if one in wan_of:
                    chosen.setdefault((wan_of[one], each.internal), []).append(index[one])
        places += [Place(None, 0)] * (self.room(len(primaries)) - len(places))
        return places, {key: some for key, some in chosen.items() if some}

    def _pool(
        self, wan: int, primary: IPv4Address | None, owners: Mapping[IPv4Network, int]
    ) -> Sequence[IPv4Address | None]:
        return [each for each in self.addresses if owners.get(IPv4Network(each)) == wan] or [primary]

    def named(self) -> list[IPv4Network]:
        """Every external address that is named, 1:1 ones included."""
        return [*map(IPv4Network, self.shared), *(each.external for each in self.one_to_one)]

    def contradictions(self) -> Iterator[tuple[str, object, str]]:
        """(key, value, why) of whatever cannot be."""
        if len(set(self.addresses)) < len(self.addresses):
            yield "addresses", [str(each) for each in self.addresses], "an address is named twice"
        if self.room() > ADDRESSES_MOST:
            yield "addresses", self.room(), f"at most {ADDRESSES_MOST} addresses fit, choices included"
        yield from _overlaps("choices", [(each, each.internal) for each in self.choices])
        yield from _overlaps("one_to_one", [(each, each.internal) for each in self.one_to_one])
        yield from _overlaps("one_to_one", [(each, each.external) for each in self.one_to_one])
        for each in self.one_to_one:
            for address in self.shared:
                if address in each.external:
                    yield "one_to_one", str(each), f"{address} is shared by others (addresses, choices)"
        for exempt in self.exempt:
            if exempt.destination.prefixlen == 0 and not exempt.protocol:
                yield "exempt", str(exempt), "then nothing would be translated"
            same = [other for other in self.exempt if other.destination == exempt.destination]
            if len(same) > EXEMPT_PORTS:
                yield "exempt", str(exempt), f"for one destination there is room for {EXEMPT_PORTS} ranges of ports"


def _overlaps(key: str, entries: Sequence[tuple[object, IPv4Network]]) -> Iterator[tuple[str, object, str]]:
    for nth, (each, network) in enumerate(entries):
        for other, before in entries[:nth]:
            if network == before or (key == "one_to_one" and network.overlaps(before)):
                yield key, str(each), f"it contradicts {other}"


def addresses_of(text: str) -> list[IPv4Address]:
    """From ``ADDRESS`` or ``ADDRESS-ADDRESS``.

    Raises:
        UsageError: it is neither, or names more than there is room for.
    """
    first, _, last = text.partition("-")
    try:
        start, end = IPv4Address(first.strip()), IPv4Address((last or first).strip())
    except ValueError as error:
        raise UsageError(
            f"{text} is no IPv4 address", str(error), "write 203.0.113.4, or 203.0.113.4-203.0.113.7"
        ) from error
    if end < start or int(end) - int(start) >= ADDRESSES_MOST:
        why = "the lower address comes first" if end < start else f"there is room for {ADDRESSES_MOST}"
        raise UsageError(f"{text} is no range of addresses", why)
    return [address for part in summarize_address_range(start, end) for address in part]


def _halves(text: str, example: str) -> tuple[str, str]:
    internal, word, external = text.partition(" as ")
    if not word:
        raise UsageError(f"{text} does not say as whom", "", f'write it as "{example}"')
    return internal.strip(), external.strip()


def _network(text: str) -> IPv4Network:
    try:
        return IPv4Network(text)
    except ValueError as error:
        raise UsageError(
            f"{text} is no IPv4 prefix", str(error), "write it as 192.168.1.0/24, or 192.168.1.9"
        ) from error
