"""Port triggering (autofw of old): a kind of forward whose target is whoever inside has called some other port."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from xdpmasq import forwards
from xdpmasq.errors import UsageError
from xdpmasq.forwards import Rule, range_of

LASTS_S = 600
LASTS_LEAST_S, LASTS_MOST_S = 60, 86400  # accelerated flows show themselves every 20 s, see Config.rearm_s


@dataclass(frozen=True)
class Trigger(Rule):
    """External ports that lead to the internal host which has called another port outside.

    Attributes:
        targets: whoever has it at the moment; not part of what a trigger is.
        caller_protocol, caller_first, caller_last: the remote ports that a host calls to have them.
        lasts_s: how long after its last packet there.
    """

    kind: ClassVar[str] = "trigger"

    caller_protocol: str = ""
    caller_first: int = 0
    caller_last: int = 0
    lasts_s: int = LASTS_S

    @classmethod
    def of(cls, opened: tuple[str, int, int], protocol: str, called: tuple[int, int], lasts_s: int) -> Self:
        """What is ``opened``, and by calls to which ports."""
        first, last = called
        return cls(*opened, (), caller_protocol=protocol, caller_first=first, caller_last=last, lasts_s=lasts_s)

    @property
    def is_reversible(self) -> bool:
        return False

    @property
    def called(self) -> str:
        return f"{self.caller_protocol} {range_of(self.caller_first, self.caller_last)}"

    @property
    def opens(self) -> str:
        return f"{self.protocol} {range_of(self.first, self.last)}"

    @property
    def name(self) -> str:
        return f"{self.called} --opens {self.opens}"

    def __str__(self) -> str:
        return f"{self.called} opens {self.opens} for {self.lasts_s} s"

    def _same_call(self, other: Rule) -> bool:
        """One call opens one range of a protocol: the tables have room for no more."""
        return (
            isinstance(other, Trigger)
            and (self.protocol, self.caller_protocol) == (other.protocol, other.caller_protocol)
            and self.caller_first <= other.caller_last
            and other.caller_first <= self.caller_last
        )

    def contradicts(self, other: Rule) -> bool:
        return super().contradicts(other) or self._same_call(other)

    def shares(self, other: Rule) -> str:
        if super().contradicts(other) or not isinstance(other, Trigger):
            return super().shares(other)
        first, last = max(self.caller_first, other.caller_first), min(self.caller_last, other.caller_last)
        called = f"{self.caller_protocol} {range_of(first, last)}"
        return f"{called} to open {self.protocol} ports by, which can be one range"

    def as_fields(self) -> dict[str, Any]:
        return {
            "protocol": self.caller_protocol,
            "ports": range_of(self.caller_first, self.caller_last),
            "opens": self.opens,
            "lasts_s": self.lasts_s,
        }


def parse(protocol: str, ports: str | int, opens: str, lasts_s: int = LASTS_S) -> Trigger:
    """A trigger from the words of a command line or a file.

    Args:
        protocol, ports: what an internal host calls, ``47624`` or a range.
        opens: protocol and external ports, ``tcp 6112-6119``.

    Raises:
        UsageError: what is wrong, and what to write.
    """
    name, first, last = forwards.protocol_of(protocol, "watched for"), *forwards.numbers(ports)
    words = opens.split()
    if len(words) != 2:
        raise UsageError(f"{opens or 'nothing'} does not say what is opened", "", 'write it as "tcp 6112-6119"')
    if not LASTS_LEAST_S <= lasts_s <= LASTS_MOST_S:
        why = f"allowed is {LASTS_LEAST_S} to {LASTS_MOST_S} s, since accelerated flows are looked at every 20 s"
        raise UsageError(f"{lasts_s} s is no time for a trigger", why)
    opened = forwards.protocol_of(words[0], "opened")
    return Trigger.of((opened, *forwards.numbers(words[1])), name, (first, last), lasts_s)
