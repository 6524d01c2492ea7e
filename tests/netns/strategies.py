"""How random scripts of packets come about: mostly sensible ones, since nonsense is soon dropped by everybody."""

from dataclasses import replace

from hypothesis import strategies as st
from oracle import (
    ACK,
    FIN,
    GATE,
    ICMP,
    PSH,
    PUBLIC,
    RST,
    SYN,
    TCP_,
    UDP_,
    URG,
    WITH_PORTS,
    Error,
    Packet,
    Script,
    Step,
)

OPTIONS = {
    "none": b"",
    "nothing": b"\x01\x01\x01\x01",
    "record route": bytes([7, 11, 4, *bytes(8)]),
    "router alert": bytes([148, 4, 0, 0]),
    "loose source route": bytes([131, 7, 4, 11, 0, 0, 1]),
    "broken": bytes([7, 200, 4, 0]),
}

few_hosts = st.sampled_from([0, 0, 0, 1, 1, 2])
few_ports = st.sampled_from([5000, 5000, 5000, 5000, 5001, 53])
few_remotes = st.sampled_from([0, 0, 1, 2])
few_rports = st.sampled_from([53, 53, 80])
sizes = st.sampled_from([0, 1, 8, 9, 64, 555, 1200, 1452])


def usually(value: object, *others: object) -> st.SearchStrategy[object]:
    return st.sampled_from([value] * (4 + len(others)) + list(others))


ends = {"host": few_hosts, "port": few_ports, "remote": few_remotes, "rport": few_rports}
looks = {
    "size": sizes,
    "ttl": usually(64, 1, 2, 255),
    "tos": usually(0, 0x2E << 2, 3),
    "df": st.booleans(),
    "options": usually(b"", *OPTIONS.values()),
    "check": usually("right", "wrong"),
}
cut = st.one_of(
    st.just(((), ())),
    st.just(((), ())),
    st.lists(st.integers(1, 60), min_size=1, max_size=3, unique=True).flatmap(
        lambda cuts: st.tuples(
            st.just(tuple(sorted(cuts))),
            st.one_of(
                st.just(()), st.permutations(range(len(cuts) + 1)).map(tuple), st.just(tuple(range(len(cuts))))
            ),
        )
    ),
)


def packets(**fixed: object) -> st.SearchStrategy[Packet]:
    """With these fields so, and the others somehow."""
    free = {"inward": st.booleans(), **ends, **looks}
    return st.builds(Packet, **{**free, **{name: st.just(value) for name, value in fixed.items()}})  # type: ignore[arg-type]


@st.composite
def pieces(draw: st.DrawFn, whole: st.SearchStrategy[Packet]) -> Packet:
    packet = draw(whole)
    cuts, order = draw(cut)
    return replace(packet, size=max(packet.size, 64), cuts=cuts, order=order, df=False) if cuts else packet


flags = st.sampled_from(
    [
        SYN,
        SYN,
        SYN | ACK,
        ACK,
        ACK,
        ACK | PSH,
        FIN | ACK,
        RST,
        RST | ACK,
        FIN,
        0,
        SYN | FIN,
        SYN | RST,
        ACK | URG,
        FIN | PSH | URG,
    ]
)
shifts = usually(0, 1, -1, 1000, 1 << 20, 1 << 30)
any_udp = pieces(st.one_of(packets(proto=UDP_), packets(proto=UDP_, check="none")))
any_tcp = st.builds(
    Packet,
    inward=st.booleans(),
    proto=st.just(TCP_),
    **ends,
    flags=flags,
    seq=shifts,
    ack=shifts,
    size=st.sampled_from([0, 0, 8, 600]),
)  # type: ignore[arg-type]
any_echo = pieces(packets(proto=ICMP))
other_icmp = st.builds(
    Packet, inward=st.booleans(), proto=st.just(ICMP), **ends,
    kind=st.sampled_from([(8, 0), (0, 0), (13, 0), (14, 0), (5, 1), (42, 0)]),
)  # type: ignore[arg-type]  # fmt: skip
other = packets(proto=50, size=16) | packets(proto=99, size=64)
to_the_gateway = st.builds(
    Packet, proto=st.sampled_from(WITH_PORTS), host=few_hosts, port=few_ports, remote=st.sampled_from([GATE, PUBLIC]),
    flags=st.just(SYN), size=sizes, ttl=usually(64, 1),
)  # type: ignore[arg-type]  # fmt: skip
turned = st.builds(
    Packet, proto=st.sampled_from(WITH_PORTS), host=few_hosts, port=few_ports, turned=few_hosts, flags=st.just(SYN),
    ttl=usually(64, 1),
)  # type: ignore[arg-type]  # fmt: skip
forged = st.builds(
    Packet, inward=st.booleans(), proto=st.sampled_from(WITH_PORTS), **ends, flags=st.sampled_from([SYN, ACK]),
    source=st.sampled_from(["10.1.255.255", "192.0.2.1", "172.16.0.2", "127.0.0.1", "224.0.0.1", "192.168.7.7"]),
)  # type: ignore[arg-type]  # fmt: skip
bare = st.builds(Packet, inward=st.just(True), proto=st.sampled_from(WITH_PORTS), **ends, bare=st.just(True))  # type: ignore[arg-type]
errors = st.builds(
    Error,
    about=st.integers(1, 4),
    kind=st.sampled_from([(3, 1), (3, 3), (3, 4), (3, 13), (11, 0), (11, 1), (12, 0)]),
    by_router=st.booleans(),
    rest=usually(1400, 0, 552, 551, 68),
    quoted=st.sampled_from([8, 8, 20, 28, 100]),
    spoiled=usually("", "check", "quoted check", "port", "sequence", "address"),
)  # type: ignore[arg-type]


@st.composite
def connections(draw: st.DrawFn) -> list[Step]:
    """A handshake, data, and perhaps an end; packets as they should be."""
    common = {
        "proto": TCP_,
        "host": draw(few_hosts),
        "port": draw(few_ports),
        "remote": draw(few_remotes),
        "rport": draw(few_rports),
    }
    lines: list[tuple[bool, int, int]] = [(False, SYN, 0), (True, SYN | ACK, 0), (False, ACK, 0)]
    lines += [
        (draw(st.booleans()), ACK | PSH, draw(st.sampled_from([0, 8, 600, 1400])))
        for _ in range(draw(st.integers(0, 4)))
    ]
    lines += draw(
        st.sampled_from(
            [
                [],
                [(False, RST, 0)],
                [(True, RST | ACK, 0)],
                [(False, FIN | ACK, 0), (True, FIN | ACK, 0), (False, ACK, 0)],
            ]
        )
    )
    return [Packet(inward=inward, flags=flags, size=size, **common) for inward, flags, size in lines]  # type: ignore[arg-type]


@st.composite
def exchanges(draw: st.DrawFn) -> list[Step]:
    """A question and its answers."""
    common = {
        "proto": draw(st.sampled_from([UDP_, UDP_, ICMP, 50])),
        "host": draw(few_hosts),
        "port": draw(few_ports),
    }
    common |= {"remote": draw(few_remotes), "rport": draw(few_rports)}
    return [Packet(inward=n % 2 == 1, size=draw(sizes) + 8, **common) for n in range(draw(st.integers(2, 5)))]  # type: ignore[arg-type]


def alone(step: st.SearchStrategy[Step]) -> st.SearchStrategy[list[Step]]:
    return st.builds(lambda one: [one], step)


scripts: st.SearchStrategy[Script] = st.lists(
    st.one_of(
        exchanges(), exchanges(), connections(), alone(any_udp), alone(any_tcp), alone(any_echo),
        alone(errors), alone(errors), alone(other), alone(turned), alone(other_icmp | to_the_gateway | forged | bare),
    ),
    min_size=1,
    max_size=6,
).map(lambda parts: [step for part in parts for step in part])  # fmt: skip
