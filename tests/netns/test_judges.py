"""What independent programs, made to find out about NATs, say of ours: coturn's natdiscovery and Vovida's stun.

Both ask a STUN server that has two addresses and two ports (RFC 5780, and RFC 3489 before it):

    a-box, b-box, c-box ─ lan0 masq-gate wan0 ─ internet: turnserver on .10 and .11, ports 3478 and 3479
"""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from netkit import Gateway

from xdpmasq.config import Filtering
from xdpmasq.lab import Lab
from xdpmasq.lab.servers import Server
from xdpmasq.lab.topology import INTERNET, INTERNET_TOO, PUBLIC

STUN_PORT, OTHER_STUN_PORT = 3478, 3479
PATIENCE_S = 60  # natdiscovery waits 3 s for each answer that a filter keeps from it

# What the two call the behaviours of RFC 4787; natdiscovery says it of mapping and of filtering.
ENDPOINT_INDEPENDENT = "Endpoint Independent"
ADDRESS_DEPENDENT = "Address Dependent"
ADDRESS_AND_PORT_DEPENDENT = "Address and Port Dependent"
VOVIDA = {
    "Independent Filter": ENDPOINT_INDEPENDENT,
    "Address Dependent Filter": ADDRESS_DEPENDENT,
    "Port Dependent Filter": ADDRESS_AND_PORT_DEPENDENT,
}


class StunServer(Server):
    """coturn, as a STUN server only; nothing of it is read from /etc or left outside the lab's directory."""

    name = "turnserver"

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        options = [
            *("-n", "--stun-only", "-m", "1", "--no-cli", "--no-tcp", "--no-tls", "--no-dtls"),
            *("-L", INTERNET, "-L", INTERNET_TOO),
            *("--listening-port", str(STUN_PORT), "--alt-listening-port", str(OTHER_STUN_PORT)),
            *("--log-file", "stdout", "--simple-log"),
            *("--pidfile", self.directory / "pid", "--userdb", self.directory / "db"),
        ]
        self._start(["turnserver", *options], "udp", STUN_PORT)


@dataclass(frozen=True)
class Verdict:
    """What a judge says of mapping and of filtering."""

    mapping: str
    filtering: str


def discover(gateway: Gateway, box: str, *options: str) -> str:
    """coturn's natdiscovery in a box; its report."""
    done = gateway.lab.exec(box, ["turnutils_natdiscovery", *options, INTERNET], timeout_s=PATIENCE_S)
    return done.stdout


def coturn_verdict(gateway: Gateway) -> Verdict:
    with ThreadPoolExecutor(2) as pool:
        mapping = pool.submit(discover, gateway, "a-box", "-m")
        filtering = pool.submit(discover, gateway, "b-box", "-f")
        reports = mapping.result() + filtering.result()
    # Both attributes that tell the public endpoint say the same: nobody edits addresses within payloads.
    assert reports.count("No ALG: Mapped == XOR-Mapped") >= 2
    assert set(re.findall(r"reflexive addr: ([\d.]+):", reports)) == {PUBLIC}
    (found,) = re.findall(r"^NAT with (.+) Mapping!", reports, re.MULTILINE)
    (kept,) = re.findall(r"^NAT with (.+) Filtering!", reports, re.MULTILINE)
    return Verdict(found, kept)


def coturn_hairpins(gateway: Gateway, box: str = "a-box") -> bool:
    """Whether natdiscovery reaches itself by its public endpoint."""
    return "a successful hairpinning" in discover(gateway, box, "-H")


def vovida_report(gateway: Gateway, box: str = "c-box") -> list[str]:
    """The properties that Vovida's client finds: mapping, filtering, "random port", "no hairpin" and so on."""
    # Its exit status is what it found, in bits.
    output = gateway.lab.exec(box, ["stun", INTERNET], check=False, timeout_s=PATIENCE_S).stdout
    (words,) = re.findall(r"^Primary: (.+)$", output, re.MULTILINE)
    return [word.strip() for word in words.split(",")]


@pytest.mark.req("4787-1")
@pytest.mark.req("4787-8")
@pytest.mark.req("4787-9")
@pytest.mark.parametrize(
    ("word", "filtering"),
    [
        pytest.param("address-and-port-dependent", ADDRESS_AND_PORT_DEPENDENT, id="default"),
        pytest.param("address-dependent", ADDRESS_DEPENDENT, id="address"),
        pytest.param("endpoint-independent", ENDPOINT_INDEPENDENT, id="full cone"),
    ],
)
@pytest.mark.parametrize("mode", ["tc"], indirect=True)  # XDP neither maps nor filters
def test_what_they_find(bare: Gateway, word: str, filtering: str) -> None:
    """Mapping, filtering as the settings promise, and hairpinning."""
    StunServer(bare.lab)
    bare.attach_with(filtering=Filtering(udp=word))
    with ThreadPoolExecutor(2) as pool:
        coturn = pool.submit(coturn_verdict, bare)
        hairpins = pool.submit(coturn_hairpins, bare, "c-box")
        mapping, kept, port, hairpin = vovida_report(bare)
        assert coturn.result() == Verdict(ENDPOINT_INDEPENDENT, filtering)
        assert hairpins.result()
    assert (mapping, VOVIDA[kept], port, hairpin) == (
        "Independent Mapping",
        filtering,
        "random port",
        "will hairpin",
    )


@pytest.mark.req("4787-3")
def test_colliding_endpoints(bare: Gateway) -> None:
    """Two internal addresses, one port: natdiscovery is told two public endpoints."""
    StunServer(bare.lab)
    bare.attach()
    bare.lab.exec("a-box", ["ip", "address", "add", "192.168.0.22/24", "dev", "eth0"])
    report = discover(bare, "a-box", "-c", "-L", "192.168.0.2", "-A", "192.168.0.22")
    local = re.findall(r"Local addr: : ([\d.]+):(\d+)", report)
    assert {address for address, _ in local} == {"192.168.0.2", "192.168.0.22"}
    assert len({port for _, port in local}) == 1
    public = re.findall(r"reflexive addr: (\S+)", report)
    assert len(public) == len(set(public)) == 2
    assert all(endpoint.startswith(f"{PUBLIC}:") for endpoint in public)
