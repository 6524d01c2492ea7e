"""``xdpmasq lab``: the HOWTO's network out of namespaces, to try, to watch and to test in."""

import os
import signal
import sys
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal, NoReturn, cast

import typer
from rich.console import Console

from xdpmasq.lab import Lab
from xdpmasq.lab import demo as lab_demo
from xdpmasq.lab.errors import LabError
from xdpmasq.lab.servers import DnsServer, EchoServer, SshServer, WebServer

app = typer.Typer(
    help="A network out of namespaces to try xdpmasq in: hosts, a gateway, an Internet.", no_args_is_help=True
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

Name = Annotated[str, typer.Option(help="The lab's name, with which its namespaces' names begin.")]


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


@app.command()
def up(
    name: Name = _DEFAULT_NAME,
    lans: Annotated[int, typer.Option(min=1, max=2, help="2 adds lan1 with d-box.")] = 1,
    wan: Annotated[Wan, typer.Option(help="tun: a WAN without Ethernet header, as ppp is.")] = Wan.VETH,
    far_mtu: Annotated[
        int, typer.Option(min=576, max=9000, help="MTU of the link between transit and far.")
    ] = 1500,
    offloads: Annotated[
        bool, typer.Option(help="Keep super-packets and partial checksums, which XDP on veth cannot take.")
    ] = False,
) -> None:
    """Build the network, start servers in it, and leave it running.

    Example: xdpmasq lab up --lans 2
    """
    lab = Lab(name, lans=cast(Literal[1, 2], lans), wan=wan.value, far_mtu=far_mtu, offloads=offloads)
    lab.up()
    try:
        for server in (WebServer, DnsServer, SshServer, EchoServer):
            server(lab)
    except BaseException:
        lab.down()
        raise
    option = "" if name == _DEFAULT_NAME else f" --name {name}"
    print(lab.topology.drawing)
    print(_TRY.format(run=f"xdpmasq lab exec{option}", option=option))


@app.command()
def down(name: Name = _DEFAULT_NAME) -> None:
    """Remove the network and everything that runs in it.

    Example: xdpmasq lab down
    """
    lab = Lab(name)
    print(f"{name} is removed" if lab.is_up else f"{name} is not there: nothing to remove")
    lab.down()


@app.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def execute(
    role: Annotated[str, typer.Argument(help="a-box, b-box, c-box, masq-gate, internet, transit, far…")],
    command: Annotated[list[str], typer.Argument(help="The program and its arguments.")],
    name: Name = _DEFAULT_NAME,
) -> None:
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


@app.command()
def demo(
    mode: Annotated[list[Mode] | None, typer.Option(help="May be given several times.")] = None,
    gateway: Annotated[
        Gateway, typer.Option(help="nft: the same programs through the kernel's own masquerade.")
    ] = Gateway.XDPMASQ,
    cpu: Annotated[bool, typer.Option(help="End with CPU time per packet beside nftables.")] = True,
    name: Name = "masq-demo",
) -> None:
    """Drive real programs through the gateway, show what it does, and check that nothing stays behind.

    Example: xdpmasq lab demo --mode xdp --no-cpu
    """
    # As with Ctrl-C, the lab is taken down on the way out.
    signal.signal(signal.SIGTERM, _leave)
    modes = mode or ([Mode.AUTO] if gateway is Gateway.NFT else [Mode.AUTO, Mode.XDP])
    lab_demo.run(Console(), name=name, gateway=gateway.value, modes=modes, cpu=cpu)


def _leave(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
