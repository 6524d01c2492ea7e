"""What can masquerade in masq-gate: xdpmasq by its command line, or the kernel to compare with."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from xdpmasq.background import START_S
from xdpmasq.lab import nft
from xdpmasq.lab.lab import Lab


@dataclass(frozen=True)
class Reply:
    """A command as a user types it on a router, and what it answered."""

    command: str
    output: str


class Gateway(Protocol):
    """What the demo does with whatever masquerades."""

    title: str

    def attach(self) -> Reply: ...
    def sessions(self) -> Reply: ...
    def status(self) -> Reply: ...
    def detach(self) -> Reply: ...


class Xdpmasq:
    """xdpmasq, driven as on a real router: only through its command line.

    Args:
        mode: for ``attach --mode``; "auto" is not spelled out, as most users will not.
        environment: added to this process's, so that tables fit the terminal they end up on.
    """

    def __init__(self, lab: Lab, mode: str, environment: Mapping[str, str]) -> None:
        self.title = "xdpmasq, choosing by itself" if mode == "auto" else f"xdpmasq --mode {mode}"
        self._lab = lab
        self._mode = mode
        self._environment = {**os.environ, **environment}

    def attach(self) -> Reply:
        mode = () if self._mode == "auto" else ("--mode", self._mode)
        lans = [word for lan in self._lab.topology.lan_interfaces for word in ("--lan", lan)]
        wans = [word for wan in self._lab.topology.wan_interfaces for word in ("--wan", wan)]
        return self._run("attach", *wans, *lans, *mode)

    def sessions(self) -> Reply:
        return self._run("sessions", "list")

    def status(self) -> Reply:
        return self._run("status")

    def detach(self) -> Reply:
        return self._run("detach")

    def _run(self, *words: str) -> Reply:
        argv = [sys.executable, "-m", "xdpmasq", *words]
        done = self._lab.exec("masq-gate", argv, env=self._environment, timeout_s=START_S)
        return Reply(" ".join(["xdpmasq", *words]), done.stdout)


class KernelMasquerade:
    """nftables masquerade; the mode does not matter."""

    title = "nftables masquerade, to compare with"

    def __init__(self, lab: Lab, mode: str, environment: Mapping[str, str]) -> None:
        self._lab = lab

    def attach(self) -> Reply:
        nft.masquerade_on(self._lab)
        return self._run("nft", "list", "ruleset")

    def sessions(self) -> Reply:
        return self._run("conntrack", "-L")

    def status(self) -> Reply:
        return self._run("conntrack", "-S")

    def detach(self) -> Reply:
        nft.masquerade_off(self._lab)
        return Reply(f"nft delete table ip {nft.TABLE}", "")

    def _run(self, *argv: str) -> Reply:
        return Reply(" ".join(argv), self._lab.exec("masq-gate", argv).stdout)


GATEWAYS: dict[str, Callable[[Lab, str, Mapping[str, str]], Gateway]] = {
    "xdpmasq": Xdpmasq,
    "nft": KernelMasquerade,
}
