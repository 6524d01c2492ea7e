"""What a box is like, as text: taken before and after, it shows whether anything was left behind."""

from collections.abc import Iterator
from pathlib import Path

from xdpmasq import tcx
from xdpmasq.lab import netns
from xdpmasq.lab.lab import Lab
from xdpmasq.net import netdev

_OF_BOX = {
    "link": "ip -details -oneline link",
    "address": "ip -oneline address",
    "route": "ip route show table all",
    "rule": "ip rule",
    "qdisc": "tc qdisc show",
    "nftables": "nft list ruleset",
    # The keys left out count something, or belong to the whole machine.
    "sysctl": r"sysctl -a -r ^net\.ipv[46]\.(conf|neigh|route|ip_|icmp|tcp_|ping)",
}
_OF_INTERFACE = {
    "TC ingress": "tc filter show dev {} ingress",
    "TC egress": "tc filter show dev {} egress",
    "offload": "ethtool -k {}",
}


def snapshot(lab: Lab, role: str = "masq-gate") -> set[str]:
    """One line for everything a gateway program might change or leave, each beginning with its kind."""
    links = lab.exec(role, ["ip", "-oneline", "link"]).stdout.splitlines()
    names = [link.split(": ")[1].split("@")[0] for link in links]
    questions = dict(_OF_BOX)
    questions |= {
        f"{kind} of {name}": command.format(name) for kind, command in _OF_INTERFACE.items() for name in names
    }
    answers = {kind: lab.exec(role, command.split()).stdout for kind, command in questions.items()}
    answers["TCX"] = "\n".join(_tcx(lab.namespace(role)))
    answers["process"] = "\n".join(map(_command_line, netns.processes_in([lab.namespace(role)])))
    return {f"{kind}: {line.strip()}" for kind, text in answers.items() for line in text.splitlines()}


def differences(before: set[str], after: set[str]) -> list[str]:
    """What is not as it was, marked as diff does: '-' gone, '+' new."""
    return [f"- {line}" for line in sorted(before - after)] + [f"+ {line}" for line in sorted(after - before)]


def _tcx(namespace: str) -> Iterator[str]:
    with netns.entered(namespace):
        for link in netdev.links():
            for hook in ("ingress", "egress"):
                yield f"{hook} of {link.name}: {tcx.programs(link.index, hook)}"


def _command_line(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it ended meanwhile
        return ""
    return f"{pid} {words.replace(bytes(1), b' ').decode(errors='replace')}"
