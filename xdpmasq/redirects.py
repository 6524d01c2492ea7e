"""Redirects (transparent proxies): a kind of forward whose target is the gateway itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any, ClassVar

from xdpmasq import forwards
from xdpmasq.errors import UsageError
from xdpmasq.forwards import Rule, Target, range_of

SIDES = ("lan", "wan")
SPARED_MOST = 64


@dataclass(frozen=True)
class Redirect(Rule):
    """Ports of anybody outside (``lan``), or of our external address (``wan``), that the gateway answers itself.

    Attributes:
        targets: one, whose address is unset: the gateway's, at that side.
        source: the internal hosts, or the remotes, that it is for.
        on: one of :data:`SIDES`: where the packets come from.
        spared: destinations that are left alone.
    """

    kind: ClassVar[str] = "redirect"

    on: str = SIDES[0]
    spared: tuple[IPv4Network, ...] = ()

    @property
    def from_inside(self) -> bool:
        return self.on == "lan"

    @property
    def is_reversible(self) -> bool:
        return False

    @property
    def name(self) -> str:
        return f"{self.protocol} {self.ports} --on {self.on}" + (f" --from {self.source}" if self.source else "")

    @property
    def to(self) -> tuple[str, ...]:
        start = self.targets[0].port
        return (range_of(start, start + self.last - self.first),)

    def __str__(self) -> str:
        whose = f" from {self.source}" if self.source else ""
        spared = f" but not to {' '.join(map(str, self.spared))}" if self.spared else ""
        return f"{self.protocol} {self.ports} on {self.on}{whose}{spared} → the gateway's {self.to[0]}"

    def as_fields(self) -> dict[str, Any]:
        fields = super().as_fields()
        return {**fields, "to": self.to[0], "on": self.on, "not_to": [str(each) for each in self.spared]}


def parse(
    protocol: str, ports: str | int, to: str | int, on: str, *, source: str = "", not_to: Sequence[str] = ()
) -> Redirect:
    """A redirect from the words of a command line or a file.

    Args:
        ports: ``80`` or ``5000-5010``.
        to: the gateway's port; of a range the first.
        not_to: prefixes of destinations to be spared.

    Raises:
        UsageError: what is wrong, and what to write.
    """
    wanted = named(protocol, ports, on, source)
    port = forwards.shifted(str(to), str(to), wanted.first, wanted.last)
    if on == "wan" and not_to:
        why = "what comes in by the WAN is addressed to the gateway"
        raise UsageError(
            "no destination can be spared on wan", why, "leave --not-to (not_to) out, or redirect on lan"
        )
    if len(not_to) > SPARED_MOST:
        raise UsageError(f"{len(not_to)} spared destinations are too many", f"at most {SPARED_MOST} fit", "join some")
    spared = tuple(sorted({network for text in not_to if (network := forwards.source_of(text))}))
    if any(forwards.source_of(text) is None for text in not_to):
        raise UsageError("every destination would be spared", "", "leave the redirect out, or name a longer prefix")
    targets = (Target(IPv4Address(0), port),)
    return replace(wanted, targets=targets, spared=spared)


def named(protocol: str, ports: str | int, on: str, source: str = "") -> Redirect:
    """What `redirect del` names: a redirect without its target."""
    if on not in SIDES:
        raise UsageError(f"{on or 'nothing'} is no side", "", "give --on lan or --on wan")
    name, prefix = forwards.protocol_of(protocol, "redirected"), forwards.source_of(source)
    return Redirect(name, *forwards.numbers(ports), (), prefix, on=on)
