"""docs/scaling.md says what its script computes; a run of the benchmark becomes the documents."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from xdpmasq.bench.report import Column, Host, Line, Report, Section

TOOLS = Path(__file__).parents[2] / "tools"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    return load("scaling")


@pytest.fixture(scope="module")
def performance() -> ModuleType:
    return load("performance")


def test_the_document_is_fresh() -> None:
    done = subprocess.run([sys.executable, TOOLS / "scaling.py", "--check"], check=False)
    assert done.returncode == 0, "tools/scaling.py --write"
    printed = subprocess.run(
        [sys.executable, TOOLS / "scaling.py"], capture_output=True, text=True, check=True
    ).stdout
    assert printed in (TOOLS.parent / "docs" / "scaling.md").read_text()


def test_costs_between_measured_points_and_beyond(scaling: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = scaling.Measured(((1, 100), (100, 300), (10_000, 700)), 50, 1000, 200, 0.2)
    monkeypatch.setattr(scaling, "MEASURED", measured)
    assert [scaling.packet_ns(flows) for flows in (0.5, 1, 10, 100, 1000, 10_000, 1_000_000)] == pytest.approx(
        [100, 100, 200, 300, 500, 700, 1100]
    )


def test_needs_of_a_network(scaling: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = scaling.Measured(((1, 150), (1_000_000, 150)), 50, 1050, 200, 0.2)
    monkeypatch.setattr(scaling, "MEASURED", measured)
    need = scaling.Need(scaling.Network("test", 10_000, 100, 0.5, 6.4))
    assert (need.sessions, need.opened, need.packets) == (1e6, 5000, 1e7)
    assert need.addresses == 14  # 500,000 mappings, 36,280 to each
    assert need.gateways == 1
    # 10^7 packets at 100 ns, 5,000 flows at 1 µs, a fifth of a core for the agent
    assert need.cores(1) == pytest.approx(1 + 0.005 + 0.2)
    assert need.memory == (14 * 196_608 + 500_000) * 200
    assert need.log_bytes_of_day == 10_000 * 33_000 * 150
    assert scaling.Need(scaling.Network("large", 1_000_000, 100, 0.5, 6.4)).gateways == 44


def test_only_what_stands_between_the_marks_is_replaced(scaling: ModuleType, performance: ModuleType) -> None:
    for tool in (scaling, performance):
        assert tool.renewed(f"a\n{tool.BEGIN}\nold\n{tool.END}\nb", "new") == f"a\n{tool.BEGIN}\nnew\n{tool.END}\nb"
    with pytest.raises(SystemExit):
        performance.renewed("no marks", "new")


def section(key: str, columns: list[str], **lines: list[float]) -> Section:
    return Section(
        key, "", "", tuple(map(Column, columns)), tuple(Line(name, tuple(each)) for name, each in lines.items())
    )


def test_a_run_becomes_the_documents(
    performance: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = "xdpmasq-xdp"
    sections = (
        section("forward/1000/64", ["ns"], drop=[150.4], **{ours: [270.2]}),
        section("scale", ["1", "1,000"], drop=[160.0, 150.0], **{ours: [280.0, 290.0]}),
        section("setup/1", ["ns"], **{ours: [1500.0]}),
        section("memory/1000000", ["B/place"], **{ours: [246.0]}),
        section("control/1000000", ["expiry s"], **{ours: [0.18]}),
    )
    run = Report(Host("Linux", "CPU", 2, 1, 16, {}), sections, (), 600.0)
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/performance.md"):
        (tmp_path / name).write_text("before\n<!-- bench -->\nold\n<!-- end -->\nafter\n")
    (tmp_path / "run.json").write_text(json.dumps(run.as_dict()))
    monkeypatch.setattr(performance, "ROOT", tmp_path)
    monkeypatch.setattr(performance.subprocess, "run", lambda *_, **__: None)
    performance.main(str(tmp_path / "run.json"))
    assert "| **xdpmasq-xdp** | **270** |" in (tmp_path / "README.md").read_text()
    document = (tmp_path / "docs" / "performance.md").read_text()
    assert document.startswith("before\n<!-- bench -->\nMeasured on Linux; CPU, core 1 of 2, 16 GB")
    assert document.endswith("<!-- end -->\nafter\n")
    assert json.loads((tmp_path / "docs" / "measured.json").read_text()) == {
        "packet_ns": {"1": 280, "1000": 290}, "base_ns": 150, "flow_ns": 1500, "session_bytes": 246, "expiry_s": 0.18,
    }  # fmt: skip


def test_the_documents_have_their_marks() -> None:
    for name in ("README.md", "docs/performance.md"):
        text = (TOOLS.parent / name).read_text()
        assert text.count("<!-- bench -->") == text.count("<!-- end -->") == 1
