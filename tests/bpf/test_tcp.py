"""The life of a TCP connection as the gateway follows it, told by how long it may be idle."""

import pytest
from harness import (
    ACK,
    FIN,
    GATEWAY,
    HOST,
    OTHER_SERVER,
    PSH,
    RST,
    SERVER,
    SYN,
    TICKS,
    Gateway,
    age,
    tcp,
    wan_frame,
)

from xdpmasq.expiry import idle_limits

ESTABLISHED, TRANSITORY = 7440, 240
HOST_SAYS, SERVER_SAYS = "host", "server"


class Connection:
    """A connection of HOST:5000 with SERVER:80; sequence numbers after the handshake are 101 and 501."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.port = 0

    def say(self, who: str, flags: int, seq: int | None = None, ack: int | None = None) -> str:
        """Sends a segment; returns how it ended."""
        if who == HOST_SAYS:
            seq, ack = 101 if seq is None else seq, 501 if ack is None else ack
            result = self.gateway.outbound(tcp(HOST, 5000, SERVER, 80, flags, seq=seq, ack=ack))
            self.port = self.port or result.port
        else:
            seq, ack = 501 if seq is None else seq, 101 if ack is None else ack
            result = self.gateway.inbound(tcp(SERVER, 80, GATEWAY, self.port, flags, seq=seq, ack=ack))
        return result.ended

    @property
    def row(self) -> object:
        return self.gateway.session(HOST, 5000, "tcp", SERVER, 80)

    @property
    def limit(self) -> int:
        """Seconds of idleness allowed, by the kernel's judgement: a reply still comes in just before, not just after.

        The agent, which looks for idle sessions in numpy, must judge the same.
        """
        row = self.row
        seen = {name: row[name].copy() for name in ("out", "in")}
        limits = []
        for seconds in (TRANSITORY, ESTABLISHED):
            ended = []
            for margin in (-1, 1):
                age(row, seconds + margin)
                ended.append(self._probe())
            if ended == ["slow_icmp_error_inbound", "own_inbound"]:
                limits.append(seconds)
        for name, flow in seen.items():
            row[name] = flow
        (limit,) = limits
        slots = row["mapping"].reshape(1)
        args = (row[name]["tcp_seen"].reshape(1) for name in ("out", "in"))
        assert idle_limits(self.gateway.tables.settings, *args, slots) == limit * TICKS
        return limit

    def _probe(self) -> str:
        """An ICMP error, because that changes nothing."""
        from test_icmp_errors import icmp_error  # noqa: PLC0415

        return self.gateway.inbound(icmp_error(SERVER, GATEWAY, tcp(GATEWAY, self.port, SERVER, 80))).ended


@pytest.fixture
def connection(gateway: Gateway) -> Connection:
    return Connection(gateway)


OPENING = [(HOST_SAYS, SYN), (SERVER_SAYS, SYN | ACK), (HOST_SAYS, ACK)]
LIVES = {
    "SYN": (OPENING[:1], TRANSITORY),
    "SYN, SYN+ACK": (OPENING[:2], TRANSITORY),
    "handshake": (OPENING, ESTABLISHED),
    "SYN repeated": ([*OPENING[:1] * 4], TRANSITORY),
    "simultaneous open": (
        [(HOST_SAYS, SYN), (SERVER_SAYS, SYN), (HOST_SAYS, SYN | ACK), (SERVER_SAYS, SYN | ACK)],
        ESTABLISHED,
    ),
    "simultaneous open, half": ([(HOST_SAYS, SYN), (SERVER_SAYS, SYN), (HOST_SAYS, SYN | ACK)], TRANSITORY),
    "picked up in the middle": ([(HOST_SAYS, ACK | PSH)], TRANSITORY),
    "picked up, answered": ([(HOST_SAYS, ACK | PSH), (SERVER_SAYS, ACK)], ESTABLISHED),
    "data": ([*OPENING, (HOST_SAYS, ACK | PSH), (SERVER_SAYS, ACK | PSH)], ESTABLISHED),
    "half closed by the host": ([*OPENING, (HOST_SAYS, FIN | ACK), (SERVER_SAYS, ACK)], ESTABLISHED),
    "half closed by the server": ([*OPENING, (SERVER_SAYS, FIN | ACK), (HOST_SAYS, ACK)], ESTABLISHED),
    "closed": ([*OPENING, (HOST_SAYS, FIN | ACK), (SERVER_SAYS, FIN | ACK), (HOST_SAYS, ACK)], TRANSITORY),
    "closed, then a stray ACK": (
        [*OPENING, (HOST_SAYS, FIN | ACK), (SERVER_SAYS, FIN | ACK), (HOST_SAYS, ACK), (SERVER_SAYS, ACK)],
        TRANSITORY,
    ),
    "closed, and opened again": (
        [*OPENING, (HOST_SAYS, FIN | ACK), (SERVER_SAYS, FIN | ACK), (HOST_SAYS, ACK), *OPENING],
        ESTABLISHED,
    ),
    "closed, and opening": ([*OPENING, (HOST_SAYS, FIN | ACK), (SERVER_SAYS, FIN | ACK), *OPENING[:2]], TRANSITORY),
    "SYN within a connection": ([*OPENING, (HOST_SAYS, SYN)], ESTABLISHED),
    "SYN from outside within a connection": ([*OPENING, (SERVER_SAYS, SYN)], ESTABLISHED),
}


@pytest.mark.req("5382-2")
@pytest.mark.req("5382-5")
@pytest.mark.req("7857-2")
@pytest.mark.parametrize(("segments", "limit"), LIVES.values(), ids=LIVES)
def test_life(connection: Connection, segments: list[tuple[str, int]], limit: int) -> None:
    for who, flags in segments:
        assert connection.say(who, flags) in ("slow_outbound", "slow_inbound")
    assert connection.limit == limit


@pytest.mark.req("5382-2")
@pytest.mark.req("5382-4")
def test_a_stranger_knocks_and_the_host_calls_back(gateway: Gateway) -> None:
    """Both sides open at once, and the stranger's SYN comes first: it gets no answer, which would end its attempt."""
    port = gateway.connect(HOST, 5000, OTHER_SERVER, 80)
    knock = tcp(SERVER, 80, GATEWAY, port, SYN, seq=500)
    assert gateway.inbound(knock).ended == "drop_filtered"
    assert gateway.open(tcp(HOST, 5000, SERVER, 80, SYN, seq=100)) == port
    assert gateway.inbound(knock).ip.dst == HOST
    connection = Connection(gateway)
    connection.port = port
    connection.say(HOST_SAYS, SYN | ACK, 100)
    connection.say(SERVER_SAYS, SYN | ACK, 500)
    assert connection.limit == ESTABLISHED


# --- RST -------------------------------------------------------------------------------------------


def _establish(connection: Connection) -> None:
    for who, flags in OPENING:
        connection.say(who, flags, *((100, 0) if flags == SYN else (500, 101) if flags == SYN | ACK else ()))
    assert connection.limit == ESTABLISHED


@pytest.mark.req("attacks-rst")
@pytest.mark.req("7857-2_2")
@pytest.mark.parametrize(("who", "exact"), [(SERVER_SAYS, 501), (HOST_SAYS, 101)], ids=["server", "host"])
@pytest.mark.parametrize("flags", [RST, RST | ACK], ids=["RST", "RST+ACK"])
def test_only_the_exact_sequence_number_resets(connection: Connection, who: str, exact: int, flags: int) -> None:
    _establish(connection)
    for seq in (0, exact - 1, exact + 1, exact ^ 0x80000000, 0xFFFFFFFF, 0x01F50000):
        assert connection.say(who, flags, seq).startswith("slow_"), "it is translated, but not believed"
        assert connection.limit == ESTABLISHED
    assert connection.say(who, flags, exact).startswith("slow_")
    assert connection.limit == TRANSITORY


@pytest.mark.req("attacks-rst")
@pytest.mark.parametrize("ttl", [1, 64])
def test_65536_guesses(connection: Connection, ttl: int) -> None:
    """By one who is off the path, knows the endpoints, and hopes for a window; with TTL 1 only we would see it."""
    _establish(connection)
    frame = bytearray(wan_frame(tcp(SERVER, 80, GATEWAY, connection.port, RST, ttl=ttl)))
    program = connection.gateway.bench.programs["masq_wan_in"]
    for guess in range(65536):
        frame[38:42] = (guess * 65536 + 7).to_bytes(4, "big")
        program.test_run(bytes(frame), room=64)
    assert connection.gateway.counted()["slow_inbound"] == 65536
    assert connection.limit == ESTABLISHED


@pytest.mark.req("7857-2_2")
@pytest.mark.parametrize("revives", [HOST_SAYS, SERVER_SAYS])
@pytest.mark.parametrize("resets", [HOST_SAYS, SERVER_SAYS])
def test_data_after_a_reset_revives(connection: Connection, resets: str, revives: str) -> None:
    _establish(connection)
    connection.say(resets, RST)
    assert connection.limit == TRANSITORY
    assert connection.say(revives, ACK | PSH).startswith("slow_")
    assert connection.limit == ESTABLISHED


def test_refused_connection(connection: Connection) -> None:
    """The answer to a SYN is RST+ACK with sequence number 0."""
    connection.say(HOST_SAYS, SYN, 100, 0)
    assert connection.say(SERVER_SAYS, RST | ACK, 0, 101) == "slow_inbound"
    assert connection.row["in"]["tcp_seen"] & RST
    assert connection.limit == TRANSITORY
    assert connection.say(HOST_SAYS, SYN, 900, 0) == "slow_outbound", "and it tries again"
    assert not connection.row["in"]["tcp_seen"] & RST


def test_acknowledgements_move_the_exact_number(connection: Connection) -> None:
    _establish(connection)
    connection.say(HOST_SAYS, ACK, 101, 90_501)
    connection.say(SERVER_SAYS, RST, 501)
    assert connection.limit == ESTABLISHED
    connection.say(SERVER_SAYS, RST, 90_501)
    assert connection.limit == TRANSITORY


def test_a_reset_disarms(connection: Connection) -> None:
    connection.gateway.accelerate()
    _establish(connection)
    segment = tcp(HOST, 5000, SERVER, 80, ACK, seq=101, ack=501)
    assert connection.gateway.fast_outbound(segment).ended == "fast_outbound"
    connection.say(SERVER_SAYS, RST)
    assert connection.gateway.fast_outbound(segment).ended == "up_not_armed"


# --- after the end ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "ending", "reopened"),
    [
        pytest.param(SYN, "slow_outbound", 1, id="SYN"),
        pytest.param(ACK, "slow_outbound", 1, id="ACK"),
        pytest.param(ACK | PSH, "slow_outbound", 1, id="data"),
        pytest.param(FIN | ACK, "drop_tcp_no_session", 0, id="FIN"),
        pytest.param(RST, "drop_tcp_no_session", 0, id="RST"),
        pytest.param(SYN | ACK, "drop_tcp_no_session", 0, id="SYN+ACK"),
    ],
)
@pytest.mark.req("attacks-leak")
def test_host_speaks_on_an_expired_connection(connection: Connection, flags: int, ending: str, reopened: int) -> None:
    _establish(connection)
    age(connection.row, ESTABLISHED + 1)
    result = connection.gateway.outbound(tcp(HOST, 5000, SERVER, 80, flags))
    assert (result.ended, result.counted) == (ending, {"session_reopened": 1} if reopened else {})
    if reopened:
        assert result.port == connection.port
        assert connection.limit == TRANSITORY
    else:
        assert connection.say(SERVER_SAYS, ACK) == "drop_filtered"


def test_server_speaks_on_an_expired_connection(connection: Connection) -> None:
    _establish(connection)
    age(connection.row, ESTABLISHED + 1)
    before = connection.row.tobytes()
    for flags in (ACK, SYN, SYN | ACK, FIN | ACK, RST):
        assert connection.say(SERVER_SAYS, flags) == "drop_filtered"
    assert connection.row.tobytes() == before
