"""Sysctls that several datapaths of one machine have found and changed."""

from typing import Any

import pytest

from xdpmasq import sysctls

FORWARDING, LIBERAL = sysctls.FORWARDING, sysctls.LIBERAL


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    values = {FORWARDING: "1", LIBERAL: "1"}
    monkeypatch.setattr("xdpmasq.net.sysctl.read", values.get)
    monkeypatch.setattr("xdpmasq.net.sysctl.write", values.__setitem__)
    return values


def test_the_last_puts_them_back(kernel: dict[str, str]) -> None:
    first: dict[str, Any] = {"sysctls": {FORWARDING: "0"}, "side_effects": {}}
    second: dict[str, Any] = {"sysctls": {LIBERAL: "0"}, "side_effects": {}}
    sysctls.inherit(second, [first])
    assert sysctls.restore(first, [second]) == {}
    assert kernel[FORWARDING] == "1"
    assert sysctls.restore(second) == {FORWARDING: "0", LIBERAL: "0"}
    assert kernel == {FORWARDING: "0", LIBERAL: "0"}


def test_what_one_alone_has_changed_it_puts_back(kernel: dict[str, str]) -> None:
    first: dict[str, Any] = {"sysctls": {FORWARDING: "0", LIBERAL: "0"}}
    assert sysctls.restore(first, [{"sysctls": {FORWARDING: "0"}}]) == {LIBERAL: "0"}
    assert kernel == {FORWARDING: "1", LIBERAL: "0"}
