"""The agent's metrics as Prometheus and others meet them.

::

    a-box ── lan0 masq-gate wan0 ── internet
                 lo: 127.0.0.1:9477/metrics
"""

import re
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from netkit import GATE, Gateway, raw, soon
from scapy.layers.inet import IP, UDP, fragment
from scapy.packet import Raw

from xdpmasq.lab.topology import HOSTS, INTERNET, PUBLIC

ENDPOINT = ("127.0.0.1", 9477)
ONE_MODE = pytest.mark.parametrize("mode", ["tc"], indirect=True)


def scrape(gateway: Gateway) -> str:
    """The metrics, as masq-gate's loopback has them."""
    return gateway.gate("curl", "-sS", "--fail", "http://127.0.0.1:9477/metrics")


def value(text: str, series: str) -> float:
    found = re.search(rf"^xdpmasq_{re.escape(series)} (\S+)$", text, re.MULTILINE)
    assert found, series
    return float(found[1])


def test_what_is_shown_follows_what_is_done(gateway: Gateway) -> None:
    before = scrape(gateway)
    assert gateway.opens()
    after = scrape(gateway)
    opened = "session_opened_total"
    assert value(after, opened) == value(before, opened) + 1
    assert value(after, 'sessions{protocol="udp",state="replied"}') >= 1
    assert value(after, f'external_ports{{address="{PUBLIC}",protocol="udp",use="used"}}') >= 1
    for series in (
        'interface_transmit_packets_total{interface="wan0"}',
        'interface_receive_bytes_total{interface="lan0"}',
    ):
        assert value(after, series) > value(before, series)
    assert value(after, f'interface_hook{{hook="{gateway.mode}",interface="wan0",role="wan"}}') == 1
    assert value(after, "working") == 1
    assert value(after, "punt_port_up") == 1
    assert 0 <= time.time() - value(after, "agent_last_tick_time_seconds") < 10


def test_what_an_alg_does(gateway: Gateway) -> None:
    """One message, one edit, one pinhole, and one who came by it."""
    with gateway.listen("a-box") as data, gateway.listen("internet", 21) as server:
        before = scrape(gateway)
        with gateway.tcp("a-box", (INTERNET, 21)) as client:
            far, _ = server.accept()
            high, low = divmod(data.getsockname()[1], 256)
            client.sendall(f"PORT {HOSTS['a-box'].replace('.', ',')},{high},{low}\r\n".encode())
            with far, gateway.lab.socket("internet", socket.SOCK_STREAM) as caller:
                told = far.recv(200)
                *_, high, low = map(int, told.split()[1].split(b","))
                caller.settimeout(5)
                caller.connect((PUBLIC, 256 * high + low))
                data.accept()[0].close()

    def grown(series: str) -> float:
        return value(scrape(gateway), series) - value(before, series)

    assert grown("pinhole_opened_total") == 1
    soon(lambda: grown('alg_messages_total{alg="ftp"}') == 1, "the agent has noted it at its tick")
    assert grown('alg_outcomes_total{alg="ftp",outcome="edited"}') == 1
    assert grown('alg_outcomes_total{alg="ftp",outcome="failed"}') == 0


def test_fragments_that_wait(gateway: Gateway) -> None:
    """Three, until their first comes: each is seen once at the punt port, going and coming back."""
    port = 'interface_{}_packets_total{{interface="masq-punt0"}}'
    text, number = bytes(1600), 4711
    packet = IP(bytes(IP(src=HOSTS["a-box"], dst=INTERNET, id=number) / UDP(sport=5000, dport=9) / Raw(text)))
    first, *later = (bytes(each) for each in fragment(packet, 400))
    with raw(gateway, "a-box", socket.IPPROTO_UDP) as near:
        before = scrape(gateway)

        def grown(series: str) -> float:
            return value(scrape(gateway), series) - value(before, series)

        for each in later:
            near.sendto(each, (INTERNET, 0))
        soon(lambda: grown('held_fragments_total{outcome="held"}') == len(later), "all wait")
        assert value(scrape(gateway), "fragments_held") >= len(later)
        assert grown('punted_packets_total{reason="fragment"}') == len(later)
        assert grown(port.format("transmit")) == len(later)
        near.sendto(first, (INTERNET, 0))
        soon(lambda: grown('held_fragments_total{outcome="released"}') == len(later), "none waits")
    assert grown("fragments_held") <= 0  # other tests' may have been given up meanwhile
    assert grown('punted_packets_total{reason="return"}') == len(later)
    assert grown(port.format("receive")) == len(later)


def test_status_says_where(gateway: Gateway) -> None:
    assert gateway.status()["metrics"] == "127.0.0.1:9477"


@pytest.mark.req("attacks-exposed")
def test_only_this_machine_reaches_them(gateway: Gateway) -> None:
    for role, address in (("a-box", "192.168.0.1"), ("a-box", PUBLIC), ("internet", PUBLIC)):
        with pytest.raises((ConnectionRefusedError, TimeoutError)):
            gateway.tcp(role, (address, ENDPOINT[1]), timeout_s=0.5)


@pytest.mark.req("attacks-exposed")
def test_its_other_users_learn_of_no_host(gateway: Gateway) -> None:
    assert gateway.opens()
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    text = gateway.gate(*nobody, "curl", "-sS", "http://127.0.0.1:9477/metrics")
    assert value(text, "working") == 1
    assert [address for address in HOSTS.values() if address in text] == []
    assert INTERNET not in text


def test_slow_clients_hold_up_nobody(gateway: Gateway) -> None:
    """Neither the agent nor Prometheus."""
    with gateway.inside(), ExitStack() as stack:
        for _ in range(1000):
            slow = stack.enter_context(socket.create_connection(ENDPOINT, timeout=20))
            slow.sendall(b"GET /metrics HTTP/1.1\r\n")
        ticks = [value(scrape(gateway), "agent_last_tick_time_seconds")]
        soon(lambda: value(scrape(gateway), "agent_last_tick_time_seconds") > ticks[0], "the agent ticks")
        assert gateway.opens()


def test_of_two_gateways_the_second_needs_another_endpoint(gateway: Gateway, tmp_path: Path) -> None:
    """It is said before anything is attached."""
    lines = (
        "link add wan9 type veth peer name lan9",
        "address add 198.18.0.1/24 dev wan9",
        "link set wan9 up",
        "link set lan9 up",
    )
    for line in lines:
        gateway.gate("ip", *line.split())
    try:
        second = ["attach", "--wan", "wan9", "--lan", "lan9", "--mode", "tc"]
        done = gateway.masq(*second, check=False)
        assert done.returncode == 1
        assert "cannot serve metrics on 127.0.0.1:9477: the port is taken" in done.stderr
        assert "[metrics]" in done.stderr
        assert gateway.on("wan9") == gateway.on("lan9") == set()
        (tmp_path / "second.toml").write_text('[metrics]\nlisten = "127.0.0.1:9478"\n')
        gateway.masq(*second, "--config", str(tmp_path / "second.toml"))
        assert "xdpmasq_working 1" in gateway.gate("curl", "-sS", "http://127.0.0.1:9478/metrics")
        gateway.masq("detach", "--wan", "wan9")
    finally:
        gateway.gate("ip", "link", "del", "wan9")


@ONE_MODE
def test_tls_and_passwords(bare: Gateway, tmp_path: Path, tls: Path) -> None:
    bcrypt = pytest.importorskip("bcrypt")
    hashed = bcrypt.hashpw(b"open", bcrypt.gensalt(4)).decode()
    (tmp_path / "masq.toml").write_text('[metrics]\nweb_config = "web.yml"\ntop_hosts = 3\n')
    web = tmp_path / "web.yml"

    web.write_text("tls_server_config: {cert_file: none.pem, key_file: none.pem}\n")
    assert "none.pem" in bare.attach("--config", str(tmp_path / "masq.toml"), check=False)
    assert not bare.is_attached

    files = f"cert_file: {tls / 'cert.pem'}, key_file: {tls / 'key.pem'}"
    web.write_text(f"tls_server_config: {{{files}}}\nbasic_auth_users: {{ali: {hashed}}}\n")
    bare.attach("--config", str(tmp_path / "masq.toml"))
    assert bare.opens()
    asking = ["curl", "-sS", "--fail", "--cacert", str(tls / "cert.pem"), "https://localhost:9477/metrics"]
    assert f'host_sessions{{host="{HOSTS["a-box"]}"}} 1' in bare.gate(*asking, "-u", "ali:open")
    assert bare.lab.exec(GATE, asking, check=False).returncode == 22
    assert bare.lab.exec(GATE, [*asking, "-u", "ali:shut"], check=False).returncode == 22


@ONE_MODE
def test_its_life(bare: Gateway, tmp_path: Path) -> None:
    """A port that is taken, an agent that goes on after another, and metrics switched off."""
    with bare.inside(), socket.create_server(ENDPOINT):
        said = bare.attach(check=False)
    assert "cannot serve metrics on 127.0.0.1:9477: the port is taken" in said
    assert not bare.is_attached

    bare.gate("ip", "link", "set", "lo", "down")  # as a fresh namespace has it
    bare.attach()
    bare.gate("ip", "link", "set", "lo", "up")
    assert value(scrape(bare), "agent_restarts_total") == 0
    bare.kill_agent()
    bare.attach()
    assert value(scrape(bare), "agent_restarts_total") == 1

    soon(lambda: value(scrape(bare), "expiry_duration_seconds_count") > 0, "there was a look at the sessions")
    hops = "next_hop_disarms_total"
    before = value(scrape(bare), hops)
    bare.gate("ip", "route", "add", "198.18.9.0/24", "via", INTERNET)
    soon(lambda: value(scrape(bare), hops) > before, "flows are to ask for their next hop")
    bare.gate("ip", "route", "del", "198.18.9.0/24")

    bare.kill_agent()
    (tmp_path / "off.toml").write_text("[metrics]\nenabled = false\n")
    bare.attach("--config", str(tmp_path / "off.toml"))
    with pytest.raises(ConnectionRefusedError), bare.inside():
        socket.create_connection(ENDPOINT, timeout=5)
    assert bare.status()["metrics"] is None
