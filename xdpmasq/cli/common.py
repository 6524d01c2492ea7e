"""What several verbs share: their options, and the ways to print.

Options are values and not annotations, and never Optional: typer 0.7 (Debian 12) knows neither
``Annotated`` nor ``str | None``. Empty means not given.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from xdpmasq.config import MODES, Config, Origin, from_options
from xdpmasq.configfile import from_origin
from xdpmasq.errors import HostError
from xdpmasq.health import wans_of

if TYPE_CHECKING:
    from xdpmasq.rates import Rates

WAN = typer.Option(
    [], "--wan", metavar="NAME", show_default=False,
    help="Interface towards the Internet; repeatable, the kernel's routing chooses among several.",
)  # fmt: skip
LAN = typer.Option(
    [], "--lan", metavar="NAME", show_default=False,
    help="Interface towards an internal network; repeatable, wildcards in quotes.",
)  # fmt: skip
MODE = typer.Option(
    "", "--mode", metavar="|".join(MODES), help="Where established flows are translated [auto].", show_default=False
)
CONFIG = typer.Option("", "--config", metavar="FILE", help="TOML file; options win over it.", show_default=False)
JSON = typer.Option(False, "--json", help="Print JSON, for scripts.")
WHICH = typer.Option("", "--wan", metavar="NAME", help="Which one, when several run here.", show_default=False)


@contextmanager
def busy(words: str) -> Iterator[None]:
    """Says so on the terminal, if it is one, for as long as it takes."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console  # noqa: PLC0415  heavy

    with Console(stderr=True).status(words):
        yield


def require_root(verb: str) -> None:
    """Raises HostError unless run as root."""
    if os.geteuid() != 0:
        raise HostError(f"xdpmasq {verb} must be run as root", "it works on the kernel's BPF programs and maps",
                        "run it with sudo")  # fmt: skip


def configuration(wans: Sequence[str], lans: Sequence[str], mode: str, file: str) -> Config:
    """What the options and the file they name want together."""
    if not file:
        return from_options(wans, lans, mode or None, None)
    return from_origin(Origin(str(Path(file).absolute()), tuple(wans), tuple(lans), mode))


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, default=str))


def print_blocks(blocks: Iterator[list[str]], between: str = "\n") -> None:
    """Prints many lines with few writes, ending with a newline when there are any."""
    separator = ""
    for block in blocks:
        sys.stdout.write(separator + between.join(block))
        separator = between
    sys.stdout.write("\n" if separator else "")


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def scaled(value: float, unit: str) -> str:
    """With three digits and the prefix that they want: ``94.1 Mbit/s``."""
    prefixes = ["", "k", "M", "G", "T"]
    while value >= 999.5 and len(prefixes) > 1:
        value /= 1000
        del prefixes[0]
    prefix = prefixes[0]
    digits = 0 if not prefix or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {prefix}{unit}"


def bit_rate(bytes_per_s: float) -> str:
    return scaled(8 * bytes_per_s, "bit/s")


def packet_rate(per_s: float) -> str:
    return scaled(per_s, "pps")


def traffic(measured: "Rates") -> Iterator[str]:
    """Of all sessions: ``out 94.1 Mbit/s 8.20 kpps``, the same in, and the share of the fast path."""
    out_packets, out_bytes, in_packets, in_bytes = measured.total.tolist()
    yield f"out {bit_rate(out_bytes)} {packet_rate(out_packets)}"
    yield f"in {bit_rate(in_bytes)} {packet_rate(in_packets)}"
    if measured.fast_share is not None:
        yield f"fast path {measured.fast_share:.1%}"


def duration(seconds: float) -> str:
    """The two largest units: ``3 d 4 h``, ``12 min 5 s``."""
    rest = int(max(seconds, 0))
    parts: list[str] = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, rest = divmod(rest, size)
        if count or parts or unit == "s":
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def moment(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))


def interface_lines(interfaces: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line an interface: its role, the hook that translates, and why that one."""
    width = max((len(each["name"]) for each in interfaces), default=0)
    return [f"{each['name']:{width}}  {each['role']:3}  {each['hook']:3}  {each['why']}" for each in interfaces]


def as_whom(wan: tuple[str, str | None]) -> str:
    name, address = wan
    return f"{name} as {address}" if address else f"{name} once it has an address"


def summary_lines(status: Mapping[str, Any]) -> list[str]:
    """What attach did, in a few lines."""
    first = f"masquerading {', '.join(status['lans'])} out of {', '.join(map(as_whom, wans_of(status)))}"
    interfaces = status.get("interfaces", ())
    lines = [first, *(f"  {line}" for line in interface_lines(interfaces))]
    if not any(each["role"] == "lan" for each in interfaces):
        lines.append(f"  no interface fits {', '.join(status['lans'])} yet; what comes will be taken in")
    return lines
