"""What goes into the package: man pages, completions, the configuration as installed, units, versions."""

import importlib.util
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command

import xdpmasq
from xdpmasq import cli, errors
from xdpmasq.configfile import load

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "config.example.toml"


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's files beside Python's."""
    root = tmp_path_factory.mktemp("staged")
    tool("completions").write(root / "completions")
    subprocess.run([ROOT / "packaging" / "stage", root / "files", root / "completions"], check=True)
    return root / "files"


# --- the Python package ----------------------------------------------------------------------------


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {".".join(each.parent.relative_to(ROOT).parts) for each in (ROOT / "xdpmasq").rglob("__init__.py")}
    assert there | {"xdpmasq._bpf"} == set(listed)


def test_one_version() -> None:
    changelog = (ROOT / "packaging" / "debian" / "changelog").read_text()
    assert changelog.startswith(f"xdpmasq ({xdpmasq.__version__})")


# --- the configuration -----------------------------------------------------------------------------


def test_the_installed_configuration_sets_nothing(staged: Path) -> None:
    tables = tomllib.loads((staged / "etc/xdpmasq/config.toml").read_text())
    assert set(tables) == {
        name for name, each in tomllib.loads(EXAMPLE.read_text()).items() if isinstance(each, dict)
    }
    assert not any(tables.values())


def test_it_is_refused_until_interfaces_are_named(staged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = staged / "etc/xdpmasq/config.toml"
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", str(path)])
    said = f"xdpmasq: {path}: no WAN interface named\n  → set wan in [interfaces]\n"
    assert (ended.value.code, capsys.readouterr().err) == (2, said)


def test_taking_the_marks_away_gives_the_example(staged: Path, tmp_path: Path) -> None:
    text = (staged / "etc/xdpmasq/config.toml").read_text()
    everything, example = tmp_path / "everything.toml", tmp_path / "example.toml"
    everything.write_text(re.sub(r"^#(?=\S)", "", text, flags=re.MULTILINE))
    example.write_text(re.sub(r"^#(?=\S)", "", EXAMPLE.read_text(), flags=re.MULTILINE))
    assert everything.read_text() == example.read_text()
    assert load(everything).wans == ("eth0",)


# --- the units -------------------------------------------------------------------------------------


def test_each_instance_has_a_configuration_of_its_own(staged: Path) -> None:
    units = {each.name: each.read_text() for each in (staged / "lib/systemd/system").iterdir()}
    assert set(units) == {"xdpmasq.service", "xdpmasq@.service"}
    assert "/etc/xdpmasq/%i.toml" in units["xdpmasq@.service"]
    assert "config.toml" not in units["xdpmasq@.service"]


def test_what_the_units_call_exists(staged: Path) -> None:
    for unit in (staged / "lib/systemd/system").iterdir():
        called = re.findall(r"/usr/bin/xdpmasq ([^'\n]+)", unit.read_text())
        assert called
        for words in called:
            parse(re.sub(r'"?\$+MAINPID"?', "1", words).split())


def parse(words: list[str]) -> None:
    """As the command line would, without doing anything."""
    command: Any = get_command(cli.app)
    context = command.make_context("xdpmasq", list(words))
    name, verb, rest = command.resolve_command(context, words)
    verb.make_context(name, rest, parent=context)


# --- man pages and completions ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    found: dict[str, str] = tool("manpages").pages()
    return found


def test_each_verb_has_a_page_with_its_options(pages: dict[str, str]) -> None:
    root: Any = get_command(cli.app)
    for name, verb in root.commands.items():
        command = get_command(cli.LATE[name]()) if name in cli.LATE else verb
        text = pages[f"xdpmasq-{name}.8"].replace("\\-", "-")
        for each in (command, *getattr(command, "commands", {}).values()):
            options = [option for one in each.params if one.param_type_name == "option" for option in one.opts]
            assert [option for option in options if f"\\fB{option}\\fR" not in text and option != "--help"] == []
            assert each.help.split(".")[0].split()[0] in text


def test_a_page_for_the_configuration(pages: dict[str, str]) -> None:
    text = pages["xdpmasq.toml.5"].replace("\\-", "-").replace("\\&", "")
    assert [key for key in re.findall(r"^#?(\w+ = )", EXAMPLE.read_text(), re.MULTILINE) if key not in text] == []


def test_pages_are_well_formed(pages: dict[str, str], tmp_path: Path) -> None:
    for name, text in pages.items():
        (tmp_path / name).write_text(text)
    command = ["mandoc", "-Tlint", "-Wwarning", *(str(tmp_path / name) for name in pages)]
    assert subprocess.run(command, capture_output=True, text=True, check=False).stdout == ""


@pytest.mark.parametrize("text", ["-", "\\", "'x", ".x", "a\n.b"])
def test_roff_is_escaped(text: str) -> None:
    assert not re.search(r"^[.']|(?<!\\)-|\\(?![e\-&(])", tool("manpages").escape(text), re.MULTILINE)


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        pytest.param("xdpmasq de", ["detach"], id="verb"),
        pytest.param("xdpmasq forward ", ["add", "del", "list"], id="its verbs"),
        pytest.param("xdpmasq status --js", ["--json"], id="option"),
        pytest.param("xdpmasq lab ", ["demo", "down", "exec", "up"], id="of a verb that comes late"),
        pytest.param("xdpmasq lab up --fa", ["--far-mtu"], id="its option"),
    ],
)
def test_completion(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, offers: list[str]
) -> None:
    monkeypatch.setenv(cli.COMPLETE, "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - (not line.endswith(" "))))
    with pytest.raises(SystemExit):
        cli.main([])
    assert sorted(capsys.readouterr().out.split()) == offers


def test_completions_of_each_shell(staged: Path) -> None:
    for path in ("bash-completion/completions/xdpmasq", "zsh/vendor-completions/_xdpmasq",
                 "fish/vendor_completions.d/xdpmasq.fish"):  # fmt: skip
        assert cli.COMPLETE in (staged / "usr/share" / path).read_text()


# --- shell scripts ---------------------------------------------------------------------------------


def test_scripts_are_clean() -> None:
    folders = ("tools", "packaging", "packaging/debian", "tests/vm", "tests/fresh", "vagrant", ".ci")
    files = [each for folder in folders for each in sorted((ROOT / folder).iterdir()) if each.is_file()]
    scripts = [str(each) for each in files if re.match(rb"#!.*\b(ba)?sh\n", each.read_bytes())]
    assert len(scripts) > 10
    # what stands in single quotes may well be meant so
    found = subprocess.run(["shellcheck", "-e", "SC2016", *scripts], capture_output=True, text=True, check=False)
    assert found.stdout + found.stderr == ""


@pytest.mark.skipif(not shutil.which("vagrant"), reason="needs vagrant (apt install vagrant)")
def test_vagrantfile_is_valid(tmp_path: Path) -> None:
    own = {"VAGRANT_HOME": str(tmp_path / "home"), "VAGRANT_DOTFILE_PATH": str(tmp_path / "machines")}
    command = ["vagrant", "validate", "--ignore-provider"]  # Debian has that of libvirt in another package
    environment = os.environ | own
    lab = shutil.copytree(ROOT / "vagrant", tmp_path / "vagrant", ignore=shutil.ignore_patterns(".vagrant"))
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "xdpmasq_0_all.deb").touch()  # has to be there, whatever it is
    said = subprocess.run(command, cwd=lab, env=environment, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr


# --- detach, as the package calls it ---------------------------------------------------------------


@pytest.mark.parametrize("runs", [[], ["eth0"], ["eth0", "ppp0"]], ids=["none", "one", "two"])
def test_detach_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: list[str]) -> None:
    ended: list[str] = []
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("xdpmasq.control.running", lambda: runs)
    monkeypatch.setattr(
        "xdpmasq.control.detach",
        lambda wan: ended.append(wan) or {"interfaces": [wan], "sessions": 0, "sysctls": {}},
    )
    with pytest.raises(SystemExit) as exited:
        cli.main(["detach", "--all"])
    assert (exited.value.code, ended) == (0, runs)
    assert len(capsys.readouterr().out.splitlines()) == max(1, len(runs))


def test_detach_by_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    from xdpmasq import control  # noqa: PLC0415

    monkeypatch.setattr("xdpmasq.presence.agents", lambda: ["eth0", "ppp0"])
    monkeypatch.setattr("xdpmasq.presence.agent_pid", {"eth0": 7, "ppp0": 8}.get)
    assert control.served_by(8) == "ppp0"
    with pytest.raises(errors.NotAttachedError, match="9 is no agent"):
        control.served_by(9)
