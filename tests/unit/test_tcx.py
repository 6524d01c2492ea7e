"""Which way TC programs go, on kernels that are made up."""

import errno
import os
from collections.abc import Iterator

import pytest

from xdpmasq import attachment, bpf, tcx


@pytest.fixture(autouse=True)
def undecided(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both questions are asked once a process; not here."""
    monkeypatch.delenv("XDPMASQ_TC", raising=False)
    for each in (tcx.is_there, attachment.uses_tcx):
        each.cache_clear()
    yield
    for each in (tcx.is_there, attachment.uses_tcx):
        each.cache_clear()


def kernel(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """bpf(2) answers with that error, or, for 0, that there are no programs."""

    def answer(command: int, attr: bytes) -> tuple[int, bytearray]:
        if code:
            raise OSError(code, os.strerror(code))
        return 0, bytearray(len(attr))

    monkeypatch.setattr(bpf, "call", answer)


@pytest.mark.parametrize(("code", "has"), [(0, True), (errno.EINVAL, False)], ids=["6.6", "5.15"])
def test_detection(monkeypatch: pytest.MonkeyPatch, code: int, has: bool) -> None:
    kernel(monkeypatch, code)
    assert tcx.is_there() == attachment.uses_tcx() == has
    assert tcx.programs(1, "egress") == []


def test_clsact_by_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel(monkeypatch, 0)
    monkeypatch.setenv("XDPMASQ_TC", "clsact")
    assert not attachment.uses_tcx()


def test_who_may_not_ask_learns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel(monkeypatch, errno.EPERM)
    with pytest.raises(PermissionError):
        attachment.uses_tcx()
    with pytest.raises(PermissionError):
        tcx.programs(1, "egress")
