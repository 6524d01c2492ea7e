"""Random scripts of packets through xdpmasq and through the kernel's own NAT, side by side.

Whatever they do differently is in DIFFERENCES, which docs/differences.md explains to people, or the test fails. The
networks are drawn in oracle.py. ``XDPMASQ_ORACLE_SCRIPTS=100000`` plays more scripts than CI does, others each time.
"""

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from netkit import needs_root
from oracle import (
    ACK,
    ERRORS,
    FIN,
    ICMP,
    NOBODYS_PORT,
    PATIENCE_S,
    ROUTE_MTU,
    RST,
    SCRIPTS_AT_ONCE,
    SYN,
    TCP_,
    WITH_PORTS,
    Error,
    Network,
    Packet,
    Play,
    Script,
    Seen,
    Step,
    networks,
)
from strategies import scripts

from xdpmasq import datapath
from xdpmasq.lab import netns

pytestmark = [needs_root, pytest.mark.xdist_group("oracle")]

SCRIPTS = int(os.environ.get("XDPMASQ_ORACLE_SCRIPTS", "0"))
IN_CI = 1200
DOCUMENT = Path(__file__).parents[2] / "docs" / "differences.md"


# --- what differs, and is meant to -----------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """One step, and what either gateway made of it that the other did not.

    Attributes:
        pieces: ours let fragments through of which no whole datagram came to be.
        mapped: the external port that the step is sent to is one that our gateway has given away.
        met: this remote endpoint has been written to from there.
        astray: a TCP segment of this script had numbers far from what they should be.
    """

    step: Step
    kernel: Sequence[Seen]
    ours: Sequence[Seen]
    pieces: bool
    mapped: bool
    met: bool
    astray: bool


@dataclass(frozen=True)
class Difference:
    """A way in which the two differ.

    Attributes:
        name: its heading in docs/differences.md.
        goes_on: the sessions of both are still alike, so the script can go on.
        example: a script whose last step shows it.
    """

    name: str
    holds: Callable[[Look], bool]
    example: Script
    goes_on: bool = False


def is_untranslated(seen: Seen) -> bool:
    return seen.end == "wan" and (
        seen.src.startswith(("host", "inner")) or seen.src in ("10.1.255.255", "172.16.0.2")
    )


def answers_itself(seen: Seen) -> bool:
    """A RST or an ICMP error by the gateway's own stack."""
    return seen.src in ("public", "gate") and not seen.same_id


def all_of(seen: Sequence[Seen], question: Callable[[Seen], bool]) -> bool:
    return bool(seen) and all(map(question, seen))


def packet(look: Look) -> Packet:
    """The step, or of an error one that nothing is true of."""
    return look.step if isinstance(look.step, Packet) else Packet()


def error(look: Look) -> Error | None:
    return look.step if isinstance(look.step, Error) else None


def same_but_ends(one: Seen, other: Seen, *, in_pieces: bool) -> bool:
    def rest(seen: Seen) -> Seen:
        head = (*seen.head[:2], *seen.head[3:]) if seen.proto == ICMP else seen.head[2:]
        same_id = seen.same_id and not in_pieces
        return seen._replace(src="", dst="", head=head, checks=seen.checks[1:], same_id=same_id)

    return rest(one) == rest(other)


def leaks(look: Look) -> bool:
    return all_of(look.kernel, is_untranslated) and not look.ours


def kernel_finds_invalid(look: Look) -> bool:
    """Which conntrack does to wrong checksums, and to TCP beside its window or out of turn."""
    step = packet(look)
    return step.check == "wrong" or step.proto == TCP_


def translates_the_invalid(look: Look) -> bool:
    if not kernel_finds_invalid(look) or len(look.ours) != 1:
        return False
    if packet(look).inward:
        delivered = look.ours[0].end == "lan" or (packet(look).ttl == 1 and look.ours[0].head[:2] == (11, 0))
        return delivered and all(map(answers_itself, look.kernel))
    if len(look.kernel) != 1 or not is_untranslated(look.kernel[0]):
        return False
    return same_but_ends(look.kernel[0], look.ours[0], in_pieces=leaves_in_pieces(look))


def is_silent_to_strangers(look: Look) -> bool:
    step = packet(look)
    return step.inward and look.mapped and not look.met and all_of(look.kernel, answers_itself) and not look.ours


def gives_a_port_to_one(look: Look) -> bool:
    step = packet(look)
    other = all_of(look.kernel, lambda seen: seen.end == "lan" and seen.dst != f"host {step.host}")
    return step.inward and look.mapped and not look.met and other and not look.ours


def is_silent_to_bad_flags(look: Look) -> bool:
    step = packet(look)
    kind = step.flags & (SYN | FIN | RST)
    bad = not step.flags & (SYN | ACK | RST) or bool(kind & (kind - 1))
    return step.inward and step.proto == TCP_ and bad and all_of(look.kernel, answers_itself) and not look.ours


def turns_round(look: Look) -> bool:
    step = packet(look)
    own = all(map(answers_itself, look.kernel))
    return step.turned is not None and look.mapped and own and all(seen.end == "lan" for seen in look.ours)


def is_not_fooled(look: Look) -> bool:
    step = packet(look)
    return step.inward and bool(step.source or step.bare) and bool(look.kernel) and not look.ours


def has_no_strangers_inside(look: Look) -> bool:
    step = packet(look)
    return not step.inward and bool(step.source) and bool(look.kernel) and not look.ours


def passes_pieces(look: Look) -> bool:
    return look.pieces and not look.kernel and not look.ours


def leaves_in_pieces(look: Look) -> bool:
    """As its host sent it, or since it is too long for the way to some remotes."""
    return bool(packet(look).cuts) or packet(look).size > ROUTE_MTU - 28


def renames_pieces(look: Look) -> bool:
    if not leaves_in_pieces(look) or not all_of(look.ours, lambda seen: seen.end == "wan" and not seen.same_id):
        return False
    return [*look.kernel] == [seen._replace(same_id=True) for seen in look.ours]


def quotes_pieces(look: Look) -> bool:
    both = [*look.kernel, *look.ours]
    return bool(packet(look).cuts) and all_of(both, lambda seen: answers_itself(seen) and seen.head[0] in ERRORS)


def tells_refusals(look: Look) -> bool:
    return not look.kernel and all_of(look.ours, lambda seen: seen.end == "lan" and seen.head[:2] == (3, 13))


def is_not_blocked(look: Look) -> bool:
    step = packet(look)
    ours = all_of(look.ours, lambda seen: seen.src == "public" and seen.same_id)
    return not step.inward and step.proto not in WITH_PORTS and not look.kernel and ours


def knows_echo_only(look: Look) -> bool:
    kind = packet(look).kind
    return kind is not None and kind[0] not in (0, 8) and bool(look.kernel) and not look.ours


def is_distrustful(look: Look) -> bool:
    step = error(look)
    if step is None or look.ours:
        return False
    small = step.kind == (3, 4) and 0 < step.rest < 552
    return small or look.astray or step.spoiled in ("sequence", "check", "quoted check")


DIFFERENCES = (
    Difference("What cannot be translated is dropped", leaks, [Packet(proto=TCP_, flags=FIN | ACK)], goes_on=True),
    Difference(
        "No packet is judged by its checksum or its TCP window", translates_the_invalid,
        [Packet(check="wrong")],
    ),
    Difference(
        "Strangers at a mapped port are not answered", is_silent_to_strangers,
        [Packet(), Packet(inward=True, remote=1)], goes_on=True,
    ),
    Difference(
        "An external port is one host's",
        gives_a_port_to_one,
        [Packet(), Packet(host=1, remote=1), Packet(inward=True, remote=1)],
        goes_on=True,
    ),
    Difference(
        "TCP flags that no stack sends are not answered", is_silent_to_bad_flags,
        [Packet(proto=TCP_, flags=SYN, size=0), Packet(proto=TCP_, inward=True, flags=SYN | FIN)],
    ),
    Difference("Hairpinning", turns_round, [Packet(), Packet(host=1, turned=0)]),
    Difference(
        "Forged sources, and internal addresses from outside", is_not_fooled,
        [Packet(inward=True, bare=True)],
    ),
    Difference("Sources that no LAN has", has_no_strangers_inside, [Packet(source="192.0.2.1")]),
    Difference(
        "Fragments are not put together", passes_pieces,
        [Packet(size=64, cuts=(2, 4), order=(0, 1))], goes_on=True,
    ),
    Difference(
        "Fragments leave with an identification of their own", renames_pieces,
        [Packet(size=64, cuts=(2, 4))], goes_on=True,
    ),
    Difference(
        "ICMP errors about fragments", quotes_pieces,
        [Packet(size=64, cuts=(2, 4), ttl=1)], goes_on=True,
    ),
    Difference("Refusals are told", tells_refusals, [Packet(proto=50), Packet(proto=50, host=1)], goes_on=True),
    Difference(
        "A stranger keeps no host from a protocol without ports", is_not_blocked,
        [Packet(proto=50, inward=True), Packet(proto=50)],
    ),
    Difference("ICMP queries other than echo", knows_echo_only, [Packet(proto=ICMP, kind=(13, 0))]),
    Difference(
        "ICMP errors that cannot be true", is_distrustful,
        [Packet(), Error(kind=(3, 4), rest=68)], goes_on=True,
    ),
)  # fmt: skip


# --- playing ---------------------------------------------------------------------------------------


class Oracle:
    """Plays scripts, and holds our gateways against the kernel's."""

    def __init__(self, built: Sequence[Network]) -> None:
        self.networks = built
        self.played = self.compared = 0
        self.met: Counter[str] = Counter()

    def judge(self, script: Script) -> list[str]:
        """The names of the differences that showed; stops where gateways are no longer alike."""
        self.played += 1
        if self.played % SCRIPTS_AT_ONCE == 0:
            for network in self.networks:
                network.forget()
        play, shown = Play(self.played), []
        for n, step in enumerate(script):
            seen = play.play(step, self.networks)
            if seen is None:
                continue
            self.compared += 1
            found = [self._compare(play, script[: n + 1], network, seen) for network in self.networks[1:]]
            shown += [each.name for each in found if each]
            if any(each and not each.goes_on for each in found):
                break
        self.met.update(shown)
        return shown

    def _compare(
        self, play: Play, script: Script, network: Network, seen: dict[str, list[Seen]]
    ) -> Difference | None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            look = self._look(play, script, network, seen["kernel"])
            alike = not look.kernel and not look.ours and not look.pieces
            found = None if alike else next((each for each in DIFFERENCES if each.holds(look)), None)
            if (alike or found) and not self._may_change(look, alike=alike, silent=not seen["kernel"]):
                return found
            if time.monotonic() > deadline:
                break
            time.sleep(0.002)
        assert alike or found, self._said(script, network, look, seen["kernel"])
        return found

    def _may_change(self, look: Look, *, alike: bool, silent: bool) -> bool:
        """What goes by way of the agent takes a moment: fragments that came before their first, ICMP of its own."""
        step = packet(look)
        if alike:
            return silent and not step.inward and step.proto not in WITH_PORTS and step.ttl > 1 and not step.options
        disordered = list(step.order) != sorted(step.order)
        return disordered or (step.turned is not None and step.ttl == 1 and not look.ours)

    def _look(self, play: Play, script: Script, network: Network, kernel: Sequence[Seen]) -> Look:
        step, view = script[-1], play.view(network)
        view.wait()
        ours = view.look(step, view.pieces)
        whole = [each for each in ours if each.whole]
        mapped = met = False
        if isinstance(step, Packet):
            host = step.host if step.turned is None else step.turned
            remote = step.remote if step.turned is None else None
            mapped = view.external(step.proto, host, step.port, remote, step.rport) != NOBODYS_PORT
            met = (step.proto, host, step.port, remote, step.rport) in view.ports
        return Look(
            step,
            [each for each in kernel if each not in whole],
            [each for each in whole if each not in kernel],
            any(not each.whole for each in ours),
            mapped,
            met,
            any(isinstance(each, Packet) and bool(each.seq or each.ack) for each in script),
        )

    def _said(self, script: Script, network: Network, look: Look, kernel: Sequence[Seen]) -> str:
        lines = [
            f"{network.kind} and kernel differ at the last of these steps:",
            *(f"    {step!r}," for step in script),
        ]
        lines += ["only the kernel:", *(f"    {each}" for each in look.kernel)]
        lines += ["only xdpmasq:", *(f"    {each}" for each in look.ours)]
        return "\n".join([*lines, f"pieces {look.pieces}, mapped {look.mapped}, met {look.met}"])


@pytest.fixture(scope="module")
def oracle() -> Iterator[Oracle]:
    with networks("kernel", "tc", "xdp") as built:
        yield Oracle(built)


@pytest.mark.req("reliability-nft_oracle")
@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda each: each.name)
def test_each_difference_shows(oracle: Oracle, difference: Difference) -> None:
    assert set(oracle.judge(difference.example)) == {difference.name}


@pytest.mark.req("reliability-nft_oracle")
def test_the_document_tells_of_each_difference() -> None:
    told = re.findall(r"^## (.+)$", DOCUMENT.read_text(), re.MULTILINE)
    assert told == [each.name for each in DIFFERENCES]


@pytest.mark.req("reliability-nft_oracle")
def test_random_scripts(oracle: Oracle) -> None:
    before = oracle.played, oracle.compared

    @settings(
        max_examples=SCRIPTS or IN_CI,
        derandomize=not SCRIPTS,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(scripts)
    def play(script: Script) -> None:
        oracle.judge(script)

    play()
    played, compared = oracle.played - before[0], oracle.compared - before[1]
    assert played >= (SCRIPTS or IN_CI)
    assert compared > 3 * played
    # In XDP mode, the scripts' sessions were accelerated like anybody's.
    with netns.entered(oracle.networks[-1].gate):
        counted = datapath.find().counters()
    assert counted["fast_outbound"] + counted["fast_inbound"] > played / 2
