"""Amanda: replies of a backup client inside, as amandad sends them."""

import pytest
from carried import carry, harmless
from fakes import HOST, REMOTE, FakeOpenings, session
from hypothesis import given, settings
from hypothesis import strategies as st
from talks import Talk, said

from xdpmasq.alg.amanda import Amanda
from xdpmasq.alg.api import Endpoint, Refused, Side, Unparsed

AMANDA = Amanda()
BACKED_UP, BACKING_UP = session(10080, "udp", from_outside=True), session(10080, "udp")
HEAD = b"Amanda 2.6 REP HANDLE 000-00000000 SEQ 1234567890\n"
REST = b"OPTIONS features=fffffeff9ffeffffffff00;\n"

CASES = {
    "three streams": (
        HEAD + b"CONNECT DATA 11001 MESG 11002 INDEX 11003\n\n" + REST,
        HEAD + b"CONNECT DATA 40000 MESG 40001 INDEX 40002\n\n" + REST,
        [11001, 11002, 11003],
    ),
    "longer numbers": (HEAD + b"CONNECT DATA 1024\n", HEAD + b"CONNECT DATA 40000\n", [1024]),
    "no index": (
        HEAD + b"CONNECT DATA 11001 MESG 11002 INDEX -1\n",
        HEAD + b"CONNECT DATA 40000 MESG 40001 INDEX -1\n",
        [11001, 11002],
    ),
    "none": (HEAD + b"CONNECT DATA 0\n", HEAD + b"CONNECT DATA 0\n", []),
    "one port twice": (HEAD + b"CONNECT DATA 5000 MESG 5000\n", HEAD + b"CONNECT DATA 40000 MESG 40000\n", [5000]),
    "with security": (
        HEAD + b"SECURITY TICKET xyz\nCONNECT CTL 5000 DATA 5001\n",
        HEAD + b"SECURITY TICKET xyz\nCONNECT CTL 40000 DATA 40001\n",
        [5000, 5001],
    ),
    "partial reply": (
        HEAD.replace(b"REP", b"PREP") + b"CONNECT DATA 5000 \n",
        HEAD.replace(b"REP", b"PREP") + b"CONNECT DATA 40000 \n",
        [5000],
    ),
    "no streams": (HEAD + REST, HEAD + REST, []),
    "acknowledgement": (HEAD.replace(b"REP", b"ACK"), HEAD.replace(b"REP", b"ACK"), []),
}


@pytest.mark.parametrize(("before", "after", "ports"), CASES.values(), ids=CASES)
def test_replies(before: bytes, after: bytes, ports: list[int]) -> None:
    done, opened = carry(AMANDA, BACKED_UP, (Side.INSIDE, before))
    assert done == [after]
    assert [(hole.protocol, hole.internal, hole.remote, hole.sessions) for hole in opened] == [
        ("tcp", Endpoint(HOST, port), REMOTE, 1) for port in ports
    ]


@pytest.mark.req("attacks-slipstream")
@pytest.mark.parametrize(
    ("text", "error"),
    {
        "system port": (HEAD + b"CONNECT DATA 5000 MESG 22\n", Refused),
        "no such port": (HEAD + b"CONNECT DATA 65536\n", Refused),
        "digits": (HEAD + b"CONNECT DATA " + b"5" * 40 + b"\n", Unparsed),
        "later": (HEAD + REST + b"CONNECT DATA 5000\n", Unparsed),
        "within a line": (HEAD + b"x CONNECT DATA 5000\n\nCONNECT DATA 5000\n", Unparsed),
        "no end": (HEAD + b"CONNECT DATA 5000", Unparsed),
        "NUL": (HEAD + b"CONNECT DATA 5000\0\n", Unparsed),
        "request": (HEAD.replace(b"REP", b"REQ") + b"CONNECT DATA 5000\n", Unparsed),
        "something before": (b"x" + HEAD + b"CONNECT DATA 5000\n", Unparsed),
        "five": (HEAD + b"CONNECT" + b" DATA 5000" * 5 + b"\n", Unparsed),
    }.values(),
)
def test_nothing_is_opened(text: bytes, error: type[Unparsed]) -> None:
    openings = FakeOpenings(BACKED_UP, AMANDA.pinholes)
    with pytest.raises(error):
        AMANDA.translate(text, Side.INSIDE, BACKED_UP, openings)
    assert not openings.opened


@pytest.mark.parametrize(
    ("control", "side"), [(BACKED_UP, Side.OUTSIDE), (BACKING_UP, Side.INSIDE), (BACKING_UP, Side.OUTSIDE)]
)
def test_only_a_client_inside_is_heard(control: object, side: Side) -> None:
    text = CASES["three streams"][0]
    assert carry(AMANDA, control, (side, text)) == ([text], [])  # type: ignore[arg-type]


# for test_alg_fuzz.py
CONVERSATIONS = [
    Talk(name, said((Side.OUTSIDE, b"request"), (Side.INSIDE, text)), port=10080, protocol="udp", from_outside=True)
    for name, (text, _, _) in CASES.items()
]


@pytest.mark.req("attacks-alg_fuzz")
@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=60)
    | st.lists(
        st.sampled_from([b"CONNECT", b" DATA", b" MESG", b" X", b" 5000", b" 80", b" 65536", b"\n", b" "])
    ).map(b"".join),
    st.booleans(),
)
def test_anything(text: bytes, replied: bool) -> None:
    harmless(AMANDA, BACKED_UP, (Side.INSIDE, (HEAD if replied else b"") + text))
