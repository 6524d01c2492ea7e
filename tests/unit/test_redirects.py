"""Redirects and triggers in words: reading, naming, contradicting one another and forwards."""

import re
from typing import Any

import pytest

from xdpmasq import forwards, redirects, triggers
from xdpmasq.errors import ForwardError, UsageError
from xdpmasq.forwards import Rule, contradiction

REDIRECTS = [
    pytest.param(("tcp", "80", "3128", "lan"), {}, "tcp 80 on lan → the gateway's 3128", id="one port"),
    pytest.param(("UDP", 53, 53, "lan"), {}, "udp 53 on lan → the gateway's 53", id="numbers"),
    pytest.param(("tcp", "80-90", "8080", "wan"), {}, "tcp 80-90 on wan → the gateway's 8080-8090", id="a range"),
    pytest.param(("tcp", "80-90", "80-90", "wan"), {}, "tcp 80-90 on wan → the gateway's 80-90", id="range to range"),
    pytest.param(
        ("tcp", "80", "3128", "lan"),
        {"source": "192.168.0.0/25", "not_to": ["203.0.113.0/24", "10.0.0.1", "10.0.0.1/32"]},
        "tcp 80 on lan from 192.168.0.0/25 but not to 10.0.0.1/32 203.0.113.0/24 → the gateway's 3128",
        id="for some",
    ),
]


@pytest.mark.parametrize(("words", "more", "wanted"), REDIRECTS)
def test_redirects(words: Any, more: dict[str, Any], wanted: str) -> None:
    rule = redirects.parse(*words, **more)
    assert str(rule) == wanted
    assert redirects.parse(**rule.as_fields()) == rule


@pytest.mark.parametrize(
    ("words", "more", "said"),
    [
        pytest.param(("tcp", "default", "80", "lan"), {}, "default is no port", id="default host"),
        pytest.param(("tcp", "80", "", "lan"), {}, "nothing is no port", id="no local port"),
        pytest.param(("tcp", "80", "65536", "lan"), {}, "ports end at 65535", id="beyond"),
        pytest.param(("tcp", "80-90", "65530", "lan"), {}, "would lead to 65530-65540", id="range beyond"),
        pytest.param(("tcp", "80-90", "80-85", "lan"), {}, "80-85 is 6 ports, 80-90 is 11 ports", id="unequal"),
        pytest.param(("sctp", "80", "80", "lan"), {}, "sctp cannot be redirected", id="protocol"),
        pytest.param(("tcp", "80", "80", "LAN"), {}, "LAN is no side; give --on lan or --on wan", id="side"),
        pytest.param(("tcp", "80", "80", "wan"), {"not_to": ["10.0.0.1"]}, "no destination can be spared", id="wan"),
        pytest.param(("tcp", "80", "80", "lan"), {"not_to": ["0.0.0.0/0"]}, "every destination", id="all spared"),
        pytest.param(("tcp", "80", "80", "lan"), {"not_to": ["web"]}, "web is no prefix", id="a name"),
        pytest.param(("tcp", "80", "80", "lan"), {"not_to": ["10.0.0.1"] * 65}, "at most 64", id="many"),
    ],
)
def test_no_redirects(words: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        redirects.parse(*words, **more)


def test_triggers() -> None:
    rule = triggers.parse("udp", "6112", "TCP 6112-6119", 300)
    assert str(rule) == "udp 6112 opens tcp 6112-6119 for 300 s"
    assert rule.name == "udp 6112 --opens tcp 6112-6119"
    assert triggers.parse(**rule.as_fields()) == rule


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(("icmp", "1", "tcp 1"), "icmp cannot be watched for", id="protocol"),
        pytest.param(("udp", "0", "tcp 1"), "0 is no port", id="port 0"),
        pytest.param(("udp", "1", "tcp"), 'write it as "tcp 6112-6119"', id="no ports"),
        pytest.param(("udp", "1", "tcp 5-4"), "5-4 runs backwards; write 4-5", id="backwards"),
        pytest.param(("udp", "1", "gre 5"), "gre cannot be opened", id="opened protocol"),
        pytest.param(("udp", "1", "tcp 5", 59), "allowed is 60 to 86400 s", id="short"),
        pytest.param(("udp", "1", "tcp 5", 86401), "allowed is 60 to 86400 s", id="long"),
    ],
)
def test_no_triggers(words: Any, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        triggers.parse(*words)


FORWARD = forwards.parse("tcp", "80-90", ["192.168.0.2"])
ON_LAN = redirects.parse("tcp", "80", 3128, "lan")
ON_WAN = redirects.parse("tcp", "90-95", 3128, "wan")
TRIGGER = triggers.parse("udp", "6112-6120", "tcp 7000-7010")


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        pytest.param(FORWARD, ON_LAN, None, id="on lan is another matter"),
        pytest.param(ON_LAN, redirects.parse("tcp", "80", 1, "lan", source="10.0.0.1"), None, id="narrower source"),
        pytest.param(ON_LAN, redirects.parse("tcp", "80", 1, "wan"), None, id="other side"),
        pytest.param(
            ON_WAN,
            FORWARD,
            f"{FORWARD} is there already, and has tcp 90; xdpmasq forward del tcp 80-90",
            id="forward",
        ),
        pytest.param(
            FORWARD,
            ON_WAN,
            f"{ON_WAN} is there already, and has tcp 90; xdpmasq redirect del tcp 90-95 --on wan",
            id="redirect",
        ),
        pytest.param(ON_LAN, ON_LAN, "is there already; see `xdpmasq redirect list`", id="twice"),
        pytest.param(ON_LAN, redirects.parse("tcp", "1-100", 1, "lan"), "and has tcp 80", id="overlap on lan"),
        pytest.param(
            forwards.parse("tcp", "7010", ["10.0.0.1"]),
            TRIGGER,
            "xdpmasq trigger del udp 6112-6120 --opens tcp 7000-7010",
            id="opened",
        ),
        pytest.param(
            triggers.parse("udp", "6120", "tcp 1"), TRIGGER, "has udp 6120 to open tcp ports by", id="one call"
        ),
        pytest.param(triggers.parse("udp", "6120", "udp 1"), TRIGGER, None, id="one call, two protocols"),
        pytest.param(triggers.parse("udp", "6121", "tcp 7011"), TRIGGER, None, id="two triggers"),
    ],
)
def test_contradictions(one: Rule, other: Rule, said: str | None) -> None:
    error = contradiction(one, [other])
    assert (error is None) == (said is None)
    if said:
        assert said in str(error)


def test_found_by_name() -> None:
    rules = [ON_LAN, redirects.parse("tcp", "80", 1, "wan")]
    assert forwards.find(rules, redirects.named("tcp", 80, "wan")) is rules[1]
    with pytest.raises(ForwardError, match="there is no redirect udp 80 --on lan: near it: tcp 80 --on lan"):
        forwards.find(rules, redirects.named("udp", 80, "lan"))
