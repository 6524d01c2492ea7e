"""Network cards of two queues each, served by XDP in their driver, virtio_net.

::

    one 10.0.0.2  eth0 ══ eth1 [ gate ] eth2 ══ eth3  internet 203.0.113.10

The cards are those of the machine, as `run` has it made; what is between them is on the machine below.
"""

import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import vmkit
from vmkit import datapath_of, run, soon, xdpmasq

from xdpmasq.lab import netns
from xdpmasq.net import netdev

PUBLIC, SERVER, PORT, HOST = "203.0.113.1", "203.0.113.10", 7, "10.0.0.2"
CARDS = {"eth0": ("one", f"{HOST}/24"), "eth1": ("gate", "10.0.0.1/24"),
         "eth2": ("gate", f"{PUBLIC}/24"), "eth3": ("internet", f"{SERVER}/24")}  # fmt: skip
GATES = ("eth1", "eth2")
FLOWS, TIMES = 16, 20
CONFIG_FILE = Path("/run/xdpmasq-test.toml")
CONFIG = """
[interfaces]
wan = "eth2"
lan = ["eth1"]
mode = "xdp"
[sessions]
further = 65536 # as in the Makefile, which has the programs compiled for it
"""


@pytest.fixture(scope="module", autouse=True)
def attached() -> Iterator[None]:
    CONFIG_FILE.write_text(CONFIG)
    subprocess.run(["modprobe", "virtio_net"], check=True)
    names = sorted({namespace for namespace, _ in CARDS.values()})
    netns.ip_batch([f"netns add {name}" for name in names])
    for card, (namespace, address) in CARDS.items():
        netns.ip_batch([f"link set {card} netns {namespace}"])
        netns.ip_batch([f"addr add {address} dev {card}", f"link set {card} up"], namespace)
    netns.ip_batch(["route add default via 10.0.0.1"], "one")
    vmkit.serve("internet", SERVER, PORT)
    agent = vmkit.start("--config", str(CONFIG_FILE))
    yield
    xdpmasq("detach")
    agent.wait()
    left = vmkit.programs_on(*GATES)
    netns.delete(names)
    subprocess.run(["modprobe", "-r", "virtio_net"], check=True)  # or its cards are in the way of others' names
    assert left == []


def xdp_mode(card: str) -> str | None:
    with netns.entered("gate"):
        return netdev.link(card).xdp_mode


def seen_by_queues(card: str) -> list[int]:
    """How many packets XDP has seen in each queue."""
    told = re.findall(r"rx(?:_queue_)?\d+_xdp_packets: (\d+)", run("gate", "ethtool", "-S", card).stdout)
    return [int(packets) for packets in told]


def test_flows_on_every_queue() -> None:
    """Each packet is counted once, whichever queue and CPU it came by."""
    soon(lambda: [xdp_mode(card) for card in GATES] == ["native", "native"], "XDP is in the driver")
    with ExitStack() as stack:
        clients = [stack.enter_context(vmkit.client("one", HOST)) for _ in range(FLOWS)]

        def ask() -> bool:
            for nth, one in enumerate(clients):
                one.sendto(b"%d" % nth, (SERVER, PORT))
                assert one.recv(100) == PUBLIC.encode() + b" %d" % nth
            return True

        soon(ask, "it answers")
        before, queues = datapath_of().counters(), [seen_by_queues(card) for card in GATES]
        for _ in range(TIMES):
            ask()
        after = datapath_of().counters()
    for way, card, was in zip(("outbound", "inbound"), GATES, queues, strict=True):
        rose = {path: after[f"{path}_{way}"] - before[f"{path}_{way}"] for path in ("fast", "slow")}
        assert sum(rose.values()) == FLOWS * TIMES
        assert rose["slow"] <= 2 * FLOWS  # the kernel has a look at each from time to time
        now = [new - old for new, old in zip(seen_by_queues(card), was, strict=True)]
        assert len(now) == 2
        assert min(now) > 0
        assert sum(now) >= rose["fast"]


def test_a_stream() -> None:
    """Its checksums are whole, though these cards leave them to each other."""
    text = bytes(range(256)) * 1000
    before = datapath_of().counters()
    seen, _, back = vmkit.talk(vmkit.stream_to("one", (SERVER, PORT)), text)
    after = datapath_of().counters()
    assert (seen, back) == (PUBLIC, text)
    assert all(after[name] - before[name] >= 100 for name in ("fast_outbound", "fast_inbound"))
