"""The parts of the lab that need no root: the plan, pcap files, comparisons, waiting."""

import re
import struct
from pathlib import Path

import pytest

from xdpmasq.errors import HostError
from xdpmasq.lab import Lab, LabError, programs
from xdpmasq.lab.capture import read_pcap
from xdpmasq.lab.errors import wait_until
from xdpmasq.lab.snapshot import differences
from xdpmasq.lab.topology import Topology

PCAP_HEADER = struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)
VARIANTS = [
    *(Topology(), Topology(lans=2), Topology(wan="tun"), Topology(lans=2, wan="tun", far_mtu=1400)),
    *(Topology(wans=2), Topology(wan="tun", wans=2)),
]


def frame(content: bytes) -> bytes:
    return struct.pack("=IIII", 0, 0, len(content), len(content)) + content


@pytest.mark.parametrize("topology", VARIANTS, ids=str)
def test_every_cable_end_is_configured_and_every_role_wired(topology: Topology) -> None:
    ends = [
        end
        for cable in topology.cables()
        for end in ((cable.role, cable.interface), (cable.other_role, cable.other_interface))
    ]
    assert len(set(ends)) == len(ends)
    assert {role for role, _ in ends} == set(topology.roles) == set(topology.configuration())
    for role, interface in ends:
        words = [command.split() for command in topology.configuration()[role]]
        assert any(command[:3] == ["link", "set", interface] and command[-1] == "up" for command in words)


@pytest.mark.parametrize("topology", VARIANTS, ids=str)
def test_the_internet_knows_no_way_to_private_addresses(topology: Topology) -> None:
    for role in ("internet", "transit", "far"):
        assert not any("192.168" in command for command in topology.configuration()[role])
    assert not any("default" in command for command in topology.configuration()["internet"])


@pytest.mark.parametrize("topology", VARIANTS, ids=str)
def test_the_drawing_fits_a_terminal_and_shows_every_host(topology: Topology) -> None:
    lines = topology.drawing.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(host in topology.drawing for host in topology.hosts)


@pytest.mark.parametrize("prefix", ["", "a/b", "../x", "-n", "a b", "x" * 100])
def test_a_prefix_that_is_no_safe_name_is_refused(prefix: str) -> None:
    with pytest.raises(LabError, match="cannot name a lab"):
        Lab(prefix)


def test_an_unknown_role_is_named_with_the_known_ones() -> None:
    with pytest.raises(LabError, match=r"no 'e-box'.*a-box"):
        Lab().namespace("e-box")


@pytest.mark.parametrize(
    ("content", "frames"),
    [
        (b"", []),
        (PCAP_HEADER, []),
        (PCAP_HEADER + frame(b"one") + frame(b"") + frame(b"three"), [b"one", b"", b"three"]),
        (PCAP_HEADER + frame(b"one") + frame(b"cut short")[:-1], [b"one"]),
        (PCAP_HEADER + frame(b"one") + frame(b"cut short")[:10], [b"one"]),
    ],
    ids=["not begun", "no frames", "three", "cut in a frame", "cut in a header"],
)
def test_read_pcap(tmp_path: Path, content: bytes, frames: list[bytes]) -> None:
    file = tmp_path / "x.pcap"
    file.write_bytes(content)
    assert list(read_pcap(file)) == frames


def test_read_pcap_refuses_another_format(tmp_path: Path) -> None:
    file = tmp_path / "x.pcap"
    file.write_bytes(bytes(100))
    with pytest.raises(LabError, match="not a pcap file"):
        list(read_pcap(file))


def test_differences_are_marked_as_by_diff() -> None:
    assert differences({"a", "b"}, {"b", "c"}) == ["- a", "+ c"]


def test_waiting_in_vain_says_for_what() -> None:
    with pytest.raises(LabError, match="until pigs fly"):
        wait_until(lambda: False, "pigs fly", timeout_s=0)


def test_missing_programs_are_told_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path: None if name in ("dig", "ssh", "sshd") else f"/bin/{name}")
    groups = programs.BUILDING.items(), programs.SERVING.items(), programs.ASKING.items()
    with pytest.raises(HostError, match=r"the demo needs programs.*: sshd, dig, ssh") as raised:
        programs.require("the demo", *groups)
    assert raised.value.do == "apt install bind9-dnsutils openssh-client openssh-server"


def test_the_package_suggests_what_the_lab_runs() -> None:
    control = (Path(__file__).parents[2] / "packaging" / "debian" / "control").read_text()
    suggested = set(re.split(r",\s+", control.partition("Suggests: ")[2].partition("\nDescription")[0]))
    wanted = {*programs.BUILDING.values(), *programs.SERVING.values(), *programs.ASKING.values()}
    assert wanted <= suggested
