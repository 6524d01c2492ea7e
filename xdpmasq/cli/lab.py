"""``xdpmasq lab``: the HOWTO's network out of namespaces, to try, to watch and to test in."""

import os
import signal
import sys
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Literal, NoReturn, cast

import typer
from rich.console import Console

from xdpmasq.lab import Lab, programs
from xdpmasq.lab import demo as lab_demo
from xdpmasq.lab.errors import LabError
from xdpmasq.lab.servers import DnsServer, EchoServer, SshServer, WebServer

app = typer.Typer(
    help="A network out of namespaces to try xdpmasq in: hosts, a gateway, an Internet.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

_TRY = """\
In internet (203.0.113.10) run nginx, dnsmasq for *.lab.test, sshd and a UDP echo on port 7.
Make masq-gate masquerade, and look:

  {run} masq-gate -- xdpmasq attach --wan wan0 --lan lan0
  {run} a-box -- curl http://203.0.113.10/
  {run} b-box -- dig @203.0.113.10 www.lab.test
  {run} c-box -- traceroute -n 198.51.100.10
  {run} masq-gate -- xdpmasq sessions
  xdpmasq lab down{option}
"""
_DEFAULT_NAME = "masq-lab"

_NAME_HELP = "The lab's name, with which its namespaces' names begin."
NAME = typer.Option(_DEFAULT_NAME, "--name", help=_NAME_HELP)


class Wan(StrEnum):
    """What wan0 is."""

    VETH = "veth"
    TUN = "tun"


class Mode(StrEnum):
    """As in `xdpmasq attach --mode`."""

    AUTO = "auto"
    XDP = "xdp"
    TC = "tc"


class Gateway(StrEnum):
    """A key of the demo's gateways."""

    XDPMASQ = "xdpmasq"
    NFT = "nft"


LANS = typer.Option(1, min=1, max=2, help="2 adds lan1 with d-box.")
WAN = typer.Option(Wan.VETH, help="tun: a WAN without Ethernet header, as ppp is.")
WANS = typer.Option(1, min=1, max=2, help="2 adds wan1 with a second provider.")
FAR_MTU = typer.Option(1500, min=576, max=9000, help="MTU of the link between transit and far.")
OFFLOADS = typer.Option(False, help="Keep super-packets and partial checksums, which XDP on veth cannot take.")


@app.command()
def up(  # noqa: PLR0917  options
    name: str = NAME,
    lans: int = LANS,
    wan: Wan = WAN,
    wans: int = WANS,
    far_mtu: int = FAR_MTU,
    offloads: bool = OFFLOADS,
) -> None:
    """Build the network, start servers in it, and leave it running.

    Example: xdpmasq lab up --lans 2
    """
    programs.require("the lab", programs.BUILDING.items(), programs.SERVING.items())
    lab = Lab(
        name,
        lans=cast(Literal[1, 2], lans),
        wan=wan.value,
        far_mtu=far_mtu,
        wans=cast(Literal[1, 2], wans),
        offloads=offloads,
    )
    lab.up()
    try:
        for server in (WebServer, DnsServer, SshServer, EchoServer):
            server(lab)
        option = "" if name == _DEFAULT_NAME else f" --name {name}"
        print(lab.topology.drawing)
        print(_TRY.format(run=f"xdpmasq lab exec{option}", option=option))
    except BaseException:
        lab.down()
        raise


@app.command()
def down(name: str = NAME) -> None:
    """Remove the network and everything that runs in it.

    Example: xdpmasq lab down
    """
    lab = Lab(name)
    there = lab.is_up
    lab.down()
    print(f"{name} is removed" if there else f"{name} is not there: nothing to remove")


ROLE = typer.Argument(..., help="a-box, b-box, c-box, masq-gate, internet, transit, far…")
COMMAND = typer.Argument(..., help="The program and its arguments.")


@app.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def execute(role: str = ROLE, command: list[str] = COMMAND, name: str = NAME) -> None:
    """Run a program in one of the lab's boxes.

    Example: xdpmasq lab exec a-box -- curl http://203.0.113.10/
    """
    lab = Lab(name)
    # Click hands the dashes on where options may not follow arguments, as they may not here.
    argv = lab.argv(role, command[1:] if command[0] == "--" else command)
    if not lab.is_up:
        raise LabError(f"there is no lab {name}", "", "build it with `xdpmasq lab up`")
    # So that "xdpmasq" in a box is this xdpmasq, also when it was called out of a virtual environment.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.execvp(argv[0], argv)


MODES = typer.Option([], "--mode", help="May be given several times.", show_default=False)
GATEWAY = typer.Option(Gateway.XDPMASQ, help="nft: the same programs through the kernel's own masquerade.")
CPU = typer.Option(True, help="End with CPU time per packet beside nftables.")
DEMO_NAME = typer.Option("masq-demo", "--name", help=_NAME_HELP)


@app.command()
def demo(mode: list[Mode] = MODES, gateway: Gateway = GATEWAY, cpu: bool = CPU, name: str = DEMO_NAME) -> None:
    """Drive real programs through the gateway, show what it does, and check that nothing stays behind.

    Example: xdpmasq lab demo --mode xdp --no-cpu
    """
    # As with Ctrl-C, the lab is taken down on the way out.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    modes = mode or ([Mode.AUTO] if gateway is Gateway.NFT else [Mode.AUTO, Mode.XDP])
    lab_demo.run(Console(), name=name, gateway=gateway.value, modes=modes, cpu=cpu)


def _leave(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
