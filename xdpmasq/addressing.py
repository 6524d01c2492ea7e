"""Which addresses are ours, which are inside, and as which of them hosts are masqueraded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv4Network, collapse_addresses

import numpy as np

from xdpmasq import checks, wans
from xdpmasq.abi import (
    EXTERNAL_SLOTS,
    PREFIX_INTERNAL,
    PREFIX_OWN,
    PREFIX_PRIVATE,
    REAP_FORCED,
    addr,
)
from xdpmasq.config import Config
from xdpmasq.errors import InterfaceError
from xdpmasq.externals import Place
from xdpmasq.manifest import Manifest
from xdpmasq.net import routing
from xdpmasq.reaping import Reaping
from xdpmasq.tables import Tables
from xdpmasq.topology import Topology
from xdpmasq.upkeep import Upkeep

log = logging.getLogger("xdpmasq")

# Never routed on the Internet, so never to leave with such a source (RFC 6890).
PRIVATE = tuple(
    IPv4Network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
        *("172.16.0.0/12", "192.168.0.0/16"),
    )
)
END_TRIES = 10  # packets may join a stale mapping until it is closed


class Addressing:
    """External addresses and the roles of prefixes.

    Args:
        forwards: forwarded ports, which stand for an external address, too.
        reap: ends sessions.
        disarm: called after a change, as accelerated flows know the addresses before.
        before: the external addresses that an earlier agent had.
    """

    def __init__(
        self,
        config: Config,
        tables: Tables,
        manifest: Manifest,
        *,
        forwards: Upkeep,
        reap: Reaping,
        disarm: Callable[[], None],
        before: Iterable[Place],
    ) -> None:
        self._config, self._tables, self._manifest = config, tables, manifest
        self._forwards, self._reap, self._disarm = forwards, reap, disarm
        self._served: list[Place] = []  # the addresses that all sessions are of
        self._owners = {IPv4Network(place.address): place.wan for place in before if place.address}
        self._clash = ""  # what is wrong with the WANs' networks

    def follow(self, here: Topology, *, anyhow: bool) -> list[IPv4Address | None]:
        """Makes the tables know the addresses; returns for each WAN the one that it has for its hosts.

        Args:
            anyhow: an external address that no WAN has keeps nobody from going on.

        Raises:
            InterfaceError: no WAN has one of them, and none is to answer for it.
        """
        external = self._config.external
        default = 0 if external.answer_arp else None
        self._owners = wans.owners(external.named(), here.wans, self._owners, default=default)
        self._own_externals(here, anyhow=anyhow)
        self._tables.set_prefixes(self._prefixes(here))
        self._tables.set_counterparts(
            (each.internal, each.external, self._owners.get(each.external, 0)) for each in external.one_to_one
        )
        clashing = self._clashing(here)
        places, choices = external.places(wans.primaries(here.wans), self._owners)
        places = [Place(None, place.wan) if place.wan in clashing else place for place in places]
        now = [place.address for place in places[: len(here.wans)]]
        # While a WAN has none, its last address stays: it often comes back, and in the moment before we see that,
        # our own stack would answer its sessions with resets.
        before = self._served or self._tables.places
        places = [
            place if place.address or place.wan != old.wan or place.wan in clashing else old
            for place, old in zip(places, before, strict=True)
        ]
        if places != self._served:
            self._serve(places, before, choices)
        return now

    def _own_externals(self, here: Topology, *, anyhow: bool) -> None:
        """Sees to it that packets to the named external addresses come here."""
        outside, named = here.wans, self._config.external.named()
        lacking = [each for each in named if not any(wan.has(each) for wan in outside)]
        if lacking and not self._config.external.answer_arp:
            names = " and ".join(wan.name for wan in outside)
            if anyhow or not all(wan.primary for wan in outside):
                log.warning("%s does not have %s", names, ", ".join(map(str, lacking)))
                return
            has = ", ".join(sorted(str(each.ip.ip) for wan in outside for each in wan.own))
            raise InterfaceError(
                f"{lacking[0]} is no address of {names}",
                f"it has {has}",
                f"`ip addr add {lacking[0]} dev {outside[-1].name}`, or answer_arp = true in [external] for the "
                "gateway to answer for it (also where the provider routes it here)",
            )
        for network in lacking:
            link = outside[self._owners[network]].link
            if link and routing.local_route_add(network, link.index):
                self._manifest["local_routes"] = sorted({*self._manifest["local_routes"], str(network)})
                self._manifest.save()

    def _prefixes(self, here: Topology) -> dict[IPv4Network, int]:
        """Roles of source prefixes, the more specific winning: private, internal, the WAN's own addresses."""
        inside = {link.index for link in here.lans}
        roles = dict.fromkeys(PRIVATE, PREFIX_PRIVATE)
        routed = [route.prefix for route in routing.routes(4) if route.oif in inside and route.prefix.prefixlen]
        connected = [each.network for each in here.addresses if each.index in inside]
        networks = map(IPv4Network, (*routed, *connected, *self._config.internal))
        roles |= dict.fromkeys(collapse_addresses(networks), PREFIX_INTERNAL)
        own = [each.ip.ip for wan in here.wans for each in wan.own]
        roles |= dict.fromkeys(map(IPv4Network, (*self._config.external.shared, *own)), PREFIX_OWN)
        return roles

    def _clashing(self, here: Topology) -> set[int]:
        """WANs, by number, with a lease that came after the start and shares addresses with a LAN: then nothing is
        masqueraded there, in words.
        """
        errors = {
            number: error
            for number, wan in enumerate(here.wans)
            if wan.link and (error := checks.overlap(wan.link, here.lans, here.addresses))
        }
        clash = "; ".join(map(str, errors.values()))
        if clash and clash != self._clash:
            log.error("nothing is masqueraded there: %s", clash)
        self._clash = clash
        self._manifest["trouble"] = clash if len(errors) == sum(bool(wan.own) for wan in here.wans) else ""
        return set(errors)

    def _serve(
        self, places: list[Place], before: list[Place], choices: dict[tuple[int, IPv4Network], list[int]]
    ) -> None:
        """Masquerades as these from now on, in place of those before."""
        if any(place.wan != old.wan for place, old in zip(places, before, strict=True)):
            # The tables name a session by its WAN, so none may outlive that.
            kept = [
                place if place.wan == old.wan else Place(None, old.wan)
                for place, old in zip(places, before, strict=True)
            ]
            self._tables.set_externals(kept, choices)
            self._end_stale(kept)
        self._tables.set_externals(places, choices)
        self._end_stale(places)
        self._served = places
        log.info("external addresses: %s", ", ".join(str(each.address) for each in places if each.address) or "none")

    def _end_stale(self, places: list[Place]) -> None:
        """Ends the sessions and mappings of external addresses that are no longer ours."""
        tables, ended = self._tables, 0
        ours = np.array([addr(each.address)[0][0] for each in places], np.uint32)
        for _ in range(END_TRIES):
            slots = tables.open_slots()
            self._forwards.readdress()
            wanted = ours[tables.sessions["mapping"][slots] // EXTERNAL_SLOTS]
            stale = slots[tables.sessions["out"]["new_addr"]["word"][slots, 0] != wanted]
            if not len(stale):
                break
            ended += len(stale)
            # Further sessions first: a mapping closes with its last session.
            for each in (stale[stale >= tables.further_base], stale[stale < tables.further_base]):
                self._reap(each, REAP_FORCED)
        self._disarm()
        if ended:
            log.info("external addresses changed: %d sessions ended", ended)
