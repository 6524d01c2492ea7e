"""The lab is what its drawing says, and leaves nothing behind.

::

    a-box .2 ─┐                                         ┌─ .10 .11 internet
    b-box .3 ─┼─ switch ─ lan0 .1 masq-gate .1 wan0 ─ exchange
    c-box .4 ─┘                                         └─ .254 transit .1 ─ .10 far
"""

import io
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from xdpmasq.lab import Lab, LabError, demo, netns
from xdpmasq.lab.gateways import GATEWAYS, KernelMasquerade, Reply
from xdpmasq.lab.nft import masquerading
from xdpmasq.lab.servers import DnsServer, EchoServer, IperfServer, SshServer, WebServer
from xdpmasq.lab.snapshot import differences, snapshot
from xdpmasq.lab.topology import FAR, INTERNET, INTERNET_TOO, PUBLIC, ROLES

_numbers = itertools.count()


def new_prefix() -> str:
    return f"tl{os.getpid()}-{next(_numbers)}"


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(new_prefix()) as built:
        yield built


def answers(lab: Lab, role: str, address: str) -> bool:
    return lab.exec(role, ["ping", "-n", "-c1", "-W1", address], check=False).returncode == 0


def remains(lab: Lab) -> list[str]:
    """Everything on this machine that belongs to the lab."""
    names = [lab.namespace(role) for role in ROLES]
    namespaces = [name for name in names if netns.exists(name)]
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if f"/{lab.prefix}-" in line]
    processes = [str(pid) for pid in netns.processes_in(names)]
    return namespaces + mounts + processes + [str(path) for path in [lab.directory] if path.exists()]


def test_nothing_remains_after_down() -> None:
    lab = Lab(new_prefix())
    lab.up()
    WebServer(lab)
    server_of_a_user = lab.popen("a-box", ["sleep", "1000"])
    lab.capture("a-box", "eth0")
    assert remains(lab)

    lab.down()

    assert remains(lab) == []
    assert server_of_a_user.returncode == -signal.SIGTERM
    lab.down()  # nothing to do, and no error


def test_down_removes_what_a_killed_process_left() -> None:
    prefix = new_prefix()
    program = (
        "import sys, time; from xdpmasq.lab import Lab; lab = Lab(sys.argv[1], lans=2, wan='tun'); lab.up();"
        "lab.popen('far', ['sleep', '1000']); print('up', flush=True); time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", program, prefix], stdout=subprocess.PIPE) as owner:
        assert owner.stdout
        assert owner.stdout.readline() == b"up\n"
        owner.kill()
    lab = Lab(prefix)
    assert remains(lab)

    lab.down()

    assert remains(lab) == []


def test_a_second_lab_of_the_same_name_is_refused(lab: Lab) -> None:
    with pytest.raises(LabError, match=f"xdpmasq lab down --name {lab.prefix}"):
        Lab(lab.prefix).up()
    assert answers(lab, "a-box", "192.168.0.1")


def test_a_failed_up_leaves_nothing() -> None:
    lab = Lab(new_prefix(), far_mtu=1)  # no kernel takes it
    with pytest.raises(LabError, match="ip: "):
        lab.up()
    assert remains(lab) == []


@pytest.mark.parametrize("wan", ["veth", "tun"])
@pytest.mark.parametrize("offloads", [True, False], ids=["offloads", "no offloads"])
def test_nobody_gets_out_until_the_gateway_masquerades(wan: str, offloads: bool) -> None:
    with Lab(new_prefix(), lans=2, wan=wan, offloads=offloads) as lab:  # type: ignore[arg-type]
        assert answers(lab, "a-box", "192.168.0.3")
        assert answers(lab, "d-box", "192.168.1.1")
        netns.set_sysctls(lab.namespace("masq-gate"), {"net/ipv4/ip_forward": 1})
        assert not answers(lab, "a-box", INTERNET)
        with masquerading(lab):
            for host, address in itertools.product(("a-box", "d-box"), (INTERNET, INTERNET_TOO, FAR)):
                assert answers(lab, host, address)
            web = WebServer(lab)
            # Bulk data shows whether checksums and segments survive the way.
            done = lab.exec("a-box", ["sh", "-c", f"curl -sS {web.big_url} | sha256sum"])
            assert done.stdout.split()[0] == web.big_sha256
        assert netns.get_sysctl(lab.namespace("masq-gate"), "net/ipv4/ip_forward") == 0


def test_labs_do_not_meet(lab: Lab) -> None:
    with Lab(new_prefix()) as other:
        with masquerading(lab), other.capture("internet", "eth0", "icmp") as elsewhere:
            assert answers(lab, "a-box", INTERNET)
            assert elsewhere.stop() == []
        assert answers(other, "b-box", "192.168.0.2")
    assert remains(other) == []
    assert answers(lab, "b-box", "192.168.0.2")


def test_a_capture_has_all_that_passed_and_only_that(lab: Lab) -> None:
    with lab.capture(*lab.topology.wan_wire, "icmp[icmptype] = icmp-echo") as requests:
        lab.exec("masq-gate", ["ping", "-c20", "-i0.002", INTERNET])
        frames = requests.stop()
    assert len(frames) == 20
    assert {frame[12:14] for frame in frames} == {b"\x08\x00"}
    assert {socket.inet_ntoa(frame[26:30]) for frame in frames} == {PUBLIC}
    assert requests.stop() == frames


def test_a_capture_that_cannot_start_says_why(lab: Lab) -> None:
    with pytest.raises(LabError, match="syntax error"):
        lab.capture("a-box", "eth0", "no such filter")


def test_the_far_link_is_as_narrow_as_asked_for() -> None:
    with Lab(new_prefix(), far_mtu=1300) as lab:
        assert "pmtu 1300" in lab.exec("masq-gate", ["tracepath", "-n", FAR]).stdout


def test_offloads_of_the_ends_facing_the_gateway_can_be_switched(lab: Lab) -> None:
    def of(role: str, port: str) -> set[str]:
        features = lab.exec(role, ["ethtool", "-k", port]).stdout.splitlines()
        wanted = ("tx-checksumming", "tcp-segmentation-offload", "generic-receive-offload")
        return {feature for feature in features if feature.startswith(wanted)}

    ports = [("switch", "gate-lan0"), ("exchange", "masq-gate")]
    before = [of(*port) for port in ports]
    lab.set_offloads(False)
    for port in ports:
        assert of(*port) == {
            "tx-checksumming: off",
            "tcp-segmentation-offload: off",
            "generic-receive-offload: on",
        }
    lab.set_offloads(True)
    assert [of(*port) for port in ports] == before


def test_servers_tell_whom_they_saw(lab: Lab) -> None:
    web, dns, ssh = WebServer(lab), DnsServer(lab), SshServer(lab)
    own = lab.exec("masq-gate", ["curl", "-sS", "-o/dev/null", "-w%{local_ip}:%{local_port}", f"{web.url}?x"])
    name = lab.exec("masq-gate", ["dig", "+short", f"-b{PUBLIC}#40053", f"@{INTERNET}", "x.lab.test"])
    login = lab.exec("masq-gate", [*ssh.client, f"root@{INTERNET}", "echo $SSH_CLIENT"])
    assert [(client.endpoint, client.about) for client in web.clients()] == [(own.stdout, "/?x")]
    assert name.stdout.strip() == INTERNET
    assert [(client.endpoint, client.about) for client in dns.clients()] == [(f"{PUBLIC}:40053", "x.lab.test")]
    address, port, _ = login.stdout.split()
    assert [(client.endpoint, client.about) for client in ssh.clients()] == [(f"{address}:{port}", "root")]


def test_udp_echo_and_a_socket_of_our_own(lab: Lab) -> None:
    EchoServer(lab)
    with lab.socket("masq-gate", socket.SOCK_DGRAM) as client:
        client.settimeout(2)
        client.connect((INTERNET, 7))
        client.send(b"hello")
        assert client.recv(100) == b"hello"
        client.send(b"who")
        assert client.recv(100).decode() == "{}:{}".format(*client.getsockname())


def test_iperf_and_stopping_a_server(lab: Lab) -> None:
    server = IperfServer(lab)
    lab.exec("masq-gate", ["iperf3", "-c", INTERNET, "-n", "1M"])
    server.stop()
    assert lab.exec("masq-gate", ["iperf3", "-c", INTERNET, "-n", "1M"], check=False).returncode != 0


def test_a_server_that_cannot_start_says_why(lab: Lab) -> None:
    with pytest.raises(LabError, match="Cannot assign requested address"):
        WebServer(lab, "far", INTERNET)


@pytest.mark.parametrize(
    "change",
    [
        ["ip", "link", "set", "lan0", "mtu", "1400"],
        ["tc", "qdisc", "add", "dev", "wan0", "clsact"],
        ["sysctl", "-w", "net.ipv4.ip_forward=1"],
        ["ethtool", "-K", "lan0", "tx", "off"],
        ["nft", "add", "table", "ip", "left_over"],
        ["ip", "route", "add", "10.0.0.0/8", "via", "192.168.0.2"],
        ["sh", "-c", "sleep 100 >/dev/null 2>&1 &"],
    ],
    ids=lambda change: change[0],
)
def test_a_snapshot_shows_what_changed(lab: Lab, change: list[str]) -> None:
    before = snapshot(lab)
    assert differences(before, snapshot(lab)) == []
    lab.exec("masq-gate", change)
    assert differences(before, snapshot(lab))


def _play(lab: Lab, gateway: str) -> str:
    """The demo through the kernel's masquerade; what it printed.

    conntrack drops a first packet when two hosts claim one id in the same instant: then once more.
    """
    for again in (True, False):
        output = io.StringIO()
        try:
            demo.run(Console(file=output), name=lab.prefix, gateway=gateway, modes=["auto"], cpu=False)
        except LabError as error:
            if not (again and "lost pings" in str(error)):
                raise
        else:
            break
    return output.getvalue()


def test_the_demo_through_the_kernel() -> None:
    lab = Lab(new_prefix())
    output = _play(lab, "nft")
    assert "All 10 checks passed" in output
    assert "\x1b" not in output
    assert remains(lab) == []


class _Idle(KernelMasquerade):
    """A gateway that does nothing."""

    def attach(self) -> Reply:
        return Reply("true", "")


class _Untidy(KernelMasquerade):
    """A gateway that leaves its rules behind."""

    def detach(self) -> Reply:
        return Reply("true", "")


@pytest.mark.parametrize(
    ("gateway", "words"),
    [(_Idle, "could not download"), (_Untidy, r"\+ nftables: table ip lab_masq")],
    ids=["idle", "untidy"],
)
def test_the_demo_fails_with_a_bad_gateway(
    monkeypatch: pytest.MonkeyPatch, gateway: type[KernelMasquerade], words: str
) -> None:
    monkeypatch.setitem(GATEWAYS, "bad", gateway)
    lab = Lab(new_prefix())
    with pytest.raises(LabError, match=words):
        _play(lab, "bad")
    assert remains(lab) == []
