"""What is answered to PCP and NAT-PMP requests, byte by byte, over a book of mappings in memory."""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdpmasq.config import Config, Filtering, Pcp
from xdpmasq.errors import ForwardError
from xdpmasq.externals import Externals
from xdpmasq.forwarding import Placed
from xdpmasq.forwards import Lease, Rule, Target
from xdpmasq.leases import EVERYBODY, Endpoint, Filters, Held
from xdpmasq.pcp import LONGEST
from xdpmasq.pcpserver import FILTERS_MOST, Server

EXTERNAL = IPv4Address("203.0.113.1")
CLIENT, OTHER = IPv4Address("192.168.0.2"), IPv4Address("192.168.0.3")
NONCE, OTHER_NONCE = b"abcdefghijkl", b"ABCDEFGHIJKL"
EPOCH = 1000
TCP, UDP, SCTP = 6, 17, 132
OK, UNSUPP_VERSION, NOT_AUTHORIZED, MALFORMED_REQUEST, UNSUPP_OPCODE, UNSUPP_OPTION, MALFORMED_OPTION = range(7)
NETWORK_FAILURE, NO_RESOURCES, UNSUPP_PROTOCOL, USER_EX_QUOTA, CANNOT_PROVIDE, MISMATCH, EXCESSIVE = range(7, 14)
LONG, SHORT = 1800, 30  # lifetimes of errors (RFC 6887 section 7.4)

pytestmark = pytest.mark.req("6888-9")


class Shelf:
    """A book that knows nothing of kernels: port by port what hosts have.

    Attributes:
        taken: external ports that are somebody else's.
        mapped: the external port of an endpoint that has a mapping of its own.
        static: the user's forwards.
        full: there is no room for rules.
        connected: the WAN has an address.
    """

    def __init__(self) -> None:
        self.all: dict[Endpoint, Held] = {}
        self.taken: set[int] = set()
        self.mapped: dict[Endpoint, int] = {}
        self.static: dict[Endpoint, int] = {}
        self.full = False
        self.connected = True

    def external(self, host: IPv4Address) -> IPv4Address:
        return EXTERNAL

    def held(self, endpoint: Endpoint) -> Held | None:
        if endpoint in self.static:
            return Held(endpoint, self.static[endpoint], EXTERNAL)
        return self.all.get(endpoint)

    def held_by(self, host: IPv4Address, protocol: str | None = None) -> Iterator[Held]:
        for held in self.all.values():
            if held.endpoint.address == host and protocol in (None, held.endpoint.protocol):
                yield held

    def count(self) -> int:
        return sum(len(held.placed) for held in self.all.values())

    def open(
        self, endpoint: Endpoint, suggested: int, *, exact: bool, filters: Filters, nonce: bytes, lifetime_s: int
    ) -> Held | None:
        if self.full:
            raise ForwardError("no place")
        ports = {held.port for held in self.all.values()} | self.taken
        port = self.mapped.get(endpoint) or (suggested if suggested not in (0, *ports) else 40000 + len(ports))
        if exact and port != suggested:
            return None
        held = Held(endpoint, port, EXTERNAL, nonce, lifetime_s)
        self.renew(held, lifetime_s, filters)
        return self.all[endpoint]

    def renew(self, held: Held, lifetime_s: int, filters: Filters) -> None:
        target, lease = Target(held.endpoint.address, held.endpoint.port), Lease(held.nonce or b"", 0)
        rules = [Rule(held.endpoint.protocol, held.port, held.port, (target,), each, lease) for each in filters]
        placed = tuple(Placed(0, rule, 0, 0) for rule in rules)
        self.all[held.endpoint] = replace(held, left_s=lifetime_s, placed=placed)

    def end(self, held: Iterable[Held]) -> None:
        for each in held:
            del self.all[each.endpoint]

    def filters(self, endpoint: Endpoint) -> list[str]:
        return [str(each.rule.source) for each in self.all[endpoint].placed]


def served(shelf: Shelf | None = None, **settings: Any) -> tuple[Server, Shelf]:
    shelf = shelf or Shelf()
    return Server(Config(("wan0",), ("lan0",), **settings), shelf, lambda: EPOCH, lambda _: shelf.connected), shelf


# --- messages, built from the RFCs' pictures -------------------------------------------------------


def mapped(address: object) -> bytes:
    return bytes(10) + b"\xff\xff" + IPv4Address(str(address)).packed


def pcp(opcode: int, lifetime: int, body: bytes = b"", client: object = CLIENT, version: int = 2) -> bytes:
    return struct.pack("!BBHI", version, opcode, 0, lifetime) + mapped(client) + body


def option(code: int, data: bytes = b"") -> bytes:
    return struct.pack("!BBH", code, 0, len(data)) + data + bytes(-len(data) % 4)


def filter_(prefix: str, port: int = 0) -> bytes:
    network = IPv4Network(prefix)
    return option(3, struct.pack("!BBH", 0, 96 + network.prefixlen, port) + mapped(network.network_address))


NO_FILTER = option(3, bytes(20))
PREFER_FAILURE = option(2)


def map_(
    lifetime: int = 600,
    protocol: int = TCP,
    port: int = 5000,
    suggested: int = 0,
    address: object = "0.0.0.0",
    *,
    nonce: bytes = NONCE,
    options: bytes = b"",
    client: object = CLIENT,
) -> bytes:
    body = nonce + struct.pack("!B3xHH", protocol, port, suggested) + mapped(address)
    return pcp(1, lifetime, body + options, client)


def pmp(opcode: int, port: int = 5000, suggested: int = 0, lifetime: int = 3600) -> bytes:
    return struct.pack("!BBHHHI", 0, opcode, 0, port, suggested, lifetime)


def read(answer: bytes | None) -> dict[str, Any]:
    """A PCP answer's fields, of MAP also what was assigned."""
    assert answer
    assert len(answer) % 4 == 0
    assert len(answer) <= LONGEST
    version, opcode, reserved, result, lifetime, epoch = struct.unpack_from("!BBBBII", answer)
    assert (version, reserved, epoch, answer[12:24]) == (2, 0, EPOCH, bytes(12))
    assert opcode & 0x80
    fields = {"result": result, "lifetime": lifetime}
    if opcode == 0x81 and len(answer) >= 60:
        fields["nonce"], fields["protocol"], fields["internal"], fields["port"] = struct.unpack_from(
            "!12sB3xHH", answer, 24
        )
        fields["address"], fields["options"] = answer[44:60], answer[60:]
    return fields


def ask(server: Server, message: bytes, client: IPv4Address = CLIENT) -> dict[str, Any]:
    return read(server.answer(message, client))


def ends(server: Server, message: bytes, client: IPv4Address = CLIENT) -> tuple[int, int]:
    fields = ask(server, message, client)
    return fields["result"], fields["lifetime"]


# --- what is no good request -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "result"),
    [
        pytest.param(pcp(0, 0)[:20], MALFORMED_REQUEST, id="shorter than a header"),
        pytest.param(b"\x02\x01", MALFORMED_REQUEST, id="two bytes"),
        pytest.param(pcp(0, 0) + b"\0", MALFORMED_REQUEST, id="not whole words"),
        pytest.param(pcp(0, 0, bytes(LONGEST)), MALFORMED_REQUEST, id="too long"),
        pytest.param(map_()[:56], MALFORMED_REQUEST, id="too short for MAP"),
        pytest.param(pcp(2, 600, bytes(56)), UNSUPP_OPCODE, id="PEER"),
        pytest.param(pcp(3, 600), UNSUPP_OPCODE, id="unassigned opcode"),
        pytest.param(pcp(0, 0, client=OTHER), MISMATCH, id="behind another NAT"),
        pytest.param(pcp(0, 0)[:8] + bytes(16), MISMATCH, id="client is ::"),
        pytest.param(pcp(0, 0, version=1), UNSUPP_VERSION, id="version 1"),
        pytest.param(pcp(0, 0, version=3), UNSUPP_VERSION, id="version 3"),
        pytest.param(b"\x03\x00", UNSUPP_VERSION, id="two bytes of version 3"),
        pytest.param(pcp(0, 0, option(1, bytes(16))), UNSUPP_OPTION, id="ANNOUNCE with an option"),
        pytest.param(map_(options=option(1, mapped(OTHER))), UNSUPP_OPTION, id="THIRD_PARTY"),
        pytest.param(map_(options=option(99)), UNSUPP_OPTION, id="unknown, to be understood"),
        pytest.param(map_(options=b"\x02\0\0\x04" + bytes(4)), MALFORMED_OPTION, id="PREFER_FAILURE with data"),
        pytest.param(map_(options=PREFER_FAILURE * 2), MALFORMED_OPTION, id="PREFER_FAILURE twice"),
        pytest.param(map_(options=b"\x80\0\0\x05" + bytes(4)), MALFORMED_OPTION, id="an option past the end"),
        pytest.param(map_(options=option(3, bytes(16))), MALFORMED_OPTION, id="FILTER too short"),
        pytest.param(
            map_(options=option(3, bytes([0, 24, 0, 0]) + mapped("198.51.100.0"))), MALFORMED_OPTION, id="IPv4 bits"
        ),
        pytest.param(map_(options=option(3, bytes([0, 128, 0, 0]) + bytes(16))), MALFORMED_OPTION, id="IPv6 remote"),
        pytest.param(
            map_(options=option(3, bytes([0, 129, 0, 0]) + mapped("1.1.1.1"))), MALFORMED_OPTION, id="129 bits"
        ),
        pytest.param(map_(0, options=PREFER_FAILURE), MALFORMED_OPTION, id="PREFER_FAILURE at the end"),
        pytest.param(map_(0, options=filter_("1.1.1.1/32")), MALFORMED_OPTION, id="FILTER at the end"),
        pytest.param(map_(protocol=SCTP), UNSUPP_PROTOCOL, id="SCTP"),
        pytest.param(map_(protocol=0, port=0), UNSUPP_PROTOCOL, id="all protocols"),
        pytest.param(map_(port=0), UNSUPP_PROTOCOL, id="all ports"),
        pytest.param(map_(options=filter_("1.1.1.1/32", 53)), EXCESSIVE, id="a remote port"),
        pytest.param(
            map_(options=b"".join(filter_(f"1.1.1.{n}/32") for n in range(FILTERS_MOST + 1))), EXCESSIVE, id="filters"
        ),
    ],
)
def test_refused(message: bytes, result: int) -> None:
    """The answer is the request with the result in it, its lifetime a long one; nothing is mapped."""
    server, shelf = served()
    answer = server.answer(message, CLIENT)
    fields = read(answer)
    assert (fields["result"], fields["lifetime"]) == (result, LONG)
    assert answer
    assert answer[1] == message[1] | 0x80
    assert answer[24:].startswith(message[24:LONGEST])
    assert not shelf.all


@pytest.mark.parametrize(
    "message", [b"", b"\x02", b"\x02\x80", pcp(0x81, 0), b"\0\x80", pmp(1)[:11], b"\0"], ids=lambda each: each.hex()
)
def test_silent(message: bytes) -> None:
    """Responses, or the like of them, are never answered: two servers would never end."""
    assert served()[0].answer(message, CLIENT) is None


@given(st.binary(max_size=LONGEST + 8))
def test_any_bytes(message: bytes) -> None:
    server, shelf = served()
    answer = server.answer(message, CLIENT)
    if answer and message[0]:
        read(answer)
    assert answer is None or (len(answer) <= LONGEST and answer[1] & 0x80)
    assert all(held.endpoint.address == CLIENT for held in shelf.all.values())


_options = st.lists(
    st.one_of(
        st.sampled_from([PREFER_FAILURE, NO_FILTER, filter_("198.51.100.0/24"), option(200, b"any")]),
        st.builds(option, st.integers(0, 255), st.binary(max_size=30)),
        st.binary(max_size=8),
    ),
    max_size=4,
).map(b"".join)


@given(
    lifetime=st.sampled_from([0, 1, 600, 2**32 - 1]),
    protocol=st.sampled_from([0, TCP, UDP, SCTP]),
    port=st.integers(0, 65535),
    suggested=st.integers(0, 65535),
    options=_options,
)
def test_any_map_request(lifetime: int, protocol: int, port: int, suggested: int, options: bytes) -> None:
    server, shelf = served()
    fields = ask(server, map_(lifetime, protocol, port, suggested, options=options))
    if fields["result"] or not lifetime:
        assert not shelf.all
    else:
        (held,) = shelf.all.values()
        assert (held.port, held.endpoint.port) == (fields["port"], port)
        assert 120 <= fields["lifetime"] == held.left_s <= 86400


# --- PCP -------------------------------------------------------------------------------------------


def test_announce() -> None:
    """RFC 6887 section 14.1."""
    answer = served()[0].answer(pcp(0, 0), CLIENT)
    assert answer == bytes([2, 0x80, 0, 0]) + struct.pack("!II", 0, EPOCH) + bytes(12)


@pytest.mark.parametrize(("protocol", "name"), [(TCP, "tcp"), (UDP, "udp")])
def test_a_mapping(protocol: int, name: str) -> None:
    """The very bytes of the answer (section 11.2)."""
    server, shelf = served()
    answer = server.answer(map_(7200, protocol, 5000, 6000), CLIENT)
    head = bytes([2, 0x81, 0, 0]) + struct.pack("!II", 7200, EPOCH) + bytes(12)
    assert answer == head + NONCE + struct.pack("!B3xHH", protocol, 5000, 6000) + mapped(EXTERNAL)
    assert shelf.all[Endpoint(name, CLIENT, 5000)].left_s == 7200


@pytest.mark.parametrize(("asked", "given"), [(1, 120), (120, 120), (3600, 3600), (2**32 - 1, 86400)])
def test_lifetimes_are_bounded(asked: int, given: int) -> None:
    server, _ = served()
    assert ends(server, map_(asked)) == (OK, given)
    assert ends(server, map_(asked)) == (OK, given), "renewed"


def test_a_taken_port_gives_another() -> None:
    server, shelf = served()
    shelf.taken = {6000}
    assert ask(server, map_(suggested=6000))["port"] not in (0, 6000)


def test_renewing_keeps_the_port_and_needs_the_nonce() -> None:
    server, _ = served()
    port = ask(server, map_(600, suggested=6000))["port"]
    renewed = ask(server, map_(900, suggested=7000))
    assert (renewed["port"], renewed["lifetime"]) == (port, 900)
    # The error tells how long the mapping still is another's (section 11.3).
    assert ends(server, map_(600, nonce=OTHER_NONCE)) == (NOT_AUTHORIZED, 900)


def test_the_end() -> None:
    server, shelf = served()
    ask(server, map_())
    assert ends(server, map_(0, nonce=OTHER_NONCE)) == (NOT_AUTHORIZED, 600)
    assert ends(server, map_(0, client=OTHER), OTHER) == (OK, 0), "it has none"
    assert shelf.all
    assert ends(server, map_(0)) == (OK, 0)
    assert not shelf.all
    assert ends(server, map_(0)) == (OK, 0), "there is none any more"


@pytest.mark.parametrize(("protocol", "left"), [(0, {("tcp", 3)}), (TCP, {("tcp", 3), ("udp", 2)})])
def test_the_end_of_all(protocol: int, left: set[tuple[str, int]]) -> None:
    """Of all with that nonce (section 15.1), protocol 0 being all protocols."""
    server, shelf = served()
    ask(server, map_(port=1))
    ask(server, map_(protocol=UDP, port=2))
    ask(server, map_(port=3, nonce=OTHER_NONCE))
    # "If the protocol is zero, the internal port is ignored."
    assert ends(server, map_(0, protocol, 0 if protocol else 77)) == (OK, 0)
    assert {(each.protocol, each.port) for each in shelf.all} == left


def test_the_mapping_that_an_endpoint_has() -> None:
    """Its own port is given whatever is suggested; and where only another would do, none (section 13.2)."""
    server, shelf = served()
    shelf.mapped[Endpoint("tcp", CLIENT, 5000)] = 3333
    assert ends(server, map_(suggested=6000, options=PREFER_FAILURE)) == (CANNOT_PROVIDE, SHORT)
    assert ask(server, map_(suggested=6000))["port"] == 3333


def test_prefer_failure() -> None:
    server, shelf = served()
    shelf.taken = {6000}
    assert ends(server, map_(suggested=6000, options=PREFER_FAILURE)) == (CANNOT_PROVIDE, SHORT)
    assert ends(server, map_(suggested=6001, address="9.9.9.9", options=PREFER_FAILURE)) == (CANNOT_PROVIDE, SHORT)
    assert ends(server, map_(suggested=0, options=PREFER_FAILURE)) == (CANNOT_PROVIDE, SHORT)
    assert not shelf.all
    fields = ask(server, map_(suggested=6001, address=EXTERNAL, options=PREFER_FAILURE))
    assert (fields["result"], fields["port"], fields["options"]) == (OK, 6001, PREFER_FAILURE)
    assert ends(server, map_(suggested=6001, options=PREFER_FAILURE)) == (OK, 600), "renewed"
    assert ends(server, map_(suggested=6002, options=PREFER_FAILURE)) == (CANNOT_PROVIDE, SHORT)


def test_filters() -> None:
    """They add up, until one of no bits takes them away (section 13.3)."""
    server, shelf = served()
    here = Endpoint("tcp", CLIENT, 5000)
    some = filter_("198.51.100.0/24") + option(200, b"?")
    assert ask(server, map_(options=some))["options"] == filter_("198.51.100.0/24"), (
        "what was not processed is left out"
    )
    assert shelf.filters(here) == ["198.51.100.0/24"]
    ask(server, map_(options=filter_("192.0.2.1/32") + filter_("198.51.100.0/24")))
    ask(server, map_())
    assert shelf.filters(here) == ["198.51.100.0/24", "192.0.2.1/32"]
    ask(server, map_(options=NO_FILTER + filter_("192.0.2.9/32")))
    assert shelf.filters(here) == ["192.0.2.9/32"]
    ask(server, map_(options=NO_FILTER))
    assert shelf.filters(here) == ["None"]


def test_no_filter_holds_where_everybody_may_come() -> None:
    server, shelf = served(filtering=Filtering(tcp="endpoint-independent"))
    assert ends(server, map_(options=filter_("192.0.2.1/32"))) == (EXCESSIVE, LONG)
    assert ends(server, map_(protocol=UDP, options=filter_("192.0.2.1/32"))) == (OK, 600)
    assert len(shelf.all) == 1


def test_a_forward_of_the_users() -> None:
    """The host learns of it (section 11.3), and can neither narrow nor end it."""
    server, shelf = served()
    shelf.static[Endpoint("tcp", CLIENT, 5000)] = 80
    assert ask(server, map_())["port"] == 80
    assert ends(server, map_(options=filter_("192.0.2.1/32"))) == (EXCESSIVE, LONG)
    assert ends(server, map_(suggested=81, options=PREFER_FAILURE)) == (CANNOT_PROVIDE, SHORT)
    assert ends(server, map_(0))[0] == NOT_AUTHORIZED
    assert not shelf.all


# --- who may, and how much -------------------------------------------------------------------------


def test_limits() -> None:
    server, shelf = served(pcp=Pcp(enabled=True, per_host=2, in_all=4))
    assert [ends(server, map_(port=port)) for port in (1, 2, 3)] == [(OK, 600), (OK, 600), (USER_EX_QUOTA, SHORT)]
    assert ends(server, map_(port=1)) == (OK, 600), "renewing is no new one"
    two = filter_("192.0.2.1/32") + filter_("192.0.2.2/32")
    assert ends(server, map_(client=OTHER, options=two), OTHER) == (OK, 600)
    assert ends(server, map_(port=2, client=OTHER), OTHER) == (NO_RESOURCES, SHORT)
    assert ends(server, map_(port=1, options=two)) == (NO_RESOURCES, SHORT), "a rule more than there is room for"
    assert server.answer(pmp(2, 9), CLIENT) == struct.pack("!BBHIHHI", 0, 130, 4, EPOCH, 9, 0, 0)
    assert shelf.count() == 4


def test_no_room_for_rules() -> None:
    server, shelf = served()
    shelf.full = True
    assert ends(server, map_()) == (NO_RESOURCES, SHORT)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"pcp": Pcp(internal=(IPv4Network("192.168.0.3/32"),))}, id="others may"),
        pytest.param({"external": Externals.parse(one_to_one=["192.168.0.2 as 203.0.113.9"])}, id="one to one"),
    ],
)
def test_who_may_not(settings: dict[str, Any]) -> None:
    server, shelf = served(**settings)
    assert ends(server, map_()) == (NOT_AUTHORIZED, LONG)
    assert ends(server, map_(0)) == (NOT_AUTHORIZED, LONG)
    assert server.answer(pmp(1), CLIENT) == struct.pack("!BBHIHHI", 0, 129, 2, EPOCH, 5000, 0, 0)
    assert not shelf.all
    assert ends(server, map_(client=OTHER), OTHER) == (OK, 600)


def test_while_the_wan_has_no_address() -> None:
    server, shelf = served()
    ask(server, map_(port=1))
    shelf.connected = False
    assert ends(server, map_()) == (NETWORK_FAILURE, SHORT)
    assert server.answer(pmp(1), CLIENT) == struct.pack("!BBHIHHI", 0, 129, 3, EPOCH, 5000, 0, 0)
    assert server.answer(b"\0\0", CLIENT) == struct.pack("!BBHI4s", 0, 128, 3, EPOCH, bytes(4))
    assert ends(server, map_(0, port=1)) == (OK, 0)
    assert not shelf.all


# --- NAT-PMP (RFC 6886) ----------------------------------------------------------------------------


def test_natpmp_address() -> None:
    assert served()[0].answer(b"\0\0", CLIENT) == struct.pack("!BBHI4s", 0, 128, 0, EPOCH, EXTERNAL.packed)


@pytest.mark.parametrize(("opcode", "name"), [(1, "udp"), (2, "tcp")])
def test_natpmp_mapping(opcode: int, name: str) -> None:
    server, shelf = served()
    answer = server.answer(pmp(opcode, 5000, 6000, 7200), CLIENT)
    assert answer == struct.pack("!BBHIHHI", 0, opcode + 128, 0, EPOCH, 5000, 6000, 7200)
    assert list(shelf.all) == [Endpoint(name, CLIENT, 5000)]
    assert shelf.filters(Endpoint(name, CLIENT, 5000)) == [str(each) for each in EVERYBODY]
    end = server.answer(pmp(opcode, 5000, 0, 0), CLIENT)
    assert end == struct.pack("!BBHIHHI", 0, opcode + 128, 0, EPOCH, 5000, 0, 0)
    assert not shelf.all


def test_natpmp_ends_all_of_a_protocol() -> None:
    """Section 3.4: and what was made by PCP is not its to end."""
    server, shelf = served()
    for opcode, port in ((1, 1), (1, 2), (2, 3)):
        server.answer(pmp(opcode, port), CLIENT)
    ask(server, map_(protocol=UDP, port=4))
    assert server.answer(pmp(1, 0, 0, 0), CLIENT) == struct.pack("!BBHIHHI", 0, 129, 0, EPOCH, 0, 0, 0)
    assert {each.port for each in shelf.all} == {3, 4}
    assert server.answer(pmp(1, 4, 0, 0), CLIENT) == struct.pack("!BBHIHHI", 0, 129, 2, EPOCH, 4, 0, 0)
    assert {each.port for each in shelf.all} == {3, 4}


@pytest.mark.parametrize("opcode", [3, 77, 127])
def test_natpmp_unsupported_opcode(opcode: int) -> None:
    assert served()[0].answer(bytes([0, opcode]), CLIENT) == struct.pack("!BBHI", 0, opcode + 128, 5, EPOCH)


def test_natpmp_no_mapping_of_port_0() -> None:
    server, shelf = served()
    assert server.answer(pmp(1, 0), CLIENT) == struct.pack("!BBHIHHI", 0, 129, 2, EPOCH, 0, 0, 0)
    assert not shelf.all


def test_announcements() -> None:
    """RFC 6886 section 3.2.1, RFC 6887 section 14.1.1."""
    server, _ = served()
    by_natpmp, by_pcp = server.announcements()
    assert by_natpmp == server.answer(b"\0\0", CLIENT)
    assert by_pcp == server.answer(pcp(0, 0), CLIENT)
