"""The kernel's own masquerade in masq-gate, to compare with: the nine lines that people write today."""

import contextlib
from collections.abc import Iterator

from xdpmasq.lab import netns
from xdpmasq.lab.lab import Lab

TABLE = "lab_masq"

_RULES = f"""\
table ip {TABLE} {{
    chain postrouting {{
        type nat hook postrouting priority srcnat
        oifname "wan0" ip saddr 192.168.0.0/16 masquerade
    }}
}}
"""
_FORWARDING = {"net/ipv4/ip_forward": 1}


def masquerade_on(lab: Lab) -> None:
    """Turn forwarding on and load the rules."""
    netns.set_sysctls(lab.namespace("masq-gate"), _FORWARDING)
    lab.exec("masq-gate", ["nft", "-f", "-"], input=_RULES)


def masquerade_off(lab: Lab) -> None:
    """The rules, the sessions they made, and forwarding go; the sessions so that no next run sees them."""
    lab.exec("masq-gate", ["nft", "delete", "table", "ip", TABLE])
    lab.exec("masq-gate", ["conntrack", "--flush"])
    netns.set_sysctls(lab.namespace("masq-gate"), dict.fromkeys(_FORWARDING, 0))


@contextlib.contextmanager
def masquerading(lab: Lab) -> Iterator[None]:
    """masq-gate masquerades inside the `with` block."""
    masquerade_on(lab)
    try:
        yield
    finally:
        masquerade_off(lab)
