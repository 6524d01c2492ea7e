"""Messages carried through an ALG, and what must hold whatever they are."""

from dataclasses import replace

from fakes import GATEWAY, HOST, FakeOpenings, Pinhole

from xdpmasq.alg.api import Alg, Control, Side, Unparsed


def fresh(control: Control) -> Control:
    """The same session, of which the ALG knows nothing."""
    return replace(control, memory={})


def carry(alg: Alg, control: Control, *messages: tuple[Side, bytes]) -> tuple[list[bytes], list[Pinhole]]:
    """How the messages of a new session go on, and what is opened for it; unparsed ones go on as they are."""
    control = fresh(control)
    openings = FakeOpenings(control, alg.pinholes)
    done = []
    for side, message in messages:
        try:
            done.append(alg.translate(message, side, control, openings))
        except Unparsed:
            done.append(message)
    return done, openings.opened


def harmless(alg: Alg, control: Control, *messages: tuple[Side, bytes]) -> None:
    """Hostile messages: no other exception than Unparsed, no pinhole but the host's own, no byte without a reason."""
    for side, message in messages:
        assert 0 <= alg.ready(message, side, control) <= len(message)
    done, opened = carry(alg, control, *messages)
    assert len(opened) <= alg.pinholes
    for pinhole in opened:
        assert pinhole.internal.address == HOST
        assert pinhole.internal.port >= 1024
        assert pinhole.external.address == GATEWAY
    for (_, message), text in zip(messages, done, strict=True):
        if not opened and HOST.packed not in message and GATEWAY.packed not in message:
            assert text == message
