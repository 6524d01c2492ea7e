"""nftables' forward chain keeps its meaning beside xdpmasq, as beside the kernel's own NAT.

The standard lab; rules are loaded in masq-gate: ``LAN boxes ─ lan0 masq-gate [forward chain] wan0 ─ internet``.
"""

import subprocess
import time
from collections.abc import Iterator

import pytest
from netkit import CURL, Gateway, Stream, Wire, answers, ask, chain, rules, who

from xdpmasq.lab.servers import EchoServer, WebServer
from xdpmasq.lab.topology import INTERNET

STATEFUL = """
    chain forward {
        type filter hook forward priority filter; policy drop;
        ct state invalid counter drop
        ct state established,related accept
        iifname "lan0" oifname "wan0" ct state new accept
    }
"""


MODES = [pytest.param(mode, marks=pytest.mark.xdist_group(f"nft-{mode}")) for mode in ("tc", "xdp")]


@pytest.fixture(scope="module", params=MODES)
def _shared(request: pytest.FixtureRequest) -> Iterator[tuple[Gateway, WebServer]]:
    with Gateway.in_new_lab(request.param, attach=False) as gateway:
        EchoServer(gateway.lab)
        web = WebServer(gateway.lab)
        gateway.attach_with(rearm_s=1)  # so that flows come by the forward chain often
        yield gateway, web


@pytest.fixture
def gateway(_shared: tuple[Gateway, WebServer]) -> Iterator[Gateway]:
    wire = Wire(_shared[0].lab)
    yield _shared[0]
    wire.check()


@pytest.fixture
def web(_shared: tuple[Gateway, WebServer]) -> WebServer:
    return _shared[1]


def test_a_drop_rule_keeps_a_new_session_out(gateway: Gateway) -> None:
    """It sees private addresses, as rules do that were written for the kernel's NAT."""
    with rules(gateway, chain("ip saddr 192.168.0.3 udp dport 7 drop")), gateway.counting() as grown:
        assert not gateway.opens("b-box")
        assert gateway.opens("a-box")
    assert grown["session_opened"] == 1
    assert gateway.opens("b-box")


def test_a_reject_rule_answers_with_its_icmp_type(gateway: Gateway) -> None:
    reject = chain('oifname "wan0" udp dport 9 reject with icmp type host-prohibited')
    with rules(gateway, reject), gateway.udp("a-box") as client:
        client.connect((INTERNET, 9))
        client.send(b"?")
        with pytest.raises(OSError, match=r"unreachable|No route to host"):
            client.recv(10)


def test_inbound_rules_see_the_translated_destination(gateway: Gateway) -> None:
    with gateway.udp("b-box", 5000) as client:
        ask(client, b"?")
        with rules(gateway, chain("ip daddr 192.168.0.3 udp dport 5000 counter drop")):
            time.sleep(1.2)  # a flow that rides XDP comes by within rearm_s
            assert not answers(client)
        assert answers(client)


def test_a_rule_ends_a_running_flow_within_a_rearm_period(gateway: Gateway) -> None:
    with gateway.udp("c-box") as client:
        for _ in range(5):
            ask(client, b"?")
        with rules(gateway, chain("ip saddr 192.168.0.4 drop")):
            time.sleep(1.2)
            assert not answers(client)
        assert answers(client)


def test_a_stateful_firewall_and_long_transfers(gateway: Gateway, web: WebServer) -> None:
    """conntrack sees but a packet a second of what rides XDP, and must not take it for invalid."""
    with rules(gateway, STATEFUL):
        stream = Stream(gateway, "c-box")
        downloads = [
            gateway.lab.popen(
                box,
                ["sh", "-c", f"{' '.join(CURL)} --limit-rate 5M {web.big_url} | sha256sum"],
                stdout=subprocess.PIPE,
            )
            for box in ("a-box", "b-box")
        ]
        with gateway.connection() as connection:
            for _ in range(8):
                connection.talk(20, size=5000)
                time.sleep(0.4)  # also slower than a rearm period now and then
            time.sleep(1.5)
            connection.talk(20)
        for download in downloads:
            output, _ = download.communicate(timeout=20)
            assert output.split()[0].decode() == web.big_sha256
        assert stream.stop() == 0
        invalid = gateway.gate("nft", "list", "chain", "inet", "test", "forward")
    assert "counter packets 0 " in invalid


def test_a_stateful_firewall_lets_no_stranger_in(gateway: Gateway) -> None:
    with rules(gateway, STATEFUL), gateway.udp("a-box", timeout_s=0.3) as client, gateway.udp("internet") as stranger:
        host, _, port = who(client).partition(":")
        stranger.sendto(b"boo", (host, int(port)))
        with pytest.raises(TimeoutError):
            client.recv(10)
        gateway.lab.exec("b-box", ["ping", "-c2", "-i0.1", "-W1", INTERNET])
        output = gateway.lab.exec("b-box", ["traceroute", "-n", "-q1", "-w2", "-m3", INTERNET]).stdout
        assert f"2  {INTERNET}" in output


def test_the_stateful_firewall_may_be_there_first(gateway: Gateway) -> None:
    """Connections opened before the rules were loaded go on, since conntrack picks them up."""
    with gateway.connection() as connection:
        connection.talk(5)
        with rules(gateway, STATEFUL):
            for _ in range(3):
                connection.talk(5)
                time.sleep(0.6)
