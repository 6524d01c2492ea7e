"""The IP-Masquerade HOWTO's network as a plan: who is wired to whom, and what each would type."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

DRAWING = """\
 a-box .2 ─┐                                        ┌─ .10 .11 internet
 b-box .3 ─┼─ switch ─ lan0 .1 masq-gate .1 wan0 ─ exchange
 c-box .4 ─┘                                        └─ .254 transit .1 ─ .10 far
 192.168.0.0/24                      203.0.113.0/24            198.51.100.0/24
"""
SECOND_LAN = " d-box .2 ─── switch ─ lan1 .1 masq-gate             192.168.1.0/24\n"
SECOND_WAN = " .1 wan1 ─── provider .254 on 192.0.2.0/24, .253 on exchange\n"
TUN_WAN = " wan0 is a TUN device, its line ends in transit, which answers ARP for .1\n"

HOSTS = {"a-box": "192.168.0.2", "b-box": "192.168.0.3", "c-box": "192.168.0.4", "d-box": "192.168.1.2"}
ROLES = (*HOSTS, "switch", "masq-gate", "exchange", "internet", "transit", "provider", "far")

PUBLIC = "203.0.113.1"  # masq-gate, as the Internet sees it
INTERNET = "203.0.113.10"
INTERNET_TOO = "203.0.113.11"
TRANSIT = "203.0.113.254"
PUBLIC_TOO = "192.0.2.1"  # masq-gate, by its second provider
PUBLIC_TOO_NETWORK = "192.0.2.0/24"
PROVIDER = "192.0.2.254"
PROVIDER_OUTSIDE = "203.0.113.253"
FAR = "198.51.100.10"
FAR_NETWORK = "198.51.100.0/24"


@dataclass(frozen=True)
class Cable:
    """A veth pair between two interfaces, each in the namespace of its role."""

    role: str
    interface: str
    other_role: str
    other_interface: str


@dataclass(frozen=True)
class Topology:
    """The network in the drawing, and its variants.

    internet has no route to 192.168.0.0/16: nothing that leaves masq-gate untranslated gets an answer.

    Args:
        lans: 2 adds lan1 with d-box.
        wan: ``tun`` makes wan0 a device without Ethernet header, as ppp has.
        wans: 2 adds wan1 with a second provider, which takes no packets with others' addresses. masq-gate has a
            default route by it, which comes after that by wan0.
        far_mtu: of the link between transit and far, for path-MTU discovery.
    """

    lans: Literal[1, 2] = 1
    wan: Literal["veth", "tun"] = "veth"
    far_mtu: int = 1500
    wans: Literal[1, 2] = 1

    @property
    def drawing(self) -> str:
        variants = SECOND_LAN * (self.lans == 2) + SECOND_WAN * (self.wans == 2) + TUN_WAN * (self.wan == "tun")
        return DRAWING + variants

    @property
    def hosts(self) -> tuple[str, ...]:
        """The boxes on the LANs."""
        return tuple(HOSTS)[: 2 + self.lans]

    @property
    def lan_interfaces(self) -> tuple[str, ...]:
        """masq-gate's."""
        return ("lan0", "lan1")[: self.lans]

    @property
    def wan_interfaces(self) -> tuple[str, ...]:
        """masq-gate's."""
        return ("wan0", "wan1")[: self.wans]

    @property
    def roles(self) -> tuple[str, ...]:
        absent = {*HOSTS} - {*self.hosts} | ({"provider"} if self.wans == 1 else set())
        return tuple(role for role in ROLES if role not in absent)

    @property
    def wan_wires(self) -> tuple[tuple[str, str], ...]:
        """Role and interface at the other end of each of masq-gate's WANs, where captures see the public side."""
        first = ("transit", "ppp0") if self.wan == "tun" else ("exchange", "masq-gate")
        return (first, ("provider", "eth0"))[: self.wans]

    @property
    def wan_wire(self) -> tuple[str, str]:
        """The first of them."""
        return self.wan_wires[0]

    def cables(self) -> Iterator[Cable]:
        """A switch's port is called after what is plugged into it."""
        for host in self.hosts:
            yield Cable(host, "eth0", "switch", host)
        for interface in self.lan_interfaces:
            yield Cable("masq-gate", interface, "switch", f"gate-{interface}")
        if self.wan == "veth":
            yield Cable("masq-gate", "wan0", "exchange", "masq-gate")
        if self.wans == 2:
            yield Cable("masq-gate", "wan1", "provider", "eth0")
            yield Cable("provider", "eth1", "exchange", "provider")
        yield Cable("internet", "eth0", "exchange", "internet")
        yield Cable("transit", "eth0", "exchange", "transit")
        yield Cable("transit", "eth1", "far", "eth0")

    def configuration(self) -> dict[str, list[str]]:
        """Each role's `ip` commands, in the order in which a person would type them."""
        return {**self._lan_side(), **self._public_side(), "masq-gate": self._gate()}

    def _lan_side(self) -> dict[str, list[str]]:
        boxes = {host: _box(HOSTS[host]) for host in self.hosts}
        switch = _bridge("br0", [*self.hosts[:3], "gate-lan0"])
        if self.lans == 2:
            switch += _bridge("br1", ["d-box", "gate-lan1"])
        return {**boxes, "switch": switch}

    def _gate(self) -> list[str]:
        wan = _line("wan0", PUBLIC, TRANSIT) if self.wan == "tun" else _interface("wan0", f"{PUBLIC}/24")
        lans = [_interface(name, f"192.168.{n}.1/24") for n, name in enumerate(self.lan_interfaces)]
        if self.wans == 2:
            wan += _interface("wan1", f"{PUBLIC_TOO}/24")
            wan += [f"route add default via {PROVIDER} dev wan1 metric 200"]
        return [*itertools.chain(*lans), *wan, f"route add default via {TRANSIT} dev wan0"]

    def _public_side(self) -> dict[str, list[str]]:
        plugged = ["internet", "transit", *["masq-gate"] * (self.wan == "veth"), *["provider"] * (self.wans == 2)]
        second = [f"route add {PUBLIC_TOO_NETWORK} via {PROVIDER_OUTSIDE}"] * (self.wans == 2)
        return {
            **({"provider": self._provider()} if self.wans == 2 else {}),
            "exchange": _bridge("br0", plugged),
            "internet": [
                *_interface("eth0", f"{INTERNET}/24", f"{INTERNET_TOO}/24"),
                f"route add {FAR_NETWORK} via {TRANSIT}",
                *second,
            ],
            "transit": [
                *_interface("eth0", f"{TRANSIT}/24"),
                *_interface("eth1", "198.51.100.1/24", mtu=self.far_mtu),
                *second,
                *(_line("ppp0", TRANSIT, PUBLIC) if self.wan == "tun" else []),
            ],
            "far": [
                *_interface("eth0", f"{FAR}/24", mtu=self.far_mtu),
                "route add default via 198.51.100.1",
            ],
        }

    def _provider(self) -> list[str]:
        return [
            *_interface("eth0", f"{PROVIDER}/24"),
            *_interface("eth1", f"{PROVIDER_OUTSIDE}/24"),
            f"route add {FAR_NETWORK} via {TRANSIT}",
        ]


def _interface(name: str, *addresses: str, mtu: int = 1500) -> list[str]:
    return [
        *(f"address add {address} dev {name}" for address in addresses),
        f"link set {name} mtu {mtu} up",
    ]


def _line(name: str, address: str, peer: str) -> list[str]:
    """A point-to-point line."""
    return [f"address add {address} peer {peer} dev {name}", f"link set {name} up"]


def _box(address: str) -> list[str]:
    network = address.rpartition(".")[0]
    return [*_interface("eth0", f"{address}/24"), f"route add default via {network}.1"]


def _bridge(name: str, ports: Sequence[str]) -> list[str]:
    """A switch that forwards from the first packet on, and sends nothing of its own."""
    plugs = [f"link set {port} master {name} up" for port in ports]
    return [f"link add {name} type bridge stp_state 0 mcast_snooping 0", *plugs, f"link set {name} up"]
