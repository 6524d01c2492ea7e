"""``xdpmasq trace``: what becomes of one host's packets, and why."""

import sys
import time
from collections import Counter
from ipaddress import IPv4Address

import typer

from xdpmasq.cli import common
from xdpmasq.errors import UsageError

POLL_S = 0.05

INTERNAL = typer.Option(..., "--internal", metavar="ADDR", help="The internal host.", show_default=False)
PORT = typer.Option(0, "--port", metavar="PORT", help="Only this port of its.", show_default=False)
PROTOCOL = typer.Option(
    "", "--protocol", "--proto", metavar="tcp|udp|…", help="Only this protocol.", show_default=False
)
REMOTE = typer.Option(
    "", "--remote", metavar="ENDPOINT", help="Only with this remote: ADDR, ADDR/BITS, ADDR:PORT or :PORT.",
    show_default=False,
)  # fmt: skip
SECONDS = typer.Option(10.0, "--seconds", metavar="S", help="For so long.")
COUNT = typer.Option(0, "--count", metavar="N", help="Until so many packets were seen.", show_default=False)


def trace(
    *,
    internal: str = INTERNAL,
    port: int = PORT,
    protocol: str = PROTOCOL,
    remote: str = REMOTE,
    seconds: float = SECONDS,
    count: int = COUNT,
    wan: str = common.WHICH,
    json: bool = common.JSON,
) -> None:
    """Show what becomes of a host's packets at each hook, and why.

    A packet from inside comes by the LAN (lan0 in), then the kernel routes and filters it, and it leaves by the WAN
    (wan0 out), translated. Answers come the other way. Where a packet was changed it is shown before and after; what
    decided is named by its counters. Packets from outside that do not get in are shown where the port that they came
    to is the host's: by a mapping, or by a forward.

    Meanwhile all packets of the host go the slow way, so that none is missed. Only one trace can run at a time.

    \b
    Examples:
      xdpmasq trace --internal 192.168.0.2 --protocol udp --port 3074
      xdpmasq trace --internal 192.168.0.2 --remote :443 --count 20 --json
    """
    common.require_root("trace")
    try:
        host = IPv4Address(internal)
    except ValueError as error:
        raise UsageError(f"--internal {internal} is no host", str(error), "give its address: 192.168.0.2") from error
    if seconds <= 0 or not 0 <= port < 65536 or count < 0:
        raise UsageError("there is no such trace", "", "--seconds and --count are above 0, and ports end at 65535")
    from xdpmasq import datapath, tracing  # noqa: PLC0415  heavy
    from xdpmasq.selection import Endpoint  # noqa: PLC0415  heavy

    if protocol and protocol.lower() not in tracing.PROTOCOL_NAMES:
        raise UsageError(f"there is no protocol {protocol}", "", f"give one of {', '.join(tracing.PROTOCOL_NAMES)}")
    interest = tracing.Interest(protocol.lower(), port or None, Endpoint.parse(remote))
    attached = datapath.find(wan or None)
    seen: Counter[tuple[str, str]] = Counter()
    others = 0
    tracer = tracing.Tracer(attached, host, interest.port)
    try:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not (count and seen.total() >= count):
            time.sleep(POLL_S)
            for sight in tracer.read():
                if sight not in interest:
                    others += 1
                elif not count or seen.total() < count:
                    seen[sight.hook, sight.verdict] += 1
                    print(sight.json() if json else "\n".join(sight.lines()))
            sys.stdout.flush()
    finally:
        tracer.close()
    if not json:
        print(f"{common.plural(seen.total(), 'packet')} at {common.plural(len({hook for hook, _ in seen}), 'hook')}")
    for line in (
        tracing.conclusion(seen, host, others),
        f"{tracer.lost:,} more came too fast" if tracer.lost else "",
    ):
        if line:
            print(line, file=sys.stderr if json else sys.stdout)
