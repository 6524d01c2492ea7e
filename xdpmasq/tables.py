"""The maps of a datapath, read and written with types, by whoever holds them."""

from __future__ import annotations

import itertools
import json
import socket
import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import numpy as np
import numpy.typing as npt

from xdpmasq import bpf, source
from xdpmasq.abi import (
    CHOICE_ADDR_AT,
    CHOICE_MAX,
    EXTERNAL_ROOM,
    LIFE_LIVE,
    LIFE_SESSION,
    LIFE_STATE,
    LIFE_STATIC,
    REAP_MAX,
    REAP_TAKE,
    ROLES,
    XDP_FROM,
    XDP_TO,
    Role,
    Slots,
    addr,
    addr_hash,
)
from xdpmasq.errors import DatapathError
from xdpmasq.externals import PROTOCOLS, Exempt, Place
from xdpmasq.net import netdev
from xdpmasq.vlans import TAGS, Wire

FEW = 128  # sessions that are read one by one faster than the whole table is mapped


class Tables:
    """Typed access to the maps of one datapath, by whoever holds them."""

    def __init__(self, maps: Mapping[str, bpf.Map]) -> None:
        self.maps = dict(maps)

    @cached_property
    def sessions(self) -> bpf.Array:
        """``struct session`` by slot, over the kernel's own memory."""
        return self.maps["sessions"].view()

    def rows(self, slots: Slots) -> bpf.Array:
        """Copies of ``struct session`` in these slots."""
        if len(slots) <= FEW and "sessions" not in self.__dict__:
            return np.array([self.maps["sessions"].get(slot) for slot in slots.tolist()], self.maps["sessions"].value)
        raw = self.sessions.view(
            f"V{self.sessions.itemsize}"
        )  # whole records copy several times faster than fields do
        return raw[slots].view(self.sessions.dtype)

    def let_go(self) -> None:
        """Gives up :attr:`sessions` until they are next asked for: a large table, mapped, counts as the process's."""
        self.__dict__.pop("sessions", None)

    @cached_property
    def claims(self) -> npt.NDArray[np.uint64]:
        """One bit per slot: taken, or outside the pool."""
        return self.maps["claims"].view()

    @cached_property
    def rules(self) -> bpf.Array:
        """``struct forward`` by index, over the kernel's own memory; no target: free."""
        return self.maps["forward_rules"].view()

    @cached_property
    def leases(self) -> bpf.Array:
        """``struct lease`` by index of the rule, over the kernel's own memory."""
        return self.maps["leases"].view()

    @property
    def settings(self) -> Any:
        """``struct settings`` as a numpy scalar; a copy."""
        return self.maps["settings"].get(0)

    @cached_property
    def externals(self) -> int:
        """How many external addresses there is room for."""
        return int(self.settings["externals"])

    @cached_property
    def wans(self) -> int:
        """How many WANs there may be."""
        return len(self.settings["exit"])

    @property
    def further_base(self) -> int:
        """The first slot for further sessions."""
        return int(self.settings["further_base"])

    @property
    def further(self) -> int:
        """How many further sessions there is room for."""
        return int(self.settings["further"])

    def set_settings(self, **fields: Any) -> None:
        """Changes some fields of ``struct settings``; only the agent writes it."""
        settings = self.settings
        for name, value in fields.items():
            settings[name] = value
        self.maps["settings"].set(0, settings)

    @property
    def manifest(self) -> dict[str, Any]:
        """What the agent left for later processes; empty while a datapath is being built."""
        text = bytes(self.maps["manifest"].get(0)["text"]).split(b"\0")[0]
        return dict(json.loads(text)) if text else {}

    @manifest.setter
    def manifest(self, fields: Mapping[str, Any]) -> None:
        text = json.dumps(fields).encode()
        value = np.zeros((), self.maps["manifest"].value)
        if len(text) >= value.nbytes:
            raise DatapathError("the manifest is too long", f"{len(text)} bytes", "name fewer interfaces")
        value["text"] = np.frombuffer(text.ljust(value.nbytes, b"\0"), value["text"].dtype)
        self.maps["manifest"].set(0, value)

    def counters(self) -> dict[str, int]:
        """Every counter by name, summed over CPUs."""
        table = self.maps["counters"]
        return {name: int(table.get(i).sum()) for i, name in enumerate(self.counter_names)}

    def translations(self) -> dict[tuple[int, str], tuple[int, int]]:
        """Packets and IP bytes translated, by WAN and counter name; what passes no WAN is with the first one's."""
        if (table := self.maps.get("translations")) is None:
            return {}  # a running datapath of an earlier version
        kinds = [name for name in self.counter_names if name.startswith(("fast_", "slow_"))]
        places = itertools.product(range(self.wans), kinds)
        sums = (table.get(place) for place in range(table.max_entries))
        return {
            place: (int(each["packets"].sum()), int(each["bytes"].sum()))
            for place, each in zip(places, sums, strict=True)
        }

    @cached_property
    def counter_names(self) -> list[str]:
        """Of every counter, in the order of the C enum."""
        # A running datapath of another version has its own list.
        return list(self.manifest.get("counters") or source.counters())

    def used_slots(self, reserved: npt.NDArray[np.uint64] | None = None) -> Slots:
        """Slots whose bit is set, without those ``reserved`` (a bitmap like :attr:`claims`)."""
        claims = self.claims.copy() if reserved is None else self.claims & ~reserved
        words = np.flatnonzero(claims)
        bits = np.unpackbits(claims[words].view(np.uint8).reshape(len(words), 8), axis=1, bitorder="little")
        word, bit = np.nonzero(bits)
        return (words[word] * 64 + bit).astype(np.uint32)

    def live_slots(self) -> Slots:
        """Slots that hold a session, expired ones that are not reaped yet included."""
        slots = self.used_slots()
        life = self.sessions["life"][slots]
        live: Slots = slots[(life & LIFE_STATE == LIFE_LIVE) & (life & LIFE_SESSION != 0)]
        return live

    def open_slots(self) -> Slots:
        """Slots of :meth:`live_slots`, and of mappings that only further sessions use."""
        slots = self.used_slots()
        opened: Slots = slots[self.sessions["life"][slots] & LIFE_STATE == LIFE_LIVE]
        return opened

    def given_slots(self) -> Slots:
        """Slots that are in use or resting, without those of forwarded ports."""
        slots = self.used_slots()
        life = self.sessions["life"][slots]
        given: Slots = slots[(life & LIFE_STATE != 0) & (life & LIFE_STATIC == 0)]
        return given

    def disarm(self) -> None:
        """Sends every accelerated flow once through the kernel, to learn its next hop anew."""
        self.set_settings(disarmed_at=bpf.jiffies())

    def disarm_flows(self, slots: Slots) -> None:
        """The same for the sessions in these slots, by whoever is not the agent, whose settings are."""
        for side in ("out", "in"):
            self.sessions[side]["armed_at"][slots] = self.settings["disarmed_at"]

    def set_prefixes(self, wanted: Mapping[IPv4Network, int]) -> None:
        """Makes ``prefixes`` hold exactly these roles; what stays is never absent meanwhile."""
        table = self.maps["prefixes"]
        keys = {network: _prefix_key(network) for network in wanted}
        for network, role in wanted.items():
            table.set(keys[network], role)
        keep = {np.asarray(key, table.key).tobytes() for key in keys.values()}
        present = [key for chunk, _ in table.items(chunk=table.max_entries) for key in chunk]
        for key in present:
            if key.tobytes() not in keep:
                table.delete(key)

    def wan_of(self, index: int) -> int:
        """The number of the WAN that an interface is; 0 of one that is none."""
        row = self.maps["interfaces"].get(index)
        return 0 if row is None else int(row["wan"])

    def role_of(self, address: IPv4Address) -> int:
        """The role of the most specific prefix that an address is in; 0: foreign."""
        return int(self.maps["prefixes"].get(_prefix_key(IPv4Network(address))) or 0)

    def prefixes_of(self, role: int) -> list[IPv4Network]:
        """All prefixes of a role."""
        found = []
        for keys, roles in self.maps["prefixes"].items(chunk=self.maps["prefixes"].max_entries):
            for key in keys[roles == role]:
                found.append(IPv4Network((key["addr"]["word"][:1].tobytes(), int(key["bits"]))))
        return sorted(found)

    @property
    def places(self) -> list[Place]:
        """The addresses to masquerade as, by index."""
        settings = self.settings
        room = self.externals
        words, wans = settings["external"]["word"][:room, 0], settings["external_wan"][:room]
        addresses = [IPv4Address(word.tobytes()) if word else None for word in words]
        return [Place(address, int(wan)) for address, wan in zip(addresses, wans, strict=True)]

    def set_externals(
        self, places: Sequence[Place], choices: Mapping[tuple[int, IPv4Network], Sequence[int]]
    ) -> None:
        """The addresses to masquerade as; and by WAN and internal prefix which of them, by index, hosts may have."""
        self.set_settings(
            external=_padded([addr(each.address) for each in places], EXTERNAL_ROOM, addr(None)),
            external_wan=_padded([each.wan for each in places], EXTERNAL_ROOM),
        )
        index = {addr(each.address): nth for nth, each in reversed([*enumerate(places)]) if each.address}
        _replace(self.maps["externals"], index)
        fields = {}
        for (wan, network), some in choices.items():
            fields[_choice_key(wan, network)] = (len(some), _padded(some, CHOICE_MAX))
        _replace(self.maps["choices"], fields)

    def external_of(self, host: IPv4Address, wan: int = 0) -> int:
        """The index of the address as which a host appears by a WAN; ``external_for`` of bpf/flow.h."""
        if self.externals == 1:
            return 0
        choice = self.maps["choices"].get(_choice_key(wan, IPv4Network(host)))
        return 0 if choice is None else int(choice["external"][addr_hash(host) * int(choice["count"]) >> 32])

    def set_counterparts(self, pairs: Iterable[tuple[IPv4Network, IPv4Network, int]]) -> None:
        """Prefixes that are translated one to one: internal, external, and the WAN of that."""
        fields = {}
        for internal, external, wan in pairs:
            mask = addr(internal.netmask)
            fields[_prefix_key(internal)] = (addr(external.network_address), mask, wan)
            fields[_prefix_key(external)] = (addr(internal.network_address), mask, wan)
        _replace(self.maps["counterparts"], fields)
        self.set_settings(basic=bool(fields))

    def set_exempts(self, exempts: Iterable[Exempt]) -> None:
        """Destinations that are not translated for."""
        by_destination: dict[IPv4Network, list[Exempt]] = {}
        for each in exempts:
            by_destination.setdefault(each.destination, []).append(each)
        fields = {}
        for destination, some in by_destination.items():
            record = np.zeros((), self.maps["exempts"].value)
            if all(each.protocol for each in some):
                record["count"] = len(some)
                for nth, each in enumerate(some):
                    record["ports"][nth] = (PROTOCOLS[each.protocol or ""], 0, each.first, each.last)
            fields[_prefix_key(destination)] = record
        _replace(self.maps["exempts"], fields)

    def set_interface(
        self,
        link: netdev.Link,
        role: Role,
        *,
        xdp_from: bool,
        xdp_to: bool,
        mss: int = 0,
        wan: int = 0,
        wire: Wire | None = None,
        network: IPv4Network | None = None,
        redirect_to: IPv4Address | None = None,
    ) -> None:
        """Tells the programs of an interface; ``xdp_to`` also makes it a target of redirects.

        Args:
            mss: what new TCP connections are clamped to, in bytes; 0: nothing.
            wan: number of the WAN, of several.
            wire: where its frames pass, if not on itself.
            network: of a LAN, whose hosts need no second look.
            redirect_to: its own address, where what comes from this LAN is redirected.
        """
        wire = wire or Wire(link)
        mac = np.frombuffer(link.mac.ljust(6, b"\0")[:6], np.uint16)
        flags = XDP_FROM * xdp_from | XDP_TO * xdp_to
        if xdp_to:
            self.maps["transmitters"].set(link.index, wire.device.index)
        fields = (mac, ROLES[role], flags, min(link.mtu, wire.mtu), mss, wan, len(wire.tags), _tags(wire))
        home = (addr(network.network_address), addr(network.netmask)) if network else (addr(None), addr(None))
        self.maps["interfaces"].set(link.index, (*fields, *home, addr(redirect_to)))

    def unset_interface(self, index: int) -> None:
        self.maps["interfaces"].set(index, np.zeros((), self.maps["interfaces"].value))
        self.maps["transmitters"].delete(index)

    def set_vlans(self, indices: Mapping[Wire, int]) -> None:
        """By their wire, the VLAN devices that XDP serves."""
        _replace(self.maps["vlans"], {(wire.device.index, *_tags(wire)): index for wire, index in indices.items()})

    def reap(self, program: bpf.Program, slots: Slots, order: int) -> None:
        """Has the kernel change ``slots`` by an order of ``enum reap_order``."""
        for start in range(0, len(slots), REAP_MAX):
            chunk = np.ascontiguousarray(slots[start : start + REAP_MAX], np.uint32)
            program.test_run(_reap_request(order, len(chunk), chunk.tobytes()))

    def take(self, program: bpf.Program, slot: int, address: IPv4Address, port: int) -> bool:
        """Has the kernel give an internal endpoint a port that is nobody's, for good; False: it is somebody's."""
        taken = struct.pack("=I4s", slot, address.packed) + struct.pack("!H2x", port)
        return bool(program.test_run(_reap_request(REAP_TAKE, 1, taken)).verdict)


def _reap_request(order: int, count: int, what: bytes) -> bytes:
    """``struct reap_request`` of bpf/reaper.c, and what follows it.

    The frame has an EtherType for local experiments (IEEE 802), which keeps the kernel from reading more.
    """
    return bytes(12) + b"\x88\xb5" + bytes(2) + struct.pack("=II", order, count) + what


def _replace(table: bpf.Map, wanted: Mapping[Any, Any]) -> None:
    """Makes a table hold exactly these; what stays is never absent meanwhile."""
    keep = set()
    for key, value in wanted.items():
        table.set(key, value)
        keep.add(np.asarray(key, table.key).tobytes())
    for key in [key for chunk, _ in table.items(chunk=table.max_entries) for key in chunk]:
        if key.tobytes() not in keep:
            table.delete(key)


def _tags(wire: Wire) -> list[tuple[int, int]]:
    """``struct tag`` for each place, in network byte order."""
    tags = [(socket.htons(tag.tpid), socket.htons(tag.vid)) for tag in wire.tags]
    return [*tags, *[(0, 0)] * (TAGS - len(tags))]


def _padded(values: Sequence[Any], length: int, nothing: Any = 0) -> list[Any]:
    return [*values, *[nothing] * (length - len(values))]


def _choice_key(wan: int, network: IPv4Network) -> tuple[int, int, tuple[tuple[int]]]:
    return (CHOICE_ADDR_AT + network.prefixlen, wan, addr(network.network_address))


def _prefix_key(network: IPv4Network) -> tuple[int, tuple[tuple[int]]]:
    return (network.prefixlen, addr(network.network_address))
