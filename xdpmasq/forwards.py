"""Forwards (static mappings): what a rule says, how it is written, and which rules contradict each other.

Words and numbers only; :mod:`xdpmasq.forwarding` has the kernel's tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, ip_address
from typing import Any, ClassVar

from xdpmasq.errors import ForwardError, UsageError

PROTOCOLS = ("tcp", "udp")  # by class, as in enum proto_class
DEFAULT = "default"
RULES_MOST, TARGETS_MOST, WEIGHT_MOST = 1024, 8, 1000  # FORWARDS and TARGETS of bpf/types.h
_PORT_LAST = 65535
_SHOWN = 5


@dataclass(frozen=True)
class Target:
    """An internal endpoint.

    Attributes:
        port: stands for the rule's first port; 0 of the default host.
        weight: its share of new sessions, beside the other targets' weights.
    """

    address: IPv4Address
    port: int
    weight: int = 1


@dataclass(frozen=True)
class Lease:
    """That an internal host has asked for a rule (PCP, NAT-PMP), and until when has it.

    Attributes:
        nonce: who may renew and end it, 12 bytes; zero of NAT-PMP, which has none.
        external: index of the only external address that the rule is on.
    """

    nonce: bytes
    external: int


@dataclass(frozen=True)
class Rule:
    """External ports and the internal endpoints to which they lead.

    Attributes:
        kind: the command that makes such rules.
        first, last: external ports; 0 and 65535 of the default host, which gets what nothing else takes.
        source: the remotes that it is for; None: all.
        lease: None: the user's own.
    """

    kind: ClassVar[str] = "forward"

    protocol: str
    first: int
    last: int
    targets: tuple[Target, ...]
    source: IPv4Network | None = None
    lease: Lease | None = None

    @property
    def is_default(self) -> bool:
        return self.first == 0

    @property
    def is_reversible(self) -> bool:
        """What the target sends from its port can use the forwarded one: there is but one of each."""
        return len(self.targets) == 1 and not self.is_default and (not self.source or self.lease is not None)

    @property
    def ports(self) -> str:
        return DEFAULT if self.is_default else range_of(self.first, self.last)

    @property
    def name(self) -> str:
        """What tells it from all others of its kind, as `del` wants it."""
        return f"{self.protocol} {self.ports}" + (f" --from {self.source}" if self.source else "")

    @property
    def to(self) -> tuple[str, ...]:
        """Its targets, as `forward add` takes them."""
        return tuple(map(self._target, self.targets))

    def _target(self, target: Target) -> str:
        ports = "" if self.is_default else f":{range_of(target.port, target.port + self.last - self.first)}"
        return f"{target.address}{ports}" + (f"*{target.weight}" if target.weight != 1 else "")

    def __str__(self) -> str:
        return f"{self.protocol} {self.ports} → {' '.join(self.to)}" + (f" from {self.source}" if self.source else "")

    def contradicts(self, other: Rule) -> bool:
        """Both claim a port for the same remotes. A more specific source wins over a wider one, and ports over the
        default host, so those are no contradiction; but a leased port is one host's for all remotes.
        """
        return self._claims(other) == other._claims(self) and self.first <= other.last and other.first <= self.last

    @property
    def from_inside(self) -> bool:
        """It is about what internal hosts send."""
        return False

    def _claims(self, beside: Rule) -> tuple[Any, ...]:
        """Of two rules that have this in common, each port can be but one's."""
        source = None if self.lease or beside.lease else self.source
        return self.from_inside, self.protocol, source, self.is_default

    def shares(self, other: Rule) -> str:
        """What both claim, where they contradict."""
        return f"{self.protocol} {range_of(max(self.first, other.first), min(self.last, other.last))}"

    def as_fields(self) -> dict[str, Any]:
        """As :func:`parse` takes it and JSON can carry it."""
        return {
            "protocol": self.protocol,
            "ports": self.ports,
            "to": list(self.to),
            "source": str(self.source or ""),
        }


def range_of(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def port_prefixes(first: int, last: int) -> Iterator[tuple[int, int]]:
    """A range of ports as (port, leading bits) of the fewest aligned powers of two."""
    while first <= last:
        size = first & -first or 1 << 16
        while first + size - 1 > last:
            size //= 2
        yield first, 17 - size.bit_length()
        first += size


def contradiction(rule: Rule, others: Iterable[Rule]) -> ForwardError | None:
    """The error of a rule that cannot stand beside ``others``."""
    for other in others:
        if rule == other:
            return ForwardError(f"{rule} is there already", "", f"see `xdpmasq {rule.kind} list`")
        if rule.contradicts(other):
            why = f"{other} is there already" + ("" if rule.is_default else f", and has {rule.shares(other)}")
            return ForwardError(f"{rule} is not possible", why, f"xdpmasq {other.kind} del {other.name}")
    return None


def named_as(protocol: str, ports: str | int, source: str = "") -> Rule:
    """What `forward del` names: a forward without its targets."""
    return Rule(protocol_of(protocol), *_ports(ports), (), source_of(source))


def find(rules: Sequence[Rule], wanted: Rule) -> Rule:
    """The rule of the same name among those of a kind.

    Raises:
        ForwardError: there is none.
    """
    for rule in rules:
        if rule.name == wanted.name:
            return rule
    what = f"there is no {wanted.kind} {wanted.name}"
    if not rules:
        raise ForwardError(what, "there is none at all", f"see `xdpmasq {wanted.kind} list`")
    near = sorted(rules, key=lambda rule: (rule.protocol != wanted.protocol, _distance(rule, wanted)))[:_SHOWN]
    raise ForwardError(what, f"near it: {', '.join(rule.name for rule in near)}", "name one as it is listed")


def _distance(rule: Rule, wanted: Rule) -> int:
    return 0 if rule.is_default else max(0, rule.first - wanted.last, wanted.first - rule.last)


# --- reading words ---------------------------------------------------------------------------------

_TARGET = re.compile(r"(?P<address>[^:*]+)(?P<colon>:(?P<ports>[^*]*))?(?P<star>\*(?P<weight>.*))?")
_TARGET_FORMS = "give ADDR, ADDR:PORT or ADDR:FIRST-LAST, as 192.168.0.2:80"


def parse(protocol: str, ports: str | int, to: Sequence[str], source: str = "") -> Rule:
    """A rule from the words of a command line or a file.

    Args:
        ports: ``8080``, ``5000-5010``, or ``default`` for the default host.
        to: ``ADDR``, ``ADDR:PORT`` or ``ADDR:FIRST-LAST``, each with ``*WEIGHT``.
        source: a remote prefix; empty is anybody.

    Raises:
        UsageError: what is wrong, and what to write.
    """
    first, last = _ports(ports)
    name, prefix = protocol_of(protocol), source_of(source)
    if not to:
        raise UsageError("no target is given", "", "name one as 192.168.0.2:80")
    if len(to) > TARGETS_MOST:
        raise UsageError(f"{len(to)} targets are too many", f"a forward has at most {TARGETS_MOST}", "leave some out")
    targets = tuple(_target(text, first, last) for text in to)
    rule = Rule(name, first, last, targets, prefix)
    if rule.is_default and (len(to) > 1 or prefix or targets[0].weight != 1):
        why = "everything that nothing else takes goes to one host"
        raise UsageError("the default host is one address", why, f"write {name} {DEFAULT} {targets[0].address}")
    endpoints = [(each.address, each.port) for each in targets]
    if len(set(endpoints)) < len(endpoints):
        twice = next(each for each in endpoints if endpoints.count(each) > 1)
        raise UsageError(f"{twice[0]}:{twice[1]} is named twice", "", "give it a weight instead, as *2")
    return rule


def protocol_of(text: str, done: str = "forwarded") -> str:
    """A protocol's name, of what is to be ``done`` with it."""
    if text.lower() not in PROTOCOLS:
        raise UsageError(f"{text} cannot be {done}", "", "give tcp or udp")
    return text.lower()


def _ports(text: str | int) -> tuple[int, int]:
    if text == DEFAULT:
        return 0, _PORT_LAST
    return numbers(text, f"give a port as 8080, a range as 5000-5010, or {DEFAULT}")


def numbers(ports: str | int, do: str = "give a port as 8080, or a range as 5000-5010") -> tuple[int, int]:
    """First and last of a range of ports, or of one."""
    text = str(ports)
    match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
    if not match:
        raise UsageError(f"{text or 'nothing'} is no port", "", do)
    first, last = int(match[1]), int(match[2] or match[1])
    if not (first and last):
        raise UsageError(f"{text} is no port", "no host has a port 0", do)
    if max(first, last) > _PORT_LAST:
        raise UsageError(f"{text} is no port", f"ports end at {_PORT_LAST}", do)
    if first > last:
        raise UsageError(f"{text} runs backwards", "", f"write {last}-{first}")
    return first, last


def _target(text: str, first: int, last: int) -> Target:
    if "[" in text or text.count(":") > 1:
        why = "forwards are for IPv4; a host with a public IPv6 address needs none"
        raise UsageError(f"{text} is an IPv6 address", why, "name the host's IPv4 address")
    match = _TARGET.fullmatch(text)
    if not match:
        raise UsageError(f"{text or 'nothing'} is no target", "", _TARGET_FORMS)
    address = _address(match["address"])
    weight = _weight(text, match["weight"]) if match["star"] else 1
    if first == 0:
        if match["colon"]:
            raise UsageError(f"{text} has a port", "the default host gets every port as it is", f"write {address}")
        return Target(address, 0, weight)
    return Target(address, shifted(text, match["ports"], first, last) if match["colon"] else first, weight)


def shifted(text: str, ports: str, first: int, last: int) -> int:
    """Where a range begins that is to take the ports from ``first`` to ``last``, in a target written ``text``."""
    start, end = numbers(ports, _TARGET_FORMS)
    beyond = start + last - first
    if "-" in ports and end != beyond:
        count, wanted = end - start + 1, last - first + 1
        why = f"{ports} is {_plural(count)}, {range_of(first, last)} is {_plural(wanted)}"
        raise UsageError(f"{text} does not fit the external ports", why, f"name the first port alone: it is {start}")
    if beyond > _PORT_LAST:
        why = f"{range_of(first, last)} would lead to {range_of(start, beyond)}, and ports end at {_PORT_LAST}"
        raise UsageError(f"{text} is too high", why, f"begin at {_PORT_LAST - last + first} or below")
    return start


def _plural(count: int) -> str:
    return f"{count} port{'' if count == 1 else 's'}"


def _weight(text: str, weight: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", weight) or not 1 <= int(weight) <= WEIGHT_MOST:
        why = f"allowed is 1 to {WEIGHT_MOST}; a target that is to get nothing is left out"
        raise UsageError(f"{text} has no possible weight", why, "write it as 192.168.0.2:80*2")
    return int(weight)


def _address(text: str) -> IPv4Address:
    try:
        found = ip_address(text)
    except ValueError:
        raise UsageError(f"{text} is no IPv4 address", "names are not looked up", "give it as 192.168.0.2") from None
    assert isinstance(found, IPv4Address)  # there is no colon in it
    if found.is_multicast or found.is_unspecified or int(found) == 0xFFFFFFFF:
        raise UsageError(f"{text} is not the address of a host", "", "give one as 192.168.0.2")
    return found


def source_of(text: str) -> IPv4Network | None:
    """A prefix; None where it is empty, or everything."""
    if not text:
        return None
    do = "give an IPv4 prefix as 198.51.100.0/24, or an address"
    if ":" in text:
        raise UsageError(f"{text} is an IPv6 prefix", "forwards are for IPv4", do)
    try:
        network = IPv4Network(text, strict=False)
    except ValueError as error:
        raise UsageError(f"{text} is no prefix", str(error), do) from error
    if "/" in text and text.partition("/")[0] != str(network.network_address):
        raise UsageError(f"{text} is no prefix", "it has bits beyond its length", f"write {network}")
    return network if network.prefixlen else None
