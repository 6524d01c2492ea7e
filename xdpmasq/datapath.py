"""xdpmasq's own programs and tables: compiled, attached, found again, read and written.

The programs attached to the interfaces hold the maps, and nothing else does: nothing is pinned, so a
datapath lives until the last of its programs is detached, and a later process finds it from their ids.
What that process must know (layouts, settings, what to put back) stands as JSON in the map ``manifest``.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from xdpmasq import bpf, compiler, presence, source
from xdpmasq.errors import DatapathError, NotAttachedError
from xdpmasq.externals import PROTOCOLS, Exempt, Place
from xdpmasq.net import clsact, netdev
from xdpmasq.vlans import TAGS, Wire

Slots = npt.NDArray[np.uint32]
Role = Literal["lan", "wan", "lo", "other"]

FILTER = "xdpmasq"  # name of our filters on clsact
PRIORITY = 0x4D51  # after filters that users put at low numbers, before those that the kernel numbers itself
TC_HOOKS: tuple[bpf.TcHook, ...] = ("ingress", "egress")
PROGRAM = "masq_"  # prefix of our programs' names
CLASSES = ("tcp", "udp", "icmp")
CLASS_ROOM = 4
PORTS = 65536
EXTERNAL_SLOTS = len(CLASSES) * PORTS  # of one external address
FURTHER_BASE = EXTERNAL_SLOTS  # where there is one

# enum and #define values of bpf/types.h, flow.h and reaper.c
ROLES: dict[Role, int] = {"lo": 0, "lan": 1, "wan": 2, "other": 3}
XDP_FROM, XDP_TO = 1, 2
PREFIX_OWN, PREFIX_INTERNAL, PREFIX_PRIVATE = 1, 2, 3
LIFE_LIVE, LIFE_RESTING, LIFE_STATE, LIFE_SESSION, LIFE_STATIC, LIFE_FURTHER_MASK = 1, 2, 3, 4, 8, 0xFFFFFF00
REAP_EXPIRED, REAP_FORCED, REAP_RESTED, REAP_CLAIM, REAP_KEEP, REAP_YIELD, REAP_HOLD, REAP_TAKE, REAP_OPEN = range(9)
REAP_MAX = 16
FEW = 128  # sessions that are read one by one faster than the whole table is mapped
CHOICE_MAX, CHOICE_ADDR_AT, EXTERNAL_ROOM = 64, 32, 64

# Never routed on the Internet, so never to leave with such a source (RFC 6890).
PRIVATE = tuple(
    IPv4Network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
        *("172.16.0.0/12", "192.168.0.0/16"),
    )
)


@dataclass(frozen=True)
class Hook:
    """One place where a program of ours is attached."""

    kind: Literal["xdp", "ingress", "egress"]
    function: str


PUNT_HOOK = Hook("ingress", "masq_punt_in")
XDP_HOOK = Hook("xdp", "masq_xdp")  # on the device below, where the interface is a VLAN


def hooks(role: Role, *, xdp: bool, ethernet: bool, redirects: bool = False) -> tuple[Hook, ...]:
    """What belongs on an interface, in the order in which it is to be attached: the translation first.

    Args:
        redirects: some of what LANs send goes to the gateway itself.
    """
    suffix = "" if ethernet else "_l3"
    found: list[Hook] = []
    if role == "wan":
        found += [Hook("egress", f"masq_wan_out{suffix}"), Hook("ingress", f"masq_wan_in{suffix}")]
    elif role == "lo":
        found += [Hook("egress", "masq_lo_out")]
    else:
        found += [Hook("ingress", f"masq_lan_{'in' if redirects else 'lean'}{suffix}")]
        found += [Hook("egress", f"masq_lan_out{suffix}")] * (xdp or redirects)
    if xdp:
        found += [XDP_HOOK]
    return tuple(found)


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
        return 0 if choice is None else int(choice["external"][_addr_hash(host) * int(choice["count"]) >> 32])

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
            request = np.array([order, len(chunk)], np.uint32)
            # an EtherType for local experiments (IEEE 802), which keeps the kernel from reading more
            program.test_run(bytes(12) + b"\x88\xb5" + bytes(2) + request.tobytes() + chunk.tobytes())


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


def _addr_hash(address: IPv4Address) -> int:
    """``addr_hash`` of bpf/flow.h."""
    mixed = addr(address)[0][0] * 0x9E3779B1 & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 15) * 0x85EBCA6B & 0xFFFFFFFF
    return mixed ^ mixed >> 13


def addr(address: IPv4Address | None) -> tuple[tuple[int]]:
    """An ``addr_t`` for numpy: network byte order in memory."""
    return ((int.from_bytes(address.packed, "little") if address else 0,),)


def _defines(externals: int, wans: int) -> dict[str, int]:
    """What the programs are compiled for. Of external addresses one is a case of its own, any more are another."""
    return {"EXTERNALS": 1 if externals == 1 else EXTERNAL_ROOM, "WANS": wans}


def _sizes(further: int, externals: int) -> dict[str, int]:
    """Entries of the tables whose size is a setting."""
    mappings = externals * EXTERNAL_SLOTS
    slots = mappings + further
    return {
        "sessions": slots,
        "claims": slots // 64,
        "mappings": mappings,
        "buckets": slots // 4,  # half full when every slot has two entries
        "overflow": slots // 64,  # one entry in a hundred then finds its bucket full
    }


def compile_ahead() -> None:
    """Has the compiler's work for :class:`Programs` of the most usual kind done, and kept, before it is wanted."""
    compiler.compile(source.flatten(), _defines(1, 1))


class Programs:
    """The compiled datapath: its functions are loaded when first asked for.

    Args:
        further: how many slots for further sessions.
        maps: existing maps to use.
        externals: how many external addresses.
        wans: how many WANs.
        sizes: entries of tables, by name, where they are not to be as usual.
    """

    def __init__(
        self,
        further: int,
        maps: Mapping[str, bpf.Map] | None = None,
        externals: int = 1,
        wans: int = 1,
        *,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        self._kind = (externals, wans)
        self._sizes = _sizes(further, externals) | dict(sizes or {})
        self.maps = dict(maps or {})
        self._object = self._compile()
        self.maps |= self._object.maps
        self._loaded: dict[str, bpf.Program] = {}
        if maps is None:
            tables = Tables(self.maps)
            tables.set_settings(
                seed=[secrets.randbits(64) for _ in tables.settings["seed"]],
                externals=externals,
                further_base=externals * EXTERNAL_SLOTS,
                further=further,
                buckets=self._sizes["buckets"],
            )

    def _compile(self, **defines: int) -> bpf.Object:
        return bpf.compile(source.flatten(), _defines(*self._kind) | defines, self.maps, self._sizes)

    @cached_property
    def _without_ethernet(self) -> bpf.Object:
        """The functions for interfaces without Ethernet header; compiling takes its time, and few have such a one."""
        return self._compile(L3=1)

    @contextlib.contextmanager
    def being_last(self) -> Iterator[None]:
        """Inside the block a packet let through by one of the TC programs meets no other on that hook."""
        tables = Tables(self.maps)
        tables.set_settings(last=True)
        try:
            yield
        finally:
            tables.set_settings(last=False)

    @property
    def layouts(self) -> dict[str, list[Any]]:
        """Map name → [key, value] as JSON can carry them; see :func:`xdpmasq.compiler.layout`."""
        return self._object.layouts

    @property
    def loaded(self) -> dict[str, bpf.Program]:
        """Those that were asked for so far, by function."""
        return dict(self._loaded)

    def load(self, functions: Iterable[str]) -> None:
        """Loads several at once, each on a CPU of its own: the kernel takes up to a second to verify one."""
        wanted = list(functions)
        for function in wanted:
            self._compiled(function)  # before there are threads: the compiler does not survive a fork among them
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self.__getitem__, wanted))

    def _compiled(self, function: str) -> bpf.Object:
        return self._without_ethernet if function.endswith("_l3") else self._object

    def __getitem__(self, function: str) -> bpf.Program:
        """The loaded program, holding every map of the datapath."""
        if function not in self._loaded:
            kind = "xdp" if function.endswith("_xdp") else "tc"
            program = self._compiled(function).load(function, kind)
            for map_ in self.maps.values():
                program.bind(map_)
            self._loaded[function] = program
        return self._loaded[function]


class Attached(Tables):
    """A running datapath, found from its programs; works with the agent dead."""

    agent_pid: int | None = None

    @property
    def agent_alive(self) -> bool:
        return self.agent_pid is not None

    @property
    def wan_names(self) -> list[str]:
        """Its WANs by number, as they were named."""
        return wan_names(self.manifest)

    @property
    def hz(self) -> int:
        """Jiffies a second."""
        return int(self.manifest["hz"])

    def now(self) -> int:
        """Jiffies."""
        return bpf.jiffies()

    @classmethod
    def from_program(cls, program: bpf.Program) -> Self | None:
        """The datapath that a program of ours belongs to, or None when it is not ours."""
        raw = {}
        for number in program.map_ids():
            map_ = bpf.Map.by_id(number)
            raw[map_.name] = map_
        if "manifest" not in raw:
            return None
        text = {"manifest": _with_layout(raw["manifest"], "<u4", [("text", "u1", (65536,))])}
        layouts = cls(text).manifest.get("layouts", {})
        maps = {
            # the kernel cuts names to 15 characters
            name: _with_layout(raw[name[:15]], *map(compiler.layout, layout))
            for name, layout in layouts.items()
            if name[:15] in raw
        }
        return cls(maps) if maps else None

    def flush(self, slots: Slots) -> int:
        """Ends the sessions in ``slots`` now; returns how many of them were there."""
        before = len(np.intersect1d(self.live_slots(), slots))
        self.reap(self.reaper, slots, REAP_FORCED)
        self.disarm_flows(slots)
        return before - len(np.intersect1d(self.live_slots(), slots))

    @cached_property
    def reaper(self) -> bpf.Program:
        """The agent's own, or, when it is dead, one compiled for the occasion."""
        if self.agent_alive:
            return bpf.Program.by_id(self.manifest["reaper"])
        return Programs(self.further, self.maps, self.externals, self.wans)["masq_reap"]


def wan_names(manifest: Mapping[str, Any]) -> list[str]:
    """The WANs of a datapath by number, as they were named; of a former version's the only one."""
    return list(manifest.get("wans") or [manifest["wan"]])


def _with_layout(map_: bpf.Map, key: Any, value: Any) -> bpf.Map:
    map_.key, map_.value = np.dtype(key), np.dtype(value)
    return map_


def program_ids(link: netdev.Link) -> list[int]:
    """Ids of the programs on a link that may be ours: our filters', and whatever is on TCX and the XDP hook."""
    ids = [each.prog_id for each in clsact.filters(link.index) if each.name == FILTER]
    ids += [number for hook in TC_HOOKS for number in bpf.tcx_programs(link.index, hook)]
    return ids + ([link.xdp_prog_id] if link.xdp_prog_id else [])


def on_link(link: netdev.Link) -> list[Attached]:
    """The datapaths that have programs on a link; more than one only where one has it and another a VLAN of it."""
    return _of_programs(program_ids(link))


def on_xdp(link: netdev.Link) -> list[Attached]:
    """The datapath whose program is on the XDP hook of a link, if any."""
    return _of_programs([link.xdp_prog_id] if link.xdp_prog_id else [])


def _of_programs(numbers: Iterable[int]) -> list[Attached]:
    found: dict[int, Attached] = {}
    for number in numbers:
        # A program, or a map of its, may go while we look.
        with contextlib.suppress(FileNotFoundError), bpf.Program.by_id(number) as program:
            attached = Attached.from_program(program) if program.name.startswith(PROGRAM) else None
            if attached:
                found.setdefault(attached.maps["manifest"].id, attached)
    return list(found.values())


def find_all() -> list[Attached]:
    """Every datapath in this network namespace.

    One of which only the punt port is left has no interface, and goes with its agent.
    """
    links = [link for link in netdev.links() if not netdev.is_punt_port(link)]
    found = {each.maps["manifest"].id: each for link in links for each in on_link(link)}
    for attached in found.values():
        attached.agent_pid = presence.agent_pid(attached.manifest["wan"])
    return list(found.values())


def find(wan: str | None = None) -> Attached:
    """The running datapath, the one with this WAN when there are several.

    Raises:
        NotAttachedError: there is none, or no telling which is meant.
    """
    running = find_all()
    found = [each for each in running if wan is None or wan in each.wan_names]
    if running and not found:
        others = ", ".join(name for each in running for name in each.wan_names)
        raise NotAttachedError(f"xdpmasq is not attached to {wan}", f"here it runs on {others}", f"--wan {others}")
    if not found:
        why = "no program of ours is on an interface here"
        raise NotAttachedError("xdpmasq is not attached", why, "xdpmasq attach --wan … --lan …")
    if len(found) > 1:
        names = ", ".join(each.manifest["wan"] for each in found)
        raise NotAttachedError("xdpmasq runs more than once here", f"on {names}", "name one with --wan")
    return found[0]
