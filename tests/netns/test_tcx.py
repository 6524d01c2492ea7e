"""TC programs on TCX, and on clsact where there is none: alone, beside others', and moving from one to the other.

::

    tx-…   near ── far          and the standard lab: LAN boxes ─ lan0 masq-gate wan0 ─ internet (echo on .10)
"""

import errno
import itertools
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from netkit import Gateway, Stream, answers, needs_root, soon, strangers_program, who

from xdpmasq import bpf, hooks, tcx
from xdpmasq.lab import netns
from xdpmasq.lab.snapshot import differences, snapshot
from xdpmasq.net import clsact, netdev

GOES_ON, DROPS = -1, 2  # TCX_NEXT, TCX_DROP
in_tc = pytest.mark.parametrize("mode", ["tc"], indirect=True)
in_xdp = pytest.mark.parametrize("mode", ["xdp"], indirect=True)  # with a program on the LAN as well
_numbers = itertools.count()


# --- the kernel's interface ------------------------------------------------------------------------


@pytest.fixture
def near() -> Iterator[int]:
    """Index of near, in a namespace where this thread works."""
    name = f"tx-{os.getpid()}-{next(_numbers)}"
    netns.ip_batch([f"netns add {name}"])
    try:
        netns.set_sysctls(name, {"net/ipv6/conf/all/disable_ipv6": 1, "net/ipv6/conf/default/disable_ipv6": 1})
        links = [
            "link add near type veth peer name far",
            *(f"link set {each} arp off up" for each in ("near", "far")),
        ]
        netns.ip_batch(links, name)
        with netns.entered(name):
            yield socket.if_nametoindex("near")
    finally:
        netns.delete([name])


@needs_root
@pytest.mark.parametrize("hook", ["ingress", "egress"])
def test_a_chain(near: int, hook: hooks.TcHook) -> None:
    first, second, third, new = (strangers_program("tc", GOES_ON) for _ in range(4))
    for each in (first, second, third):
        tcx.attach(near, hook, each)
    tcx.attach(near, hook, new, replaced=second)
    assert tcx.programs(near, hook) == [first.id, new.id, third.id]
    assert tcx.detach(near, hook, first)
    assert not tcx.detach(near, hook, first)
    with pytest.raises(FileNotFoundError):
        tcx.attach(near, hook, first, replaced=second)
    with pytest.raises(FileExistsError):
        tcx.attach(near, hook, new)
    for each in (new, third):
        number = each.id
        each.close()  # it stays attached without us
        with bpf.Program.by_id(number) as again:
            assert tcx.detach(near, hook, again)
    assert tcx.programs(near, hook) == []


@needs_root
def test_an_interface_that_is_gone(near: int) -> None:
    program = strangers_program("tc", GOES_ON)
    assert tcx.programs(near + 100, "egress") == []
    assert not tcx.detach(near + 100, "egress", program)
    with pytest.raises(OSError, match="No such device"):
        tcx.attach(near + 100, "egress", program)


@needs_root
def test_no_packet_passes_between_two_programs(near: int) -> None:
    """Programs that drop everything take turns under a flood; the sender is told of every packet dropped."""
    frame = bytes(12) + struct.pack("!H", 0x88B5) + bytes(50)
    old, new = strangers_program("tc", DROPS), strangers_program("tc", DROPS)
    dropped, passed, exchanged = 0, 0, 0
    done = threading.Event()

    def flood() -> None:
        nonlocal dropped, passed
        while not done.is_set():
            try:
                sender.send(frame)
                passed += 1
            except OSError as error:
                dropped += error.errno == errno.ENOBUFS

    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
        sender.bind(("near", 0))
        sender.send(frame)
        tcx.attach(near, "egress", old)
        flooding = threading.Thread(target=flood)
        flooding.start()
        deadline = time.monotonic() + 20
        while (dropped < 5000 or exchanged <= 100) and flooding.is_alive() and time.monotonic() < deadline:
            tcx.attach(near, "egress", new, replaced=old)
            old, new, exchanged = new, old, exchanged + 1
        done.set()
        flooding.join()
    assert passed == 0
    assert dropped >= 5000
    assert exchanged > 100


# --- beside others' --------------------------------------------------------------------------------


@needs_root
@in_tc
@pytest.mark.req("reliability-detach")
@pytest.mark.parametrize("hook", ["ingress", "egress"])
@pytest.mark.parametrize("place", ["before", "after"])
def test_somebody_elses_program_runs_beside_ours_and_stays(bare: Gateway, hook: hooks.TcHook, place: str) -> None:
    with bare.inside():
        index = netdev.link("wan0").index
    stranger, stop = strangers_program("tc", GOES_ON), strangers_program("tc", DROPS)

    def attach_stranger() -> None:
        with bare.inside():
            tcx.attach(index, hook, stranger)

    if place == "before":
        attach_stranger()
    bare.attach()
    if place == "after":
        attach_stranger()
    with bare.inside():
        here = tcx.programs(index, hook)
    assert here.index(stranger.id) == (0 if place == "before" else 1)
    assert len(here) == 2
    with bare.udp("a-box") as client:
        endpoint = who(client)
        with bare.inside():
            tcx.attach(index, hook, stop, replaced=stranger)
        assert not answers(client)
        with bare.inside():
            tcx.attach(index, hook, stranger, replaced=stop)
        assert who(client) == endpoint
        bare.kill_agent()
        bare.attach()  # exchanges ours
        with bare.inside():
            again = tcx.programs(index, hook)
        assert again.index(stranger.id) == here.index(stranger.id)
        assert set(again) & set(here) == {stranger.id}
        assert who(client) == endpoint
    bare.detach()
    with bare.inside():
        assert tcx.programs(index, hook) == [stranger.id]


@needs_root
@in_tc
def test_an_ingress_qdisc_is_no_obstacle(bare: Gateway) -> None:
    bare.gate("tc", "qdisc", "add", "dev", "wan0", "ingress")
    before = snapshot(bare.lab)
    bare.attach()
    assert bare.opens()
    bare.detach()
    assert differences(before, snapshot(bare.lab)) == []


# --- clsact ----------------------------------------------------------------------------------------


@pytest.fixture
def on_clsact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs started from here see no TCX."""
    monkeypatch.setenv("XDPMASQ_TC", "clsact")


def is_on_clsact(gateway: Gateway) -> bool:
    """Which of the two wan0's programs are on; never on both."""
    with gateway.inside():
        index = netdev.link("wan0").index
        filters = {each.direction for each in clsact.filters(index)}
        chained = {hook for hook in ("ingress", "egress") if tcx.programs(index, hook)}
        assert (filters, chained) in [({"ingress", "egress"}, set()), (set(), {"ingress", "egress"})]
    return bool(filters)


@pytest.mark.usefixtures("on_clsact")
@pytest.mark.req("reliability-restart")
def test_without_tcx(bare: Gateway) -> None:
    """Attached, exchanged, put back when lost, and taken off."""
    before = snapshot(bare.lab)
    bare.attach()
    assert is_on_clsact(bare)
    with bare.connection() as connection:
        stream = Stream(bare)
        connection.talk(5)
        bare.kill_agent()
        bare.attach()
        connection.talk(5)
        assert is_on_clsact(bare)
        assert stream.stop() == 0
    bare.take_off("wan0", "egress")
    soon(lambda: "egress" in bare.on("wan0"), "the filter is back")
    assert bare.opens("b-box")
    bare.detach()
    assert differences(before, snapshot(bare.lab)) == []


@pytest.mark.req("reliability-detach")
@pytest.mark.parametrize(
    ("way", "step", "then"),
    [
        pytest.param("tcx", "tcx.attach", "detach", marks=needs_root),
        pytest.param("tcx", "tcx.attach", "attach", marks=needs_root),
        ("clsact", "clsact.add", "detach"),
        ("clsact", "clsact.attach", "attach"),
    ],
)
def test_killed_in_the_middle_of_attaching(monkeypatch: pytest.MonkeyPatch, way: str, step: str, then: str) -> None:
    monkeypatch.setenv("XDPMASQ_TC", way)
    with Gateway.in_new_lab("xdp", attach=False) as gateway:
        before = snapshot(gateway.lab)
        gateway.die_at(step, call=2)
        if then == "attach":
            gateway.attach()
            assert gateway.lab.exec("a-box", ["ping", "-c1", "-W1", "203.0.113.10"])
        gateway.detach()
        assert differences(before, snapshot(gateway.lab)) == []


# --- moving from one to the other ------------------------------------------------------------------


@needs_root
@in_tc
@pytest.mark.req("reliability-restart")
@pytest.mark.req("attacks-leak")
def test_moving_under_load_neither_loses_nor_translates_twice(bare: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pings would show it first: the gateway's own queries, as which they leave, are translated too."""
    before = snapshot(bare.lab)
    with monkeypatch.context() as patch:
        patch.setenv("XDPMASQ_TC", "clsact")
        bare.attach()
    assert is_on_clsact(bare)
    ping = bare.lab.popen("b-box", ["ping", "-q", "-i0.002", "-W1", "203.0.113.10"], stdout=-1)
    with bare.connection() as connection, bare.udp("c-box") as client:
        stream, endpoint = Stream(bare), who(client)
        with bare.counting() as counted:
            for way in ("tcx", "clsact"):
                bare.kill_agent()
                monkeypatch.setenv("XDPMASQ_TC", way)
                bare.attach()
                assert is_on_clsact(bare) == (way == "clsact")
                connection.talk(5)
                assert who(client) == endpoint
        assert stream.stop() == 0
    ping.send_signal(2)
    told = ping.communicate(timeout=10)[0].decode()
    assert " 0% packet loss" in told
    assert counted["mapping_opened"] == 0
    assert [name for name, count in counted.items() if count and name.startswith("drop_")] == []
    bare.detach()
    assert differences(before, snapshot(bare.lab)) == []


@needs_root
@in_xdp
@pytest.mark.req("reliability-detach")
@pytest.mark.parametrize("then", ["attach", "detach"])
def test_killed_while_it_moves(bare: Gateway, monkeypatch: pytest.MonkeyPatch, then: str) -> None:
    """One filter is gone by then, another is still there behind a program on TCX."""
    before = snapshot(bare.lab)
    with monkeypatch.context() as patch:
        patch.setenv("XDPMASQ_TC", "clsact")
        bare.attach()
    with bare.udp("a-box") as client:
        endpoint = who(client)
        bare.kill_agent()
        bare.die_at("clsact.detach", call=2)
        assert who(client) == endpoint
        if then == "attach":
            bare.attach()
            assert not is_on_clsact(bare)
            assert who(client) == endpoint
            assert len(bare.mappings()) == 1
    bare.detach()
    assert differences(before, snapshot(bare.lab)) == []


@needs_root
@in_tc
def test_what_others_have_on_our_clsact_stays_when_we_move(bare: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("XDPMASQ_TC", "clsact")
        bare.attach()
    rule = ["protocol", "ip", "prio", "1", "u32", "match", "u32", "0", "0", "classid", "1:1"]
    bare.gate("tc", "filter", "add", "dev", "wan0", "ingress", *rule)
    bare.kill_agent()
    bare.attach()
    assert bare.opens()
    assert "u32" in bare.gate("tc", "filter", "show", "dev", "wan0", "ingress")
    bare.detach()
    assert "u32" in bare.gate("tc", "filter", "show", "dev", "wan0", "ingress")
