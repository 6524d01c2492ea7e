"""Forwards in words: reading, naming, contradicting one another, and how ranges become entries."""

import re
from typing import Any

import pytest

from xdpmasq import forwards
from xdpmasq.errors import ForwardError, UsageError
from xdpmasq.forwards import Rule, contradiction, find, named_as, parse, port_prefixes

WEB = "192.168.0.2:80"


@pytest.mark.parametrize(
    ("protocol", "ports", "to", "source", "wanted"),
    [
        pytest.param("tcp", "8080", [WEB], "", "tcp 8080 → 192.168.0.2:80", id="one port"),
        pytest.param("TCP", 8080, ["192.168.0.2"], "", "tcp 8080 → 192.168.0.2:8080", id="the same port"),
        pytest.param(
            "udp", "5000-5010", ["192.168.0.3"], "", "udp 5000-5010 → 192.168.0.3:5000-5010", id="the same range"
        ),
        pytest.param(
            *("udp", "5000-5010", ["192.168.0.3:6000"], "", "udp 5000-5010 → 192.168.0.3:6000-6010"), id="shifted"
        ),
        pytest.param(
            *("udp", "5000-5010", ["192.168.0.3:6000-6010"], "", "udp 5000-5010 → 192.168.0.3:6000-6010"),
            id="range to range",
        ),
        pytest.param("tcp", "80-80", [WEB], "", "tcp 80 → 192.168.0.2:80", id="a range of one"),
        pytest.param(
            *("tcp", "80", [WEB, "192.168.0.3:80*2"], "198.51.100.0/24"),
            "tcp 80 → 192.168.0.2:80 192.168.0.3:80*2 from 198.51.100.0/24",
            id="weights and a source",
        ),
        pytest.param(
            "tcp", "80", [WEB], "198.51.100.7", "tcp 80 → 192.168.0.2:80 from 198.51.100.7/32", id="one remote"
        ),
        pytest.param("tcp", "80", [WEB], "0.0.0.0/0", "tcp 80 → 192.168.0.2:80", id="from anywhere"),
        pytest.param("udp", "default", ["192.168.0.9"], "", "udp default → 192.168.0.9", id="default host"),
        pytest.param("tcp", "1-65535", ["10.0.0.1"], "", "tcp 1-65535 → 10.0.0.1:1-65535", id="every port"),
        pytest.param("tcp", "65535", ["10.0.0.1:65535*1000"], "", "tcp 65535 → 10.0.0.1:65535*1000", id="the last"),
    ],
)
def test_read_and_written(protocol: str, ports: Any, to: list[str], source: str, wanted: str) -> None:
    rule = parse(protocol, ports, to, source)
    assert str(rule) == wanted
    assert parse(**rule.as_fields()) == rule


@pytest.mark.parametrize(
    ("protocol", "ports", "to", "source", "words"),
    [
        pytest.param("icmp", "80", [WEB], "", "icmp cannot be forwarded; give tcp or udp", id="protocol"),
        pytest.param("tcp", "0", [WEB], "", "no host has a port 0", id="port 0"),
        pytest.param("tcp", "0-5", [WEB], "", "no host has a port 0", id="range from 0"),
        pytest.param("tcp", "65536", [WEB], "", "65536 is no port: ports end at 65535", id="beyond"),
        pytest.param("tcp", "http", [WEB], "", "http is no port", id="a name"),
        pytest.param("tcp", "-5", [WEB], "", "-5 is no port", id="negative"),
        pytest.param("tcp", "٨٠", [WEB], "", "٨٠ is no port", id="other digits"),
        pytest.param("tcp", "5010-5000", [WEB], "", "5010-5000 runs backwards; write 5000-5010", id="reversed"),
        pytest.param("tcp", "80", [], "", "no target is given", id="no target"),
        pytest.param("tcp", "80", [f"10.0.0.{n}" for n in range(1, 10)], "", "9 targets are too many", id="nine"),
        pytest.param("tcp", "80", [WEB, WEB], "", "192.168.0.2:80 is named twice", id="twice"),
        pytest.param("tcp", "80", ["192.168.0.2:80*0"], "", "allowed is 1 to 1000", id="weight 0"),
        pytest.param("tcp", "80", ["192.168.0.2:80*1001"], "", "allowed is 1 to 1000", id="weight too big"),
        pytest.param("tcp", "80", ["192.168.0.2:80*"], "", "no possible weight", id="no weight"),
        pytest.param("tcp", "80", ["fd00::2"], "", "fd00::2 is an IPv6 address", id="IPv6"),
        pytest.param("tcp", "80", ["[fd00::2]:80"], "", "[fd00::2]:80 is an IPv6 address", id="IPv6 and port"),
        pytest.param(
            "tcp", "80", ["nas.lan:80"], "", "nas.lan is no IPv4 address: names are not looked up", id="name"
        ),
        pytest.param("tcp", "80", ["192.168.0:80"], "", "192.168.0 is no IPv4 address", id="half an address"),
        pytest.param("tcp", "80", ["224.0.0.1"], "", "not the address of a host", id="multicast"),
        pytest.param("tcp", "80", [""], "", "nothing is no target", id="empty"),
        pytest.param("tcp", "80", ["192.168.0.2:"], "", "nothing is no port", id="colon without port"),
        pytest.param("tcp", "80", ["192.168.0.2:70000"], "", "ports end at 65535", id="target port beyond"),
        pytest.param("tcp", "80", ["192.168.0.2:0"], "", "no host has a port 0", id="target port 0"),
        pytest.param(
            *("tcp", "5000-5010", ["192.168.0.3:6000-6005"], ""),
            "192.168.0.3:6000-6005 does not fit the external ports: 6000-6005 is 6 ports, 5000-5010 is 11 ports",
            id="unequal ranges",
        ),
        pytest.param("tcp", "80", ["192.168.0.3:80-81"], "", "80-81 is 2 ports, 80 is 1 port", id="one to two"),
        pytest.param(
            *("tcp", "5000-5010", ["192.168.0.3:65530"], ""),
            "5000-5010 would lead to 65530-65540, and ports end at 65535; begin at 65525",
            id="range beyond the end",
        ),
        pytest.param(
            "tcp", "80", [WEB], "198.51.100.7/24", "bits beyond its length; write 198.51.100.0/24", id="bits"
        ),
        pytest.param("tcp", "80", [WEB], "2001:db8::/32", "2001:db8::/32 is an IPv6 prefix", id="IPv6 source"),
        pytest.param("tcp", "80", [WEB], "everybody", "everybody is no prefix", id="no prefix"),
        pytest.param(
            "tcp", "default", ["10.0.0.1", "10.0.0.2"], "", "the default host is one address", id="two hosts"
        ),
        pytest.param(
            "tcp", "default", ["10.0.0.1:80"], "", "gets every port as it is; write 10.0.0.1", id="its port"
        ),
        pytest.param(
            "tcp", "default", ["10.0.0.1"], "198.51.100.0/24", "write tcp default 10.0.0.1", id="its source"
        ),
    ],
)
def test_refused(protocol: str, ports: Any, to: list[str], source: str, words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        parse(protocol, ports, to, source)


def rule(words: str, source: str = "") -> Rule:
    protocol, ports, *to = words.split()
    return parse(protocol, ports, to, source)


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        pytest.param(rule(f"tcp 80 {WEB}"), rule(f"tcp 80 {WEB}"), f"tcp 80 → {WEB} is there already", id="the same"),
        pytest.param(
            rule("tcp 8090-8200 192.168.0.3"),
            rule("tcp 8000-8100 192.168.0.2"),
            "tcp 8090-8200 → 192.168.0.3:8090-8200 is not possible: tcp 8000-8100 → 192.168.0.2:8000-8100 is there "
            "already, and has tcp 8090-8100; xdpmasq forward del tcp 8000-8100",
            id="overlap",
        ),
        pytest.param(
            rule("tcp 80 192.168.0.3", "198.51.100.0/24"),
            rule("tcp 80 192.168.0.2", "198.51.100.0/24"),
            "xdpmasq forward del tcp 80 --from 198.51.100.0/24",
            id="the same source",
        ),
        pytest.param(
            rule("tcp default 192.168.0.3"),
            rule("tcp default 192.168.0.2"),
            "tcp default → 192.168.0.2 is there already; xdpmasq forward del tcp default",
            id="two default hosts",
        ),
        pytest.param(rule("tcp 80 192.168.0.3"), rule("udp 80 192.168.0.2"), "", id="other protocol"),
        pytest.param(rule("tcp 80 192.168.0.3"), rule("tcp 81 192.168.0.2"), "", id="neighbours"),
        pytest.param(
            rule("tcp 80 192.168.0.3", "198.51.100.0/24"), rule("tcp 80 192.168.0.2"), "", id="more specific"
        ),
        pytest.param(
            rule("tcp 80 192.168.0.3", "198.51.100.0/24"),
            rule("tcp 80 192.168.0.2", "198.51.0.0/16"),
            "",
            id="nested sources",
        ),
        pytest.param(rule("tcp 80 192.168.0.3"), rule("tcp default 192.168.0.2"), "", id="beside the default host"),
        pytest.param(
            rule("udp default 192.168.0.3"), rule("tcp default 192.168.0.2"), "", id="one for each protocol"
        ),
    ],
)
def test_contradictions_name_both_sides(one: Rule, other: Rule, words: str) -> None:
    error = contradiction(one, [other])
    assert bool(error) is bool(contradiction(other, [one])) is bool(words)
    if error:
        assert words in str(error)


RULES = [rule("tcp 80 192.168.0.2"), rule("tcp 80 192.168.0.2", "198.51.100.0/24"), rule("tcp 8000-8100 192.168.0.2")]


@pytest.mark.parametrize(
    ("ports", "source", "index"),
    [("80", "", 0), ("80", "198.51.100.0/24", 1), ("8000-8100", "", 2)],
)
def test_found_by_name(ports: str, source: str, index: int) -> None:
    assert find(RULES, named_as("tcp", ports, source)) is RULES[index]


@pytest.mark.parametrize(
    ("protocol", "ports", "source", "words"),
    [
        pytest.param("tcp", "8050", "", "there is no forward tcp 8050: near it: tcp 8000-8100, tcp 80", id="within"),
        pytest.param(
            "tcp", "80", "198.51.100.1", "no forward tcp 80 --from 198.51.100.1/32: near it: tcp 80", id="from"
        ),
        pytest.param("udp", "80", "", "there is no forward udp 80: near it: tcp 80", id="other protocol"),
        pytest.param("tcp", "default", "", "there is no forward tcp default", id="default host"),
    ],
)
def test_what_is_not_there_names_what_is(protocol: str, ports: str, source: str, words: str) -> None:
    with pytest.raises(ForwardError, match=re.escape(words)):
        find(RULES, named_as(protocol, ports, source))
    with pytest.raises(ForwardError, match="there is none at all"):
        find([], named_as(protocol, ports, source))


@pytest.mark.parametrize(
    ("first", "last"), [(1, 65535), (80, 80), (5000, 5010), (32768, 65535), (0, 65535), (1, 65534), (4096, 8191)]
)
def test_prefixes_of_ports_are_the_range_and_few(first: int, last: int) -> None:
    covered = [
        port for start, bits in port_prefixes(first, last) for port in range(start, start + (1 << (16 - bits)))
    ]
    assert covered == list(range(first, last + 1))
    assert all(start % (1 << (16 - bits)) == 0 for start, bits in port_prefixes(first, last))
    assert len(list(port_prefixes(first, last))) <= 30


def test_the_whole_space_is_one_prefix() -> None:
    assert list(port_prefixes(0, 65535)) == [(0, 0)]
    assert list(port_prefixes(8080, 8080)) == [(8080, 16)]


def test_the_limits_are_those_of_the_tables() -> None:
    from xdpmasq import source  # noqa: PLC0415

    text = (source.folder() / "types.h").read_text()
    assert f"#define FORWARDS {forwards.RULES_MOST}\n" in text
    assert f"#define TARGETS {forwards.TARGETS_MOST}\n" in text
