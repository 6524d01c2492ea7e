"""Who takes part: how each gateway is set up in the ``gate`` namespace, and what it must do to a packet."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from xdpmasq import datapath
from xdpmasq.bench.generator import Direction, Expectation, Traffic
from xdpmasq.bench.topology import Answer, Topology
from xdpmasq.errors import MasqError, UsageError
from xdpmasq.lab import netns

_MASQUERADE = """\
table ip masq_bench {
  chain postrouting {
    type nat hook postrouting priority srcnat; policy accept;
    oifname "wan0" masquerade
  }
}
"""
_TIMEOUT_S = 30.0
_PORTS: dict[Direction, str] = {"out": "lan0", "in": "wan0"}  # where a direction enters the gateway


class StillThereError(MasqError):
    """A contestant did not go away when told to."""


@dataclass(frozen=True)
class Command:
    """A command line run in the gateway's namespace, with what it reads."""

    argv: tuple[str, ...]
    stdin: str = ""


@dataclass(frozen=True)
class Contestant:
    """A gateway, described.

    Attributes:
        name: on the command line and in tables.
        summary: one line of what it is.
        expected: what a packet looks like behind it.
        programs: the stem of two XDP programs of ``traffic.c`` (``drop``: drop_out, drop_in), or empty.
        kernel_forwards: whether the bench itself switches ip_forward on.
        start, stop: commands that set it up and take it down.
        forget: empties its tables, so that every packet opens a new flow.
    """

    name: str
    summary: str
    expected: Expectation
    programs: str = ""
    kernel_forwards: bool = False
    start: tuple[Command, ...] = field(default=())
    stop: tuple[Command, ...] = field(default=())
    forget: Callable[[Topology], None] = Topology.forget_connections

    @contextlib.contextmanager
    def running(self, traffic: Traffic) -> Iterator[None]:
        """The gateway is set up inside this context.

        Raises:
            StillThereError: it could not be taken down; others can not be measured in this network any more.
            MasqError: it could not be set up.
        """
        with contextlib.ExitStack() as stack:
            topology = traffic.topology
            if self.kernel_forwards:
                stack.callback(netns.set_sysctls, topology.namespace("gate"), {"net/ipv4/ip_forward": 0})
                netns.set_sysctls(topology.namespace("gate"), {"net/ipv4/ip_forward": 1})
            if self.programs:
                for direction, port in _PORTS.items():
                    program = traffic.program(f"{self.programs}_{direction}")
                    topology.attach_xdp("gate", port, program.fd)
                    stack.callback(topology.detach_xdp, "gate", port, program.fd)
            try:
                for command in self.start:
                    topology.run("gate", command.argv, command.stdin, _TIMEOUT_S)
            except MasqError:
                self._stop(topology)  # whatever half of it is there
                raise
            stack.callback(self._stop_surely, topology)
            yield

    def _stop(self, topology: Topology) -> list[Answer]:
        return [topology.try_run("gate", command.argv, command.stdin, _TIMEOUT_S) for command in self.stop]

    def _stop_surely(self, topology: Topology) -> None:
        for command, answer in zip(self.stop, self._stop(topology), strict=True):
            if answer.code != 0:
                said = f"`{' '.join(command.argv)}` said: {answer.output[-2000:]}"
                raise StillThereError(f"{self.name} could not be taken down", said)


def _forget_sessions(topology: Topology) -> None:
    """Ends all sessions and returns their ports at once, which the agent would let rest."""
    with topology.inside("gate"):
        attached = datapath.find()
    slots = attached.open_slots()
    attached.flush(slots)
    attached.reap(attached.reaper, slots, datapath.REAP_RESTED)


def _xdpmasq(mode: str) -> Contestant:
    xdpmasq = (sys.executable, "-m", "xdpmasq")
    return Contestant(
        f"xdpmasq-{mode}",
        f"xdpmasq attach --mode {mode}",
        Expectation(translated=True, hops=1),
        start=(Command((*xdpmasq, "attach", "--wan", "wan0", "--lan", "lan0", "--mode", mode)),),
        stop=(Command((*xdpmasq, "detach")),),
        forget=_forget_sessions,
    )


_FORWARDED, _MASQUERADED = Expectation(translated=False, hops=1), Expectation(translated=True, hops=1)

# The base of shares, and what speeds are compared with.
BASE, BEST, RIVAL = "drop", "redirect", "nftables"

CONTESTANTS = (
    Contestant(BASE, "XDP drop at the gateway", Expectation(translated=False, hops=0), programs="drop"),
    Contestant(BEST, "bare XDP redirect", Expectation(translated=False, hops=0), programs="redirect"),
    Contestant("forward", "kernel forwarding, no NAT", _FORWARDED, kernel_forwards=True),
    Contestant(
        RIVAL,
        "nftables masquerade",
        _MASQUERADED,
        kernel_forwards=True,
        start=(Command(("nft", "-f", "-"), _MASQUERADE),),
        stop=(Command(("nft", "delete", "table", "ip", "masq_bench")),),
    ),
    _xdpmasq("xdp"),
    _xdpmasq("tc"),
)


def chosen(names: list[str]) -> list[Contestant]:
    """The contestants of those names, in the order of the table; all of them for no names.

    Raises:
        UsageError: there is none of a name.
    """
    known = [contestant.name for contestant in CONTESTANTS]
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"no contestant {unknown[0]}", f"there are {', '.join(known)}", "name one of these")
    return [contestant for contestant in CONTESTANTS if not names or contestant.name in names]
