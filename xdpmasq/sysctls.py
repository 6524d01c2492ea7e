"""The sysctls that make a host a router, and putting them back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from xdpmasq.errors import HostError
from xdpmasq.net import netdev, sysctl

FORWARDING, LIBERAL = "net.ipv4.ip_forward", "net.netfilter.nf_conntrack_tcp_be_liberal"
ACCEPT_LOCAL = "net.ipv4.conf.lo.accept_local"
RP_FILTER = "net/ipv4/conf/{}/rp_filter"
STRICT, LOOSE = 1, "2"  # its values


class Sysctls:
    """Sets what is needed.

    Args:
        manifest: where former values are noted, under ``sysctls`` and ``side_effects``.
        save: called before each change, to make the note outlive this process.
    """

    def __init__(self, manifest: dict[str, Any], save: Callable[[], None]) -> None:
        self._manifest, self._save = manifest, save
        self._done: set[str] = set()
        self._loose: set[int] = set()

    def apply(self, *, accelerated: bool, hairpins_own: bool, loose: Mapping[int, str]) -> None:
        """Turns the host into a router; what it was before goes to the manifest first.

        Each is set once, as soon as it is there (conntrack may be loaded later): what is made of it then stays.

        Args:
            loose: interfaces, by index, where packets come from remotes to which the way leads elsewhere.
        """
        wanted = {FORWARDING}
        if accelerated:
            # conntrack, where a firewall uses it, sees only a packet now and then of accelerated connections.
            wanted.add(LIBERAL)
        if hairpins_own:
            # What a forward's host answers the gateway comes back through lo, from the gateway's own address.
            wanted.add(ACCEPT_LOCAL)
        for name in wanted - self._done:
            before = sysctl.read(name)
            if before is None:
                continue
            self._done.add(name)
            self._set(name, before)
        for index in loose.keys() - self._loose:
            self._loose.add(index)
            name = RP_FILTER.format(loose[index])
            before = sysctl.read(name)
            if before and is_strict(loose[index]):
                self._set(name, before)

    def _set(self, name: str, before: str) -> None:
        if before == _wanted(name):
            return
        self._manifest["sysctls"].setdefault(name, before)
        if name == FORWARDING:
            self._manifest["side_effects"] = _side_effects()
        self._save()
        sysctl.write(name, _wanted(name))


def is_strict(interface: str) -> bool:
    """Whether rp_filter lets in only what would be answered by that interface; the higher of two values counts."""
    return max(int(sysctl.read(RP_FILTER.format(name)) or 0) for name in ("all", interface)) == STRICT


def _wanted(name: str) -> str:
    return LOOSE if name.endswith("rp_filter") else "1"


def _side_effects() -> dict[str, str]:
    """Sysctls that ip_forward overwrites, and that do not come back with it (inet_forward_change in the kernel)."""
    names = ["default", *(link.name for link in netdev.links())]
    come_back = {"net/ipv4/conf/all/accept_redirects": "1"}
    come_back |= {f"net/ipv4/conf/{name}/forwarding": "0" for name in names}
    now = {name: sysctl.read(name) for name in come_back}
    return {name: value for name, value in now.items() if value is not None and value != come_back[name]}


def inherit(manifest: dict[str, Any], others: Iterable[Mapping[str, Any]]) -> None:
    """Notes what other datapaths here have found, so that whichever goes last can put it back."""
    for other in others:
        manifest["sysctls"] = {**other["sysctls"], **manifest["sysctls"]}
        manifest["side_effects"] = {**other.get("side_effects", {}), **manifest.get("side_effects", {})}


def restore(manifest: dict[str, Any], others: Iterable[Mapping[str, Any]] = ()) -> dict[str, str]:
    """Puts back what is still as we set it; what somebody has changed since is theirs, and what ``others`` have noted
    they still need.
    """
    needed = {name for other in others for name in other["sysctls"]}
    noted = {name: value for name, value in manifest["sysctls"].items() if name not in needed}
    ours = {name: value for name, value in noted.items() if sysctl.read(name) == _wanted(name)}
    for name, value in {**ours, **(manifest.get("side_effects", {}) if FORWARDING in ours else {})}.items():
        with contextlib.suppress(HostError):  # gone with its interface
            sysctl.write(name, value)
    return ours
