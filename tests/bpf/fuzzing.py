"""Mutated packets by the million: `make fuzz-packets`, and a smaller number of them in test_fuzz.py.

fuzz.c mutates, runs the programs and holds each run against the rules; here is what it starts from: a gateway with
sessions, forwards, redirects and all else that packets may meet, and every kind of packet for every program. A round
ends with a look whether the tables agree with each other; the next one has a gateway with other settings.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from harness import (
    ACK,
    FIN,
    GATEWAY,
    GATEWAY_INSIDE,
    HAIRPIN_MARK,
    HOST,
    HOST_MAC,
    INTERNAL,
    LAN_MAC,
    LOOPBACK,
    NETWORK,
    NEXT_HOP_MAC,
    OTHER_HOST,
    OTHER_SERVER,
    POOL,
    PREFIXES,
    ROUTER,
    RST,
    SERVER,
    SYN,
    WAN_MAC,
    Bench,
    Gateway,
    echo,
    echo_reply,
    namespace_of,
    tcp,
    udp,
    wire,
)
from scapy.layers.inet import ICMP, IP, TCP, IPOption_RR
from scapy.packet import Packet, Raw

from xdpmasq import abi, algs, bpf, redirects, triggers
from xdpmasq.alg import switches
from xdpmasq.compiler import MapPlan
from xdpmasq.lab import netns
from xdpmasq.net import netdev
from xdpmasq.programs import Programs

ROUND = 250_000  # packets; in a second or two the gateway has met what its settings let it meet
OPTIONS = [IPOption_RR(length=11, pointer=4, routers=["0.0.0.0"] * 2)]
# Where there is no Ethernet header, the kernel looks for the EtherType of IPv4 in what is the source address then.
BARE_INTERNAL, BARE_HOST, BARE_SERVER = IPv4Network("8.0.0.0/17"), "8.0.0.2", "8.0.200.1"
BASIC_HOST, BASIC_EXTERNAL = "192.168.0.9", "203.0.113.9"
GATEWAY_TOO, PROVIDER = "192.0.2.1", "192.0.2.254"
SECOND_WAN = (
    "link add far0 address 02:00:00:00:02:01 type veth peer name far1",
    *(f"link set {name} up" for name in ("far0", "far1")),
    f"addr add {GATEWAY_TOO}/24 dev far0",
    f"neigh add {PROVIDER} lladdr {NEXT_HOP_MAC} dev far0 nud permanent",
)
ALG = algs.Use("ftp", (("tcp", 21), ("udp", 69)), (IPv4Network("192.168.0.3/32"),))


class CountedInSight(Programs):
    """Whose counters are an array that can be mapped: reading those of each CPU takes a system call a packet."""

    def _compile(self, **defines: int) -> bpf.Object:
        made = super()._compile(**defines)
        if "counters" not in self.maps:
            names = made.maps["counters"].max_entries
            plan = MapPlan(0, 2, names, 0x400, "<u4", "<u8")  # BPF_MAP_TYPE_ARRAY, BPF_F_MMAPABLE
            made.maps["counters"] = bpf._create("counters", plan, names)
        return made


class FuzzBench(Bench):
    def __init__(self, addresses: tuple[str, ...] = (GATEWAY,)) -> None:
        super().__init__(addresses, programs=CountedInSight)
        self.sight = self.tables.maps["counters"].view(writable=False)

    def counters(self) -> np.ndarray[Any, Any]:
        return self.sight.copy()


# --- packets to start from -------------------------------------------------------------------------


def exchanged(ours: str, ports: dict[str, int], *, answers: bool, remote: str = SERVER) -> list[Packet]:
    """Every kind of packet between one of our addresses and a server's port 53."""

    def between(make: Callable[..., Packet], *, back: bool = answers, **fields: Any) -> Packet:
        if make is echo:
            here = ports["icmp"]
            return echo_reply(remote, ours, here, **fields) if back else echo(ours, remote, here, **fields)
        here = ports["udp" if make is udp else "tcp"]
        return make(remote, 53, ours, here, **fields) if back else make(ours, here, remote, 53, **fields)

    src, dst, teller = (remote, ours, ROUTER if remote == SERVER else remote) if answers else (ours, remote, ours)
    return [
        between(udp),
        between(udp, options=OPTIONS),
        between(udp, flags="MF"),
        between(udp, payload=bytes(1200)),
        IP(src=src, dst=dst, proto=17, frag=3) / Raw(bytes(30)),
        between(tcp, payload=b"data"),
        between(tcp, options=OPTIONS),
        between(tcp, flags=FIN | ACK),
        between(tcp, flags=RST),
        between(echo),
        IP(src=teller, dst=dst) / ICMP(type=3) / between(udp, back=not answers),
        IP(src=teller, dst=dst) / ICMP(type=3) / between(udp, back=not answers, options=OPTIONS),
        IP(src=teller, dst=dst) / ICMP(type=11) / between(tcp, back=not answers, options=OPTIONS),
        IP(src=teller, dst=dst) / ICMP(type=12) / between(echo, back=not answers),
        IP(src=src, dst=dst, proto=47) / Raw(bytes(30)),
        IP(src=src, dst=dst, proto=33) / Raw(bytes.fromhex("1388 0035 0400 1234") + bytes(20)),
        IP(src=src, dst=dst, proto=132) / Raw(bytes.fromhex("1388 0035") + bytes(28)),
        IP(src=src, dst=dst, proto=132, frag=4) / Raw(bytes(28)),
        IP(src=teller, dst=dst) / ICMP(type=3) / IP(src=dst, dst=src, proto=47) / Raw(bytes(30)),
        between(tcp, flags=SYN),
        _with_mss(between(tcp, flags=SYN)),
    ]


def _with_mss(packet: Packet) -> Packet:
    packet[TCP].options = [("NOP", None), ("MSS", 9000)]
    return packet


def round_(ports: dict[str, int]) -> list[Packet]:
    """From a LAN to what leads inside by GATEWAY: OTHER_HOST's mappings and forwards; and what is redirected."""
    return [
        udp(HOST, 5000, GATEWAY, ports["udp"]),
        tcp(HOST, 5000, GATEWAY, ports["tcp"], SYN),
        udp(HOST, 5000, GATEWAY, 8080, flags="MF", id=9),
        IP(src=HOST, dst=GATEWAY, proto=17, frag=3, id=9) / Raw(bytes(40)),
        tcp(HOST, 5000, GATEWAY, 8080, SYN, options=OPTIONS),
        udp(OTHER_HOST, 80, GATEWAY, 40000),
        IP(src=OTHER_HOST, dst=GATEWAY) / ICMP(type=3) / udp(GATEWAY, ports["udp"], OTHER_HOST, 6000),
        tcp(HOST, 5000, SERVER, 80, SYN),
        udp(HOST, 5001, SERVER, 80),
        udp(HOST, 5001, BASIC_EXTERNAL, 80),
    ]


def own() -> list[Packet]:
    """From the gateway to itself, or as a hairpin's second leg."""
    return [
        udp(GATEWAY, 40000, GATEWAY, 8080),
        tcp(GATEWAY, 40000, GATEWAY, 8080, SYN),
        udp(GATEWAY, 40000, GATEWAY, 8080, flags="MF", id=9),
        IP(src=GATEWAY, dst=GATEWAY, proto=17, frag=3, id=9) / Raw(bytes(40)),
        udp(GATEWAY, 40000, GATEWAY, 8080, options=OPTIONS),
        IP(src=GATEWAY, dst=GATEWAY) / ICMP(type=3) / udp(GATEWAY, 8080, GATEWAY, 40000),
        echo(GATEWAY, GATEWAY, 5),
    ]


def told() -> list[Packet]:
    """From the gateway itself to others: what it says, and what it tells of others' packets."""
    return [
        udp(GATEWAY, 40000, SERVER, 53),
        echo(GATEWAY, SERVER, 5),
        IP(src=GATEWAY, dst=SERVER) / ICMP(type=11) / udp(SERVER, 53, HOST, 5000),
        IP(src=GATEWAY, dst=SERVER) / ICMP(type=3, code=4, nexthopmtu=1400) / tcp(SERVER, 53, HOST, 5000),
        IP(src=ROUTER, dst=SERVER) / ICMP(type=11) / udp(SERVER, 53, HOST, 5000),
    ]


def basic(*, answers: bool) -> list[Packet]:
    """Of a host with an address of its own."""
    ports = {"udp": 5000, "tcp": 5000, "icmp": 5000}
    return exchanged(BASIC_EXTERNAL if answers else BASIC_HOST, ports, answers=answers)


def answered() -> list[Packet]:
    """What the gateway's sockets, and outside, send to a LAN."""
    return [
        tcp(GATEWAY_INSIDE, 3128, HOST, 5000, SYN | ACK),
        udp(GATEWAY_INSIDE, 3128, HOST, 5001),
        IP(src=GATEWAY_INSIDE, dst=HOST) / ICMP(type=3) / udp(HOST, 5001, GATEWAY_INSIDE, 3128),
    ]


def put_back(wan: int, packets: list[Packet], answers: bool) -> Iterator[bytes]:
    """As the agent writes them into the punt port."""
    for reason in (0, 5) if answers else (1, 6):
        for packet in packets:
            header = bytes([2, reason]) + wan.to_bytes(4, "big") + bytes(6) + b"\x08\x00"
            yield header + bytes(12) + b"\x08\x00" + wire(packet)


def ethernet(dst: str, src: str) -> bytes:
    return bytes.fromhex(dst.replace(":", "") + src.replace(":", "")) + b"\x08\x00"


# --- a gateway to meet -----------------------------------------------------------------------------


class Fuzzed(Gateway):
    """A gateway with something of everything, and settings by chance."""

    def __init__(self, bench: Bench, rng: random.Random) -> None:
        super().__init__(bench)
        tables = self.tables
        self.two = len(bench._places) > 1
        mss = rng.choice((0, 1400))
        tables.set_interface(bench.wan, "wan", xdp_from=True, xdp_to=True, mss=mss)
        if self.two:
            far = netdev.link("far0")
            tables.set_interface(far, "wan", xdp_from=True, xdp_to=True, wan=1)
            tables.set_settings(exit=[bench.wan.index, far.index])
        tables.set_prefixes(PREFIXES | {BARE_INTERNAL: abi.PREFIX_INTERNAL} | self._own())
        tables.set_counterparts([(IPv4Network(BASIC_HOST), IPv4Network(BASIC_EXTERNAL), 0)])
        tables.set_settings(
            accelerate=1,
            filtering=[rng.randrange(3) for _ in range(4)],
            preserve=rng.randrange(2),
            parity=rng.randrange(2),
            overload=rng.randrange(2),
            drop_other=int(rng.random() < 0.2),
            inbound_refresh=rng.randrange(2),
        )
        if rng.random() < 0.3:  # a pool that is soon used up
            self.pool(tcp=((5000, 64), (0, 0)), udp=((5000, 64), (0, 0)), icmp=((0, 64), (0, 0)))
        else:
            self.pool(tcp=POOL, udp=POOL, icmp=((0, 65536), (0, 0)))
        for protocol in ("tcp", "udp"):
            self.forward(protocol, 8080, (OTHER_HOST, 80))
            if rng.random() < 0.5:
                self.forward(protocol, 0, (OTHER_HOST, 0))
        self.put(redirects.parse("tcp", "80", "3128", "lan"))
        self.put(redirects.parse("udp", "80", "3128", "lan"))
        self.put(redirects.parse("tcp", "2222", "22", "wan"))
        self.put(triggers.parse("udp", 53, "tcp 2300-2400", 600))
        self.serve_redirects()
        switches.put(tables, ALG)
        if rng.random() < 0.8:
            self.attend()
        self._open()

    def _own(self) -> dict[IPv4Network, int]:
        return {IPv4Network(str(each.address)): abi.PREFIX_OWN for each in self.bench._places}

    def _open(self) -> None:
        """Armed sessions of HOST:5000 with SERVER:53, some of OTHER_HOST, one of an ALG, one for bare links."""
        self.ports = {
            "udp": self.open(udp(HOST, 5000, SERVER, 53)),
            "icmp": self.open(echo(HOST, SERVER, 5000)),
            "tcp": self.connect(HOST, 5000, SERVER, 53),
        }
        self.open(udp(HOST, 5000, OTHER_SERVER, 53))
        for make, name in ((udp, "udp"), (tcp, "tcp")):
            self.inbound(make(SERVER, 53, GATEWAY, self.ports[name]))
            self.learn(make(SERVER, 53, HOST, 5000))
        self.turning = {"udp": self.open(udp(OTHER_HOST, 6000, SERVER, 53))}
        self.turning["tcp"] = self.connect(OTHER_HOST, 6000, SERVER, 53)
        self.bare = {
            "udp": self.open(udp(BARE_HOST, 5000, BARE_SERVER, 53)),
            "icmp": self.open(echo(BARE_HOST, BARE_SERVER, 5000)),
            "tcp": self.connect(BARE_HOST, 5000, BARE_SERVER, 53),
        }

    def orders(self) -> Iterator[str]:
        """What fuzz.c is told."""
        lan, wan, punt = self.lan, self.wan, self.bench.punt.index
        inside = dict.fromkeys(self.ports, 5000)
        out = exchanged(HOST, inside, answers=False)
        back = exchanged(GATEWAY, self.ports, answers=True)
        ftp = [tcp(OTHER_HOST, 7000, SERVER, 21, payload=b"PORT 1,2\r\n"), udp(OTHER_HOST, 7000, SERVER, 69)]
        ftp_back = [tcp(SERVER, 21, GATEWAY, self.turning["tcp"], payload=b"227 (1,2,3,4,5,6)\r\n")]
        to_wan, from_wan = ethernet(NEXT_HOP_MAC, WAN_MAC), ethernet(WAN_MAC, NEXT_HOP_MAC)
        from_lan, to_lan = ethernet(LAN_MAC, HOST_MAC), ethernet(HOST_MAC, LAN_MAC)
        outside = [*out, *basic(answers=False), *ftp]
        inbound = [*back, *basic(answers=True), *ftp_back]
        from_inside = round_(self.turning) + out
        punted = [*put_back(wan, back[:6], True), *put_back(wan, out[:6], False)]
        # name, program, kind, by which interface it came, where it is, mark, what stands before the packet, packets
        rows: list[tuple[str, str, str, int, int, int, bytes, list[Packet]]] = [
            ("wan_out", "masq_wan_out", "wan_out", lan, wan, 0, to_wan, outside),
            ("wan_in", "masq_wan_in", "wan_in", wan, wan, 0, from_wan, inbound),
            ("from_gateway", "masq_wan_out", "wan_out", 0, wan, 0, to_wan, [*told(), *out[:6]]),
            ("turned", "masq_wan_in", "wan_in", wan, wan, HAIRPIN_MARK | lan, from_wan, own() + back),
            ("lan_in", "masq_lan_in", "lan_in", lan, lan, 0, from_lan, from_inside),
            ("lan_lean", "masq_lan_lean", "lan_in", lan, lan, 0, from_lan, from_inside),
            (
                *("lan_out", "masq_lan_out", "lan_out", wan, lan, 0, to_lan),
                exchanged(HOST, inside, answers=True) + answered(),
            ),
            ("to_lan", "masq_lan_out", "lan_out", 0, lan, 0, to_lan, answered()),
            ("lo_out", "masq_lo_out", "lo_out", 0, LOOPBACK, 0, bytes(12) + b"\x08\x00", own()),
            ("punt_in", "masq_punt_in", "punt_in", punt, punt, 0, b"", []),
            ("xdp_out", "masq_xdp", "xdp_out", lan, lan, 0, from_lan, out),
            ("xdp_in", "masq_xdp", "xdp_in", wan, wan, 0, from_wan, back),
            (
                *("wan_out_l3", "masq_wan_out_l3", "wan_out_l3", lan, wan, 0, b""),
                exchanged(BARE_HOST, inside, answers=False, remote=BARE_SERVER),
            ),
            (
                *("wan_in_l3", "masq_wan_in_l3", "wan_in_l3", wan, wan, 0, b""),
                exchanged(GATEWAY, self.bare, answers=True, remote=BARE_SERVER),
            ),
        ]
        yield f"counters {self.tables.maps['counters'].fd} {len(self.bench.counter_names)}"
        yield from (f"counter {at} {name}" for at, name in enumerate(self.bench.counter_names))
        for network in (INTERNAL, BARE_INTERNAL):
            yield f"internal {int(network.network_address):x} {int(network.netmask):x}"
        for address in (*(str(each.address) for each in self.bench._places), BASIC_EXTERNAL):
            yield f"external {int(IPv4Address(address)):x}"
        for name, function, kind, ingress, ifindex, mark, before, packets in rows:
            yield f"hook {name} {self.bench.programs[function].fd} {kind} {ingress} {ifindex} {mark}"
            yield from (f"frame {name} {(before + wire(packet)).hex()}" for packet in packets)
        yield from (f"frame punt_in {frame.hex()}" for frame in punted)

    def programs(self) -> list[int]:
        """Their descriptors, and the counters'."""
        return [self.tables.maps["counters"].fd, *(each.fd for each in self.bench.programs.loaded.values())]


def build(directory: Path) -> Path:
    """fuzz.c, compiled."""
    made = directory / "fuzz"
    source = Path(__file__).with_name("fuzz.c")
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", made, source], check=True)
    return made


def fuzz(
    program: Path, gateway: Fuzzed, seed: int, packets: int, *, orders: Iterable[str] | None = None
) -> Counter[str]:
    """One round; to be called in the bench's namespace.

    Args:
        orders: for fuzz.c in place of the gateway's own.

    Returns:
        how many packets ended how, and under "runs" how often a program ran.

    Raises:
        AssertionError: with the packet that broke a rule.
    """
    told = "\n".join([*(orders or gateway.orders()), f"run {seed} {packets}", ""])
    done = subprocess.run(
        [program], input=told, capture_output=True, text=True, check=False, pass_fds=gateway.programs()
    )
    assert done.returncode == 0, f"seed {seed}: {done.stdout}{done.stderr}"
    gateway.counted()
    gateway.assert_tables_agree()
    return Counter({name: int(count) for name, count in map(str.split, done.stdout.splitlines())})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--packets", type=int, default=100_000_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first round; each has the next one")
    parser.add_argument("--round", type=int, default=ROUND, help="packets of one round")
    wanted = parser.parse_args()
    with contextlib.ExitStack() as stack:
        program = build(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        one = stack.enter_context(stand(NETWORK))
        two = stack.enter_context(stand((*NETWORK, *SECOND_WAN), (GATEWAY, GATEWAY_TOO)))
        _rounds(program, (one, one, one, two), wanted.packets, wanted.seed, wanted.round)


@contextlib.contextmanager
def stand(network: Sequence[str], addresses: tuple[str, ...] = (GATEWAY,)) -> Iterator[tuple[str, FuzzBench]]:
    """A bench in a namespace of its own, whose name comes with it."""
    with namespace_of(network) as name:
        with netns.entered(name):
            bench = FuzzBench(addresses)
        yield name, bench


def _rounds(
    program: Path, stands: Sequence[tuple[str, FuzzBench]], packets: int, seed: int, round_packets: int
) -> None:
    ends: Counter[str] = Counter()
    began, done, spent = time.monotonic(), 0, 0.0
    for round_seed in range(seed, seed - packets // -round_packets):
        name, bench = stands[round_seed % len(stands)]
        with netns.entered(name):
            gateway = Fuzzed(bench, random.Random(round_seed))
            started = time.monotonic()
            ends += fuzz(program, gateway, round_seed, round_packets)
            spent += time.monotonic() - started
        done += round_packets
        if done % (40 * round_packets) == 0 or done >= packets:
            seconds, runs = time.monotonic() - began, ends["runs"]
            print(f"{done:,} packets, {runs:,} runs in {seconds:.0f} s, {done / spent:,.0f} a second", flush=True)
    for ending, count in ends.most_common():
        print(f"{count:14,} {ending}")


if __name__ == "__main__":
    main()
