"""What a rule for source NAT by the kernel comes down to, whichever way it was read."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import Any

TARGETS = {"MASQUERADE", "SNAT"}  # iptables'


@dataclass(frozen=True)
class NatRule:
    """A rule, reduced to what decides whether it concerns us.

    Attributes:
        where: table, chain and what follows, as a person finds it.
        remove: the command that deletes it.
        out: (negated, interface patterns) of the outgoing interface; None when any.
        sources: the source prefixes; None when any, or not understood.
    """

    where: str
    remove: str
    out: tuple[bool, tuple[str, ...]] | None = None
    sources: tuple[IPv4Network, ...] | None = None

    def concerns(self, wan: str, inside: Sequence[IPv4Network]) -> bool:
        """Whether it can meet a packet from these prefixes that leaves by wan; yes when in doubt."""
        if self.out:
            negated, patterns = self.out
            if negated == any(fnmatch.fnmatchcase(wan, pattern) for pattern in patterns):
                return False
        if self.sources is None or not inside:
            return True
        return any(source.overlaps(prefix) for source in self.sources for prefix in inside)


def prefix(text: Any) -> IPv4Network | None:
    """None when it is not an IPv4 prefix or address."""
    try:
        return IPv4Network(text, strict=False)
    except (ValueError, TypeError):
        return None
