"""The rules of nftables and iptables taken together."""

import json
import shutil
from dataclasses import dataclass

from xdpmasq.doctor import iptables, nft
from xdpmasq.doctor.natrule import NatRule


@dataclass(frozen=True)
class Ruleset:
    """What the checks need to know of them.

    Attributes:
        nat: the rules that translate sources of IPv4.
        uses_conntrack: some rule matches on the state of connections.
        unread: why nftables' rules are not known, else empty.
    """

    nat: tuple[NatRule, ...]
    uses_conntrack: bool
    unread: str = ""

    @classmethod
    def read(cls) -> "Ruleset":
        legacy = iptables.legacy()
        text = nft.listing()
        if text is None:
            why = "`nft list ruleset` fails" if shutil.which("nft") else "nft is not installed"
            return cls(tuple(legacy), False, why)
        rules = nft.rules(text)
        nat = [rule for rule in map(nft.source_nat, rules) if rule]
        return cls((*nat, *legacy), any('"ct"' in json.dumps(rule) for rule in rules))
