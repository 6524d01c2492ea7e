"""External addresses in words."""

from ipaddress import IPv4Address, IPv4Network

import pytest

from xdpmasq.config import Config, as_fields, from_fields, validate
from xdpmasq.errors import ConfigError, UsageError
from xdpmasq.externals import Exempt, Externals, Place

EVERYBODY = IPv4Network("0.0.0.0/0")

ALL = {
    "addresses": ["203.0.113.1", "203.0.113.4-203.0.113.6"],
    "choices": ["192.168.1.0/24 as 203.0.113.5", "192.168.2.0/24 as 203.0.113.8, 203.0.113.9"],
    "one_to_one": ["192.168.0.9 as 203.0.113.99", "192.168.8.0/29 as 203.0.113.64/29"],
    "exempt": ["10.8.0.0/16", "198.51.100.7 udp 500-4500", "198.51.100.7 tcp 443"],
}


def test_words_and_back() -> None:
    externals = Externals.parse(**ALL, answer_arp=True)
    assert externals.choices[1].addresses == (IPv4Address("203.0.113.8"), IPv4Address("203.0.113.9"))
    assert externals.one_to_one[1].external == IPv4Network("203.0.113.64/29")
    assert externals.exempt[1] == Exempt(IPv4Network("198.51.100.7"), "udp", 500, 4500)
    config = Config(("wan0",), ("lan0",), external=externals)
    validate(config)
    assert from_fields(as_fields(config)) == config


def test_each_address_once() -> None:
    externals, primary = Externals.parse(**ALL), IPv4Address("192.0.2.1")
    owners = dict.fromkeys(externals.named(), 0)
    places, choices = externals.places([primary], owners)
    assert [str(each.address)[10:] for each in places] == ["1", "4", "5", "6", "8", "9"]
    assert {str(prefix): some for (_, prefix), some in choices.items()} == {
        "0.0.0.0/0": [0, 1, 2, 3],
        "192.168.1.0/24": [2],
        "192.168.2.0/24": [4, 5],
    }
    assert Externals.parse(choices=ALL["choices"]).places([primary], owners)[0][0] == Place(primary, 0)
    assert Externals().places([primary], {}) == ([Place(primary, 0)], {(0, EVERYBODY): [0]})


@pytest.mark.parametrize(
    ("fields", "owned", "wanted", "everybody"),
    [
        pytest.param({}, {}, ["a 0", "b 1"], {0: [0], 1: [1]}, id="none named"),
        pytest.param(
            {"addresses": ["1", "2"]}, {"1": 0, "2": 0}, ["1 0", "b 1", "2 0"], {0: [0, 2], 1: [1]}, id="first"
        ),
        pytest.param(
            {"addresses": ["1", "2"]}, {"1": 1, "2": 1}, ["a 0", "1 1", "2 1"], {0: [0], 1: [1, 2]}, id="second"
        ),
        pytest.param({"addresses": ["1", "2"]}, {"2": 0, "1": 1}, ["2 0", "1 1", "- 0"], {0: [0], 1: [1]}, id="both"),
        pytest.param(
            {"addresses": ["1", "2"]}, {"2": 0}, ["2 0", "b 1", "- 0"], {0: [0], 1: [1]}, id="one nobody has"
        ),
        pytest.param(
            {"choices": ["10.0.0.1 as 203.0.113.1"]}, {"1": 1}, ["a 0", "b 1", "1 1"], {0: [0], 1: [1]}, id="chosen"
        ),
    ],
)
def test_addresses_belong_to_the_wan_that_has_them(
    fields: dict[str, list[str]], owned: dict[str, int], wanted: list[str], everybody: dict[int, list[int]]
) -> None:
    names = {"a": "192.0.2.1", "b": "198.51.100.1", **{last: f"203.0.113.{last}" for last in "12"}}
    externals = Externals.parse(**{key: [names.get(each, each) for each in texts] for key, texts in fields.items()})
    owners = {IPv4Network(names[last]): wan for last, wan in owned.items()}
    places, choices = externals.places([IPv4Address(names[each]) for each in "ab"], owners)
    called = {address: name for name, address in names.items()}
    assert [f"{called.get(str(each.address), '-')} {each.wan}" for each in places] == wanted
    assert len(places) == externals.room(2)
    assert {wan: some for (wan, prefix), some in choices.items() if prefix == EVERYBODY} == everybody
    chosen = {key: some for key, some in choices.items() if key[1] != EVERYBODY}
    assert chosen == ({(1, IPv4Network("10.0.0.1")): [2]} if "choices" in fields else {})


@pytest.mark.parametrize(
    ("key", "text", "told"),
    [
        pytest.param("addresses", "203.0.113.300", "is no IPv4 address", id="no address"),
        pytest.param("addresses", "203.0.113.9-203.0.113.4", "the lower address comes first", id="reversed"),
        pytest.param("addresses", "203.0.0.0-203.0.255.255", "there is room for 32", id="too long"),
        pytest.param("choices", "192.168.1.0/24", "does not say as whom", id="no external"),
        pytest.param("choices", "192.168.1.1/24 as 203.0.113.5", "has host bits set", id="host bits"),
        pytest.param("one_to_one", "192.168.8.0/29 as 203.0.113.64/30", "has 8 addresses", id="unequal"),
        pytest.param("exempt", "10.8.0.0/16 sctp", "after the prefix come tcp or udp", id="protocol"),
        pytest.param("exempt", "10.8.0.0/16 udp 9-7", "the lower first", id="ports reversed"),
        pytest.param("exempt", "10.8.0.0/16 udp 70000", "ports are 0 to 65535", id="port"),
    ],
)
def test_not_understood(key: str, text: str, told: str) -> None:
    with pytest.raises(UsageError) as refused:
        Externals.parse(**{key: [text]})
    assert told in f"{refused.value.what} {refused.value.why}"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        pytest.param({"addresses": ["203.0.113.1", "203.0.113.1"]}, "named twice", id="twice"),
        pytest.param({"addresses": ["203.0.113.1-203.0.113.32", "203.0.113.99"]}, "at most 32", id="too many"),
        pytest.param(
            {"one_to_one": ["10.0.0.0/30 as 203.0.113.0/30", "10.0.0.1 as 203.0.113.9"]},
            "it contradicts 10.0.0.0/30 as 203.0.113.0/30",
            id="overlapping",
        ),
        pytest.param(
            {"addresses": ["203.0.113.9"], "one_to_one": ["10.0.0.1 as 203.0.113.9"]},
            "203.0.113.9 is shared by others",
            id="shared and one's own",
        ),
        pytest.param({"exempt": ["0.0.0.0/0"]}, "nothing would be translated", id="everything exempt"),
        pytest.param({"exempt": [f"10.0.0.1 udp {n}" for n in range(5)]}, "room for 4", id="too many ports"),
    ],
)
def test_contradictions(fields: dict[str, list[str]], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        validate(Config(("wan0",), ("lan0",), external=Externals.parse(**fields)))
