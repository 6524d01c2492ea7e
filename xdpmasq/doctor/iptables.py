"""iptables' rules, where they are not nftables' in disguise, from `iptables-save`."""

import shutil

from xdpmasq.doctor import natrule, reading
from xdpmasq.doctor.natrule import TARGETS, NatRule


def legacy() -> list[NatRule]:
    """The source NAT rules that only iptables knows."""
    # asked for a table that there is not, the kernel would make it
    if "nat" not in reading.text_of("/proc/net/ip_tables_names").split():
        return []
    command = "iptables-legacy-save" if shutil.which("iptables-legacy-save") else "iptables-save"
    return source_nats(reading.output_of(command, "-t", "nat") or "")


def source_nats(text: str) -> list[NatRule]:
    """The source NAT rules in the output of `iptables-save -t nat`."""
    lines = (line.split() for line in text.splitlines() if line.startswith("-A "))
    return [_source_nat(words) for words in lines if _option(words, "-j")[1] in TARGETS]


def _source_nat(words: list[str]) -> NatRule:
    rule = " ".join(words)
    negated, out = _option(words, "-o")
    not_from, source = _option(words, "-s")
    prefix = natrule.prefix(source) if source and not not_from else None
    return NatRule(
        where=f"iptables: {rule}",
        remove=f"iptables -t nat -D {rule.removeprefix('-A ')}",
        # "eth+" is iptables' wildcard
        out=(negated, (out[:-1] + "*" if out.endswith("+") else out,)) if out else None,
        sources=(prefix,) if prefix else None,
    )


def _option(words: list[str], option: str) -> tuple[bool, str]:
    if option not in words[:-1]:
        return False, ""
    at = words.index(option)
    return words[at - 1] == "!", words[at + 1]
