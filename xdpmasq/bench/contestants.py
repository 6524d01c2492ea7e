"""Who takes part: how each gateway is set up in a network of its own, and what it must do to a packet."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from xdpmasq import abi, datapath, settings
from xdpmasq.bench import conntrack, topology
from xdpmasq.bench.generator import DIRECTIONS, Expectation, Traffic
from xdpmasq.bench.probe import Probe
from xdpmasq.bench.topology import Topology, public_addresses
from xdpmasq.errors import HostError, MasqError, UsageError
from xdpmasq.lab import netns
from xdpmasq.lab.errors import wait_until

_TIMEOUT_S = 90.0  # attaching compiles, and the other core may be busy
_READY_S = 30.0
_ENTERS = {"out": "lan0", "in": "wan0"}  # where a direction enters the gateway


class AbsentError(MasqError):
    """This machine does not have that contestant; nobody's fault."""


@dataclass(frozen=True)
class Command:
    """A command line run in the gateway's namespace, with what it reads."""

    argv: tuple[str, ...]
    stdin: str = ""

    def run(self, network: Topology) -> None:
        network.run("gate", self.argv, self.stdin, _TIMEOUT_S)


@dataclass(frozen=True)
class Contestant:
    """A gateway, described.

    Attributes:
        name: on the command line and in tables.
        summary: one line of what it is.
        expected: what a packet looks like behind it.
        programs: the stem of two XDP programs of ``traffic.c`` (``drop``: drop_out, drop_in), or empty.
        kernel_forwards: whether the bench itself switches ip_forward on.
        tracks: whether the kernel's connection tracking holds its sessions.
        probe: a command that fails where this kernel lacks what it needs; ``lacks`` says what that is.
        start, stop: commands that set it up and take it down.
        background: a command that runs as long as the contestant plays, or sets it up and ends.
        forget: empties its tables, so that every packet opens a new flow; of somebody else's, the kernel's alone.
    """

    name: str
    summary: str
    expected: Expectation
    programs: str = ""
    kernel_forwards: bool = False
    tracks: bool = False
    probe: Command | None = None
    lacks: str = ""
    start: tuple[Command, ...] = field(default=())
    stop: tuple[Command, ...] = field(default=())
    background: tuple[str, ...] = ()
    forget: Callable[[Topology], None] = conntrack.forget

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(OURS)

    @contextlib.contextmanager
    def running(self, traffic: Traffic) -> Iterator[None]:
        """The gateway is set up inside this context.

        Raises:
            AbsentError: this machine does not have it.
            MasqError: it could not be set up.
        """
        network = traffic.topology
        with contextlib.ExitStack() as stack:
            self._look_for_it(network)
            if self.kernel_forwards:
                netns.set_sysctls(network.namespace("gate"), {"net/ipv4/ip_forward": 1})
            if self.programs:
                for direction in DIRECTIONS:
                    program = traffic.program(f"{self.programs}_{direction}")
                    network.attach_xdp("gate", _ENTERS[direction], program.fd)
            for command in self.stop:
                stack.callback(network.try_run, "gate", command.argv, command.stdin, _TIMEOUT_S)
            for command in self.start:
                command.run(network)
            if self.background:
                stack.enter_context(_in_background(self.name, self.background, network))
            yield

    def _look_for_it(self, network: Topology) -> None:
        if not self.probe:
            return
        answer = network.try_run("gate", self.probe.argv, self.probe.stdin)
        if answer.code != 0:
            raise AbsentError(f"not measured: {self.lacks}", answer.output.splitlines()[0][:100])


@contextlib.contextmanager
def _in_background(name: str, argv: Sequence[str], network: Topology) -> Iterator[None]:
    """Somebody else's gateway; ready once a datagram comes out translated."""
    with tempfile.TemporaryFile("w+") as output:
        inside = ["ip", "netns", "exec", network.namespace("gate"), *argv]
        with subprocess.Popen(inside, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as process:
            try:
                with Probe(network) as probe:
                    _wait_until_it_translates(name, process, probe, output)
                yield
            finally:
                process.terminate()  # what it has started itself goes with the namespace
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=5)
                process.kill()


def _wait_until_it_translates(name: str, process: subprocess.Popen[bytes], probe: Probe, output: object) -> None:
    def is_ready() -> bool:
        if process.poll():
            output.seek(0)  # type: ignore[attr-defined]
            raise HostError(f"{name} ended with {process.returncode}", output.read()[-2000:])  # type: ignore[attr-defined]
        return probe.is_translated()

    wait_until(is_ready, f"{name} translates", _READY_S)


# --- ours ------------------------------------------------------------------------------------------


def _forget_sessions(network: Topology) -> None:
    """Ends all sessions and returns their ports at once, which the agent would let rest."""
    with network.inside("gate"):
        attached = datapath.find()
    slots = attached.open_slots()
    attached.flush(slots)
    attached.reap(attached.reaper, slots, abi.REAP_RESTED)


def attach_command(mode: str, externals: int = 1) -> Command:
    """Attaching as a user does, with room for as many flows as the bench can make."""
    config = f'[interfaces]\nwan = "wan0"\nlan = ["lan0"]\nmode = "{mode}"\n[sessions]\nfurther = {_further()}\n'
    if externals > 1:
        config += f"[external]\naddresses = {[str(each) for each in public_addresses(externals)]}\n"
    return Command((sys.executable, "-m", "xdpmasq", "attach", "--config", "/dev/stdin"), config)


def _further() -> int:
    return settings.FURTHER_MOST if conntrack.memory_bytes() > _ROOMY else settings.FURTHER_LEAST


_ROOMY = 4 << 30  # two datapaths with room for a million sessions, some 300 MB each, and nftables beside them


def most_flows() -> int:
    """How many flows this machine's memory lets the bench open in every contestant."""
    return topology.MOST_FLOWS if _further() == settings.FURTHER_MOST else settings.FURTHER_LEAST


def _xdpmasq(mode: str, externals: int) -> Contestant:
    return Contestant(
        f"{OURS}{mode}",
        f"xdpmasq attach --mode {mode}",
        Expectation(translated=True, hops=1),
        start=(attach_command(mode, externals),),
        stop=(Command((sys.executable, "-m", "xdpmasq", "detach")),),
        forget=_forget_sessions,
    )


# --- the kernel's ----------------------------------------------------------------------------------

_FLOWTABLE = """\
  flowtable fast { hook ingress priority filter; devices = { lan0, wan0 }; }
  chain forward { type filter hook forward priority filter; meta l4proto { tcp, udp } flow add @fast; }
"""


def _masquerade(externals: int, more: str = "") -> str:
    first, last = public_addresses(externals)[0], public_addresses(externals)[-1]
    translate = "masquerade" if externals == 1 else f"snat to {first}-{last} persistent"
    chain = f'type nat hook postrouting priority srcnat; oifname "wan0" {translate};'
    return f"table ip masq_bench {{\n{more}  chain postrouting {{ {chain} }}\n}}\n"


def _nft(name: str, summary: str, rules: str, *, probed: str = "") -> Contestant:
    return Contestant(
        name,
        summary,
        Expectation(translated=True, hops=1),
        kernel_forwards=True,
        tracks=True,
        probe=Command(("nft", "--check", "-f", "-"), rules) if probed else None,
        lacks=probed,
        start=(Command(("nft", "-f", "-"), rules),),
    )


# --- everybody -------------------------------------------------------------------------------------

# The base of shares, what speeds are compared with, and how our own names begin.
BASE, BEST, RIVAL, OURS = "drop", "redirect", "nftables", "xdpmasq-"


def contestants(externals: int = 1) -> list[Contestant]:
    """All that come with the bench, translating to so many public addresses."""
    untouched, forwarded = Expectation(translated=False, hops=0), Expectation(translated=False, hops=1)
    return [
        Contestant(BASE, "XDP drop at the gateway", untouched, programs="drop"),
        Contestant(BEST, "bare XDP redirect, no NAT", untouched, programs="redirect"),
        Contestant("forward", "kernel forwarding, no NAT", forwarded, kernel_forwards=True),
        _nft(RIVAL, "nftables masquerade", _masquerade(externals)),
        _nft(
            "flowtable",
            "nftables masquerade with a flowtable",
            _masquerade(externals, _FLOWTABLE),
            probed="this kernel has no flowtables (CONFIG_NF_FLOW_TABLE)",
        ),
        _xdpmasq("xdp", externals),
        _xdpmasq("tc", externals),
    ]


NAMES = tuple(each.name for each in contestants())


@dataclass(frozen=True)
class Chosen:
    """Who of them is to play: ``names`` (empty: all), and other people's gateways by their commands."""

    names: tuple[str, ...] = ()
    external: tuple[Contestant, ...] = ()

    def __post_init__(self) -> None:
        """Raises: UsageError."""
        known = [*NAMES, *(each.name for each in self.external)]
        if unknown := [name for name in self.names if name not in known]:
            raise UsageError(f"no contestant {unknown[0]}", f"there are {', '.join(known)}", "name one of these")
        if twice := {name for name in known if known.count(name) > 1}:
            raise UsageError(f"two contestants named {twice.pop()}", "names stand in tables", "give it another name")

    def among(self, externals: int = 1) -> list[Contestant]:
        """The contestants, in the order of the table; those of others last."""
        everybody = [*contestants(externals), *self.external]
        return [each for each in everybody if not self.names or each.name in self.names]


def parse_external(text: str) -> Contestant:
    """A contestant from ``NAME=COMMAND``; {wan} and {lan} in it become the gateway's interfaces.

    Raises:
        UsageError: it is not of that form.
    """
    name, equals, command = text.partition("=")
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"cannot read the command {command}", str(error)) from error
    if not equals or not words or not re.fullmatch(r"[A-Za-z][\w.-]*", name):
        do = "for example --external 'mine=./masquerade.sh {wan} {lan}'"
        raise UsageError(f"{text} is no contestant", "NAME=COMMAND is expected", do)
    places = {"{wan}": "wan0", "{lan}": "lan0"}
    argv = [re.sub(r"\{(wan|lan)\}", lambda place: places[place[0]], word) for word in words]
    return Contestant(
        name,
        " ".join(argv),
        Expectation(translated=True, hops=1),
        kernel_forwards=True,
        background=tuple(argv),
    )
