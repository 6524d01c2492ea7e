"""Does the kernel's verifier take every program? VM_SUITE says which kernel; some kinds of programs are longer.

As a script: has all of them compiled beforehand.
"""

import pytest

from xdpmasq import bpf, compiler, programs, source

KINDS = {
    "one WAN": {"externals": 1, "wans": 1},
    "port blocks": {"externals": 1, "wans": 1, "blocks": True},
    "two WANs": {"externals": 2, "wans": 2},
    "two WANs, port blocks": {"externals": 2, "wans": 2, "blocks": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_are_taken(kind: str) -> None:
    datapath = programs.Programs(further=65536, **KINDS[kind])
    functions = compiler.functions_of(source.flatten())
    datapath.load(functions)
    assert set(datapath.loaded) == set(functions) >= {"masq_wan_out", "masq_wan_in_l3", "masq_xdp", "masq_reap"}
    datapath.tables.manifest = {"layouts": datapath.layouts}
    datapath.tables.set_settings(block_bits=6 if "blocks" in kind else 0)
    with programs.restorer(datapath.tables) as restore:
        assert isinstance(restore, bpf.Program)


if __name__ == "__main__":
    for each in KINDS.values():
        for ethernet in (True, False):
            programs.compile_ahead(**each, ethernet=ethernet)
