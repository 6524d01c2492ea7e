"""Port triggering: whoever inside calls a certain port has others opened to it, until it is silent for a while."""

from typing import Any

import numpy as np
import pytest
from harness import (
    FROM_OUTSIDE,
    GATEWAY,
    HOST,
    OTHER_HOST,
    OTHER_SERVER,
    SERVER,
    SYN,
    TICKS,
    Gateway,
    age,
    rebuilt,
    tcp,
    udp,
    wire,
)

from xdpmasq import bpf, forwarding, triggers
from xdpmasq.abi import PORTS, REAP_EXPIRED
from xdpmasq.upkeep import Upkeep

CALL = 47624
TRIGGERS = 8  # SESSION_TRIGGERS


def trigger(
    gateway: Gateway, opens: str = "tcp 2300-2400", *, protocol: str = "udp", ports: Any = CALL, lasts_s: int = 600
) -> Any:
    return gateway.put(triggers.parse(protocol, ports, opens, lasts_s))


def pull(gateway: Gateway, host: str = HOST, port: int = CALL, sport: int = 5000) -> dict[str, int]:
    """The host calls; returns what was counted."""
    result = gateway.outbound(udp(host, sport, SERVER, port))
    assert result.ended == "slow_outbound"
    return result.counted


def knock(port: int = 2300, remote: str = OTHER_SERVER, sport: int = 7000) -> Any:
    return tcp(remote, sport, GATEWAY, port, SYN, seq=100)


def holder(gateway: Gateway) -> str | None:
    (placed,) = forwarding.read(gateway.tables)
    return str(placed.open_to) if placed.open_to else None


def let_pass(gateway: Gateway, seconds: float) -> None:
    """So long ago was the holder heard last."""
    table = gateway.tables.maps["forward_rules"]
    for placed in forwarding.read(gateway.tables):
        record = table.get(placed.index).copy()
        record["expires"] = (int(record["expires"]) - int(seconds * TICKS)) % 2**32
        table.set(placed.index, record)


def test_opened_and_used(gateway: Gateway) -> None:
    """Every port of the range, unchanged; the answer leaves from the opened port."""
    trigger(gateway)
    assert gateway.inbound(knock()).ended == "drop_filtered"
    assert pull(gateway) == {"mapping_opened": 1, "session_opened": 1, "trigger_pulled": 1}
    assert holder(gateway) == HOST
    for port in (2300, 2350, 2400):
        result = gateway.inbound(knock(port))
        assert (result.ended, result.counted) == ("slow_inbound", {"forward_opened": 1, "session_opened": 1})
        assert result.bytes == wire(rebuilt(knock(port), dst=HOST))
        back = gateway.outbound(tcp(HOST, port, OTHER_SERVER, 7000, SYN | 16))
        assert (back.ip.src, back.ip.sport) == (GATEWAY, port)
    assert gateway.inbound(knock(2401)).ended == "own_inbound"
    gateway.assert_tables_agree()


@pytest.mark.parametrize(
    ("packet", "local"),
    [
        pytest.param(udp(HOST, 5000, SERVER, CALL + 1), False, id="another port"),
        pytest.param(tcp(HOST, 5000, SERVER, CALL, SYN), False, id="another protocol"),
        pytest.param(udp(GATEWAY, 5000, SERVER, CALL), True, id="the gateway"),
    ],
)
def test_what_opens_nothing(gateway: Gateway, packet: Any, local: bool) -> None:
    trigger(gateway)
    gateway.outbound(packet, local=local)
    assert holder(gateway) is None
    assert gateway.inbound(knock()).ended == "drop_filtered"


def test_tcp_and_udp_by_one_call(gateway: Gateway) -> None:
    """As DirectPlay wants it: two triggers."""
    trigger(gateway)
    trigger(gateway, "udp 2300-2400")
    assert pull(gateway)["trigger_pulled"] == 2
    assert gateway.inbound(knock()).ip.dst == HOST
    assert gateway.inbound(udp(OTHER_SERVER, 7000, GATEWAY, 2300)).ip.dst == HOST


@pytest.mark.parametrize("port", [6000, 6003, 6010])
def test_a_range_of_calls(gateway: Gateway, port: int) -> None:
    trigger(gateway, ports="6000-6010")
    assert pull(gateway, port=port)["trigger_pulled"] == 1


def test_the_first_has_it_until_its_time_is_over(gateway: Gateway) -> None:
    trigger(gateway)
    pull(gateway)
    let_pass(gateway, 300)
    assert "trigger_pulled" not in pull(gateway, OTHER_HOST)
    assert holder(gateway) == HOST
    let_pass(gateway, 299)
    assert gateway.inbound(knock()).ip.dst == HOST
    let_pass(gateway, 2)
    assert holder(gateway) is None
    assert gateway.inbound(knock(sport=7001)).ended == "drop_filtered"
    assert pull(gateway, OTHER_HOST)["trigger_pulled"] == 1, "by any packet of a session that calls"
    assert gateway.inbound(knock(sport=7002)).ip.dst == OTHER_HOST
    assert gateway.inbound(knock()).ip.dst == HOST, "the session from before goes on"
    gateway.assert_tables_agree()


def test_its_own_traffic_keeps_it(gateway: Gateway) -> None:
    """Any packet of the session that called, which need not open a new one."""
    trigger(gateway, lasts_s=60)
    pull(gateway)
    for _ in range(3):
        let_pass(gateway, 59)
        assert pull(gateway) == {}
    assert holder(gateway) == HOST
    let_pass(gateway, 59)
    gateway.outbound(udp(HOST, 5001, SERVER, 1234))
    gateway.inbound(knock())
    let_pass(gateway, 2)
    assert holder(gateway) is None, "other sessions, and those from outside, do not"


def test_a_session_that_is_opened_again_calls(gateway: Gateway) -> None:
    """It was there before the trigger."""
    pull(gateway)
    age(gateway.session(HOST, 5000, "udp", SERVER, CALL), 301)
    trigger(gateway)
    assert pull(gateway) == {"session_reopened": 1, "trigger_pulled": 1}


@pytest.mark.req("attacks-port_shadow")
def test_the_ports_stay_out_of_the_pool(gateway: Gateway) -> None:
    """Taken or not; and return to it."""
    rule = trigger(gateway)
    slots = range(2300, 2401)
    assert all(gateway.is_claimed(slot) for slot in slots)
    gateway.reap(slots, REAP_EXPIRED)
    assert all(gateway.is_claimed(slot) for slot in slots)
    pull(gateway)
    gateway.inbound(knock())
    gateway.withdraw(rule)
    assert gateway.inbound(knock(2301)).ended == "drop_filtered"
    assert gateway.inbound(knock()).ended == "slow_inbound"
    assert gateway.entries("forwards") == {}


@pytest.mark.req("4787-9")
def test_from_inside_by_the_external_address(gateway: Gateway) -> None:
    trigger(gateway, "udp 2300-2400")
    packet = udp(OTHER_HOST, 5000, GATEWAY, 2300)
    assert gateway.hairpin(packet).ended in ("drop_filtered", "")
    pull(gateway)
    result = gateway.hairpin(packet)
    assert (result.ended, result.ip.dst) == ("slow_hairpin", HOST)


def test_running_sessions_are_its_own(gateway: Gateway) -> None:
    trigger(gateway)
    pull(gateway)
    gateway.inbound(knock())
    marks = gateway.tables.sessions["out"]["marks"]
    (called,) = np.flatnonzero(marks & TRIGGERS)
    (came_in,) = np.flatnonzero(marks & FROM_OUTSIDE)
    assert called // PORTS == 1
    assert came_in == 2300


def test_upkeep_forgets_who_had_it_long_ago(gateway: Gateway) -> None:
    """Or the ports would be open to that host when jiffies have wrapped round half."""
    trigger(gateway)
    pull(gateway)
    upkeep = Upkeep(gateway.tables)
    let_pass(gateway, 600 + 3599)
    upkeep.run()
    (placed,) = forwarding.read(gateway.tables)
    record = gateway.tables.maps["forward_rules"].get(placed.index).copy()
    assert record["target"][0]["addr"]["word"][0]
    let_pass(gateway, 2)
    upkeep.run()
    record = gateway.tables.maps["forward_rules"].get(placed.index).copy()
    record["expires"] = (bpf.jiffies() + 1000) % 2**32
    gateway.tables.maps["forward_rules"].set(placed.index, record)
    assert gateway.inbound(knock()).ended == "drop_filtered"
