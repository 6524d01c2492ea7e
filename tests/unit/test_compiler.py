"""The cache of compiled programs: it saves compiling, and can never do harm."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from xdpmasq import compiler
from xdpmasq.compiler import Compiled, MapPlan
from xdpmasq.errors import DatapathError

RECORD = np.dtype([("mac", "u1", (6,)), ("mtu", "<u4")])
PLAN = MapPlan(7, 1, 64, 0, compiler.plain("<u4"), compiler.plain(RECORD))
RESULT = Compiled({"masq_wan_out": b"\xb7\0\0\0\0\0\0\0"}, {"interfaces": PLAN})


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The texts that were really compiled, with the cache in a folder of its own."""
    texts: list[str] = []

    def compile_text(text: str, *_: object) -> Compiled:
        texts.append(text)
        return RESULT

    monkeypatch.setattr(compiler, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(compiler, "_tools", lambda: ("bcc 1",))
    monkeypatch.setattr(compiler, "_compile", compile_text)
    return texts


def same(found: Compiled) -> bool:
    return found.as_json() == RESULT.as_json()


def test_once_for_all_times(compiled: list[str]) -> None:
    assert same(compiler.compile("int a;", {"N": 1}))
    assert same(compiler.compile("int a;", {"N": 1}))
    assert compiled == ["int a;"]


def test_once_for_several_at_a_time(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    all_there = threading.Barrier(3)

    def compile_text(text: str, *_: object) -> Compiled:
        compiled.append(text)
        time.sleep(0.2)  # the others are at the door
        return RESULT

    monkeypatch.setattr(compiler, "_compile", compile_text)
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: (all_there.wait(), compiler.compile("int a;"))[1], range(3)):
            assert same(found)
    assert compiled == ["int a;"]
    assert [file.name for file in compiler.CACHE.iterdir() if file.name.startswith(".")] == []


def test_anything_else_is_compiled(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.compile("int a;", {"N": 1})
    compiler.compile("int a;", {"N": 2})
    compiler.compile("int b;", {"N": 1})
    monkeypatch.setattr(compiler, "_tools", lambda: ("bcc 2",))
    compiler.compile("int a;", {"N": 1})
    assert len(compiled) == 4


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"code": 1}', b'{"code": {"a": "?"}, "maps": {"b": {}}}'])
def test_a_damaged_file_is_compiled_anew(compiled: list[str], content: bytes) -> None:
    compiler.compile("int a;")
    (file,) = compiler.CACHE.iterdir()
    file.write_bytes(content)
    assert same(compiler.compile("int a;"))
    assert same(compiler.compile("int a;"))
    assert len(compiled) == 2


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_may_write_is_not_trusted(compiled: list[str], mode: int) -> None:
    """What lies there is loaded into the kernel."""
    compiler.compile("int a;")
    compiler.CACHE.chmod(mode)
    compiler.compile("int a;")
    assert len(compiled) == 2


def test_nor_is_a_link(compiled: list[str], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    compiler.CACHE.symlink_to(tmp_path / "elsewhere")
    assert same(compiler.compile("int a;"))
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_full_disk(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert same(compiler.compile("int a;"))
    assert list(compiler.CACHE.iterdir()) == [], "nothing half written stays"


def test_the_oldest_give_way(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_KEPT", 2)
    for nth, text in enumerate(("a", "b", "a", "c")):
        compiler.compile(text)
        for file in compiler.CACHE.iterdir():
            stamp = file.stat().st_mtime
            if stamp > 1000:  # written or used just now
                os.utime(file, (nth, nth))
    compiler.compile("a")
    assert compiled == ["a", "b", "c"]


def test_layouts_survive() -> None:
    found = Compiled.from_json(RESULT.as_json()).maps["interfaces"]
    assert np.dtype(compiler.layout(found.value)) == RECORD
    assert np.dtype(compiler.layout(found.key)) == np.dtype("<u4")


TWO = """
#include <uapi/linux/bpf.h>
BPF_ARRAY(first, u64, 4);
BPF_HASH(second, u32, u64, 8);

static __always_inline int both(u32 key)
{
	u64 *value = first.lookup(&key);

	return value ? *value : 0;
}

int one(struct __sk_buff *skb)
{
	return both(skb->mark);
}

int other(struct __sk_buff *skb)
{
	u32 key = skb->mark;
	u64 *value = second.lookup(&key);

	return value ? *value : both(key);
}
"""


def test_functions_can_be_compiled_each_by_itself(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes of one does not depend on the others, on what is open here, or on how many are made at once."""
    monkeypatch.undo()
    flags = [*compiler._LEAN, *compiler._include_flags()]
    assert compiler.functions_of(TWO) == ["one", "other"]
    found = []
    for most in (1, 2):
        monkeypatch.setattr(compiler, "_at_once", lambda most=most: most)
        with open("/dev/null") as _:
            found.append(compiler._compile(TWO, flags, [["one"], ["other"]]))
    alone, together = (compiler._compile(TWO, flags, [group]) for group in (["other"], ["one", "other"]))
    assert found[0] == found[1] == together
    assert found[0].maps.keys() == {"first", "second"}
    assert alone.maps == found[0].maps
    assert alone.code == {"other": found[0].code["other"]}


@pytest.mark.parametrize("wrong", ["int one(struct", "int other(struct"])
def test_the_compilers_words(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """Nobody waits for the others then."""
    monkeypatch.setattr(compiler, "_at_once", lambda: 2)
    text = TWO.replace(wrong, f"#error not this\n{wrong}")
    children = Path("/proc/thread-self/children")
    before = children.read_text()
    with pytest.raises(DatapathError, match="not this"):
        compiler._compile(text, [*compiler._LEAN, *compiler._include_flags()], [["one"], ["other"]])
    assert children.read_text() == before
