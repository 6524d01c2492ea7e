"""The demo: real programs through a masquerading gateway, from attach to nothing left behind.

Prints to the console it is given; the first step that does not do what it should ends it with LabError.
"""

import contextlib
import dataclasses
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xdpmasq.lab import programs
from xdpmasq.lab.errors import LabError
from xdpmasq.lab.gateways import GATEWAYS, Gateway, Reply
from xdpmasq.lab.lab import Lab
from xdpmasq.lab.snapshot import differences, snapshot
from xdpmasq.lab.topology import DRAWING
from xdpmasq.lab.traffic import BEFORE, STEPS, Outcome, Scene, Step

NARROW_MTU = 1400

_PIPED_COLUMNS = 120
_BENCH_TIMEOUT_S = 180

# ARP, packets, and packets quoted in ICMP errors (their addresses are 12 and 16 bytes into the quote).
_PRIVATE = (
    "net 192.168.0.0/16 or "
    "((icmp[icmptype] = 3 or icmp[icmptype] = 11) and (icmp[20:2] = 0xc0a8 or icmp[24:2] = 0xc0a8))"
)


def run(console: Console, *, name: str, gateway: str, modes: Sequence[str], cpu: bool) -> None:
    """Run the demo once for each mode, in a lab of its own.

    Args:
        name: prefix of the lab; one that a killed demo left behind under this name is replaced.
        gateway: a key of GATEWAYS.
        modes: as in ``attach --mode``.
        cpu: end with the comparison of CPU time per packet.

    Raises:
        HostError: a program is missing.
        LabError: a step failed, or something was left behind.
    """
    programs.require("the demo", programs.BUILDING.items(), programs.SERVING.items(), programs.ASKING.items())
    started = time.monotonic()
    checks = 0
    with _alone(name):
        Lab(name).down()
        console.print(Text(DRAWING), soft_wrap=True)
        for mode in modes:
            # Super-packets are TC's strength; XDP on veth cannot have them.
            with Lab(name, far_mtu=NARROW_MTU, offloads=mode != "xdp") as lab:
                checks += _Act(console, lab, gateway, mode).play()
    if cpu:
        cpu_comparison(console)
    seconds = time.monotonic() - started
    console.print(f"\n[bold green]All {checks} checks passed[/] in {seconds:.0f} s; the lab is gone again.")


def cpu_comparison(console: Console) -> None:
    """CPU time per packet beside nftables masquerade, by the short form of the benchmark."""
    _headline(console, "CPU time per packet, beside nftables masquerade")
    with console.status("measuring, in interleaved rounds…"):
        _show(console, _run_bench())


def _run_bench() -> Reply:
    argv = [sys.executable, "-m", "xdpmasq", "bench", "--quick"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as bench:
        try:
            output, complaint = bench.communicate(timeout=_BENCH_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise LabError("`xdpmasq bench --quick` did not end", f"waited {_BENCH_TIMEOUT_S} s") from error
        finally:
            # Not killed, whatever interrupts us: it has namespaces of its own to clear away.
            bench.terminate()
    if bench.returncode != 0:
        raise LabError("`xdpmasq bench --quick` failed", complaint.strip())
    return Reply("xdpmasq bench --quick", output)


class _Act:
    """One pass of the demo: a lab, a gateway, and the checks counted."""

    def __init__(self, console: Console, lab: Lab, gateway: str, mode: str) -> None:
        self._console = console
        self._lab = lab
        self._gateway: Gateway = GATEWAYS[gateway](lab, mode, _environment(console))
        self._checks = 0

    def play(self) -> int:
        """Returns: how many checks were made, all of them good."""
        _headline(self._console, self._gateway.title)
        with self._console.status("starting nginx, dnsmasq and sshd…"):
            scene = Scene.set(self._lab)
        before = snapshot(self._lab)
        self._do(BEFORE, scene)
        _show(self._console, self._gateway.attach())
        self._drive_programs(scene)
        _show(self._console, self._gateway.sessions())
        _show(self._console, self._gateway.status())
        _show(self._console, self._gateway.detach())
        self._require_as_before(before)
        return self._checks

    def _drive_programs(self, scene: Scene) -> None:
        columns = ("who", "program", "internal", "seen outside as", "to")
        table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        with self._lab.capture(*self._lab.topology.wan_wire, _PRIVATE) as private:
            for step in STEPS:
                for contact in self._do(step, scene).contacts:
                    table.add_row(*dataclasses.astuple(contact))
            leaked = private.stop()
        if leaked:
            raise LabError(f"{len(leaked)} packets left with a private address", leaked[0].hex(" "))
        self._passed("no private address was ever on the public wire")
        self._console.print()
        self._console.print(table)
        self._console.print()

    def _do(self, step: Step, scene: Scene) -> Outcome:
        with self._console.status(f"{step.title}…"):
            outcome = step.run(scene)
        self._passed(step.title, outcome.words)
        return outcome

    def _require_as_before(self, before: set[str]) -> None:
        if changes := differences(before, snapshot(self._lab)):
            raise LabError("masq-gate is not as it was before attach", "\n".join(["", *changes]))
        kinds = "links, XDP, qdiscs, filters, offloads, addresses, routes, nftables, sysctls, processes"
        self._passed("masq-gate is as it was before", f"{len(before)} lines compared: {kinds}")

    def _passed(self, what: str, words: str = "") -> None:
        self._checks += 1
        remark = f" [dim]– {words}[/]" if words else ""
        self._console.print(f"[green]✓[/] {what}{remark}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """Hold the demo's name: an abstract socket, which goes with its process however that ends."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as claim:
        try:
            claim.bind(f"\0xdpmasq-demo-{name}")
        except OSError as error:
            raise LabError(f"the demo {name} cannot start", "it is running already") from error
        yield


def _environment(console: Console) -> dict[str, str]:
    """Lets the programs' own tables fit the console, and be as colourful."""
    if console.is_terminal:
        return {"COLUMNS": str(console.width), "FORCE_COLOR": "1"}
    return {"COLUMNS": str(_PIPED_COLUMNS)}


def _headline(console: Console, text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left", style="dim")


def _show(console: Console, reply: Reply) -> None:
    console.print(f"[bold cyan]#[/] [bold]{reply.command}[/]", highlight=False)
    if reply.output.strip():
        console.print(Text.from_ansi(reply.output.rstrip()), soft_wrap=True)
