"""nftables' rules, from `nft -j`."""

import json
import os
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from xdpmasq.doctor import natrule, reading
from xdpmasq.doctor.natrule import TARGETS, NatRule

SOURCE_NAT = {"masquerade", "snat"}


def listing() -> str | None:
    """What `nft -j list ruleset` prints, nothing where nftables is not in use; None when it fails."""
    return "" if _idle("nf_tables") else reading.output_of("nft", "-j", "list", "ruleset")


def rules(text: str) -> list[dict[str, Any]]:
    """The rules in the output of `nft -j list ruleset`; none when it is not JSON."""
    try:
        objects = json.loads(text or "{}").get("nftables", [])
    except ValueError:
        return []
    return [each["rule"] for each in objects if "rule" in each]


def source_nat(rule: dict[str, Any]) -> NatRule | None:
    """The rule as source NAT of IPv4; None when it is something else."""
    expressions = [each for each in rule.get("expr", []) if isinstance(each, dict)]
    matches = [each["match"] for each in expressions if "match" in each]
    if rule["family"] not in ("ip", "inet") or not any(map(_translates, expressions)):
        return None
    if any(_left(match) == "nfproto" and match["right"] == "ipv6" for match in matches):
        return None
    place = f"{rule['family']} {rule['table']} {rule['chain']}"
    return NatRule(
        where=f"nftables: a rule in {place} (handle {rule['handle']})",
        remove=f"nft delete rule {place} handle {rule['handle']}",
        out=next((_out(match) for match in matches if _left(match) in ("oif", "oifname")), None),
        sources=next((_sources(match) for match in matches if _left(match) == "ip saddr"), None),
    )


def _translates(expression: dict[str, Any]) -> bool:
    xt = expression.get("xt")  # iptables-nft: nft shows the target's name only
    return bool(SOURCE_NAT & expression.keys()) or bool(xt and xt.get("name") in TARGETS)


def _left(match: dict[str, Any]) -> str:
    left = match["left"] if isinstance(match["left"], dict) else {}
    if "meta" in left:
        return str(left["meta"]["key"])
    payload = left.get("payload", {})
    return f"{payload.get('protocol')} {payload.get('field')}"


def _members(right: Any) -> list[Any]:
    return right["set"] if isinstance(right, dict) and "set" in right else [right]


def _out(match: dict[str, Any]) -> tuple[bool, tuple[str, ...]] | None:
    names = _members(match["right"])
    # a named set ("@wans") is not looked up: in doubt it holds the WAN
    if match["op"] not in ("==", "!=") or not all(isinstance(n, str) and n[:1] != "@" for n in names):
        return None
    return match["op"] == "!=", tuple(names)


def _sources(match: dict[str, Any]) -> tuple[IPv4Network, ...] | None:
    prefixes = [_prefix(member) for member in _members(match["right"])]
    if match["op"] != "==" or None in prefixes:
        return None
    return tuple(prefix for prefix in prefixes if prefix)


def _prefix(member: Any) -> IPv4Network | None:
    if isinstance(member, dict) and "prefix" in member:
        member = f"{member['prefix']['addr']}/{member['prefix']['len']}"
    return natrule.prefix(member)


def _idle(module: str) -> bool:
    """Whether that is a module that is not loaded: asking its subsystem anything would load it."""
    modules = reading.text_of(f"/lib/modules/{os.uname().release}/modules.dep")
    return f"/{module}.ko" in modules and not Path("/sys/module", module).exists()
