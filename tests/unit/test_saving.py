"""A rule more or less in a configuration file, where everything else stays as it is."""

import errno
import os
import stat
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from xdpmasq import configedit, configfile, forwards, redirects, saving, triggers
from xdpmasq.algs import Use
from xdpmasq.errors import ConfigError, HostError
from xdpmasq.forwards import Rule

TOP = """\
# My router. Ünïcode: 貓 \u2028 and a line separator.
[interfaces]
wan = "eth0"   # the modem
lan = ["eth1"]
"""
WEB = """\

# The web server,
# which Peter looks after.
[[forward]]   # Peter's
protocol = "tcp"
ports = 80  # not 443
to = [
    "192.168.0.2:80",  # the old one
    "192.168.0.3:80*2",
]
# Here ends Peter's part.
"""
PHONE = """\

# Telephones
[[alg]]
name = "sip"
"""
GAME = """\

  [[ "forward" ]]
  to = "192.168.0.4"
  # which game?
  protocol = 'udp'
  ports = "5000-5010"
"""
LOG = """\

# The log
[log]
what = "mappings"  # [[forward]] would be wrong here
# the end
"""
WHOLE = TOP + WEB + PHONE + GAME + LOG
NEW = forwards.parse("tcp", "8080", ["192.168.0.9:80"], "198.51.100.0/24")
BLOCK = '[[forward]]\nprotocol = "tcp"\nports = "8080"\nto = "192.168.0.9:80"\nfrom = "198.51.100.0/24"\n'
INLINE = '{ protocol = "tcp", ports = "8080", to = "192.168.0.9:80", from = "198.51.100.0/24" }'
WEB_RULE, GAME_RULE = forwards.named_as("tcp", "80"), forwards.named_as("udp", "5000-5010")


def added(text: str, rule: Rule = NEW) -> str:
    return configedit.added(text, rule.kind, saving.entry(rule))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        pytest.param(WHOLE, WHOLE + "\n" + BLOCK, id="behind everything"),
        pytest.param("", BLOCK, id="empty"),
        pytest.param("# nothing yet", "# nothing yet\n\n" + BLOCK, id="no newline at the end"),
        pytest.param(
            WHOLE.replace("\n", "\r\n"), (WHOLE + "\n" + BLOCK).replace("\n", "\r\n"), id="carriage returns"
        ),
        pytest.param("forward = []\n", f"forward = [ {INLINE}]\n", id="empty array"),
        pytest.param(
            'forward = [{ protocol = "udp", ports = 5, to = "192.168.0.2" } ] # x\n[log]\nwhat = "sessions"\n',
            f'forward = [{{ protocol = "udp", ports = 5, to = "192.168.0.2" }}, {INLINE} ] # x\n'
            '[log]\nwhat = "sessions"\n',
            id="array in a line",
        ),
        pytest.param(
            'forward = [ # a ] here\n  {protocol="udp", ports=5, to=["192.168.0.2"]}, # five ]\n] # x\n',
            'forward = [ # a ] here\n  {protocol="udp", ports=5, to=["192.168.0.2"]}, # five ]\n'
            f"    {INLINE},\n] # x\n",
            id="array over lines",
        ),
        pytest.param(
            'forward = [\r\n  {protocol="udp", ports=5, to=["192.168.0.2"]} # no comma\r\n]\r\n',
            f'forward = [\r\n  {{protocol="udp", ports=5, to=["192.168.0.2"]}} # no comma\r\n    , {INLINE}\r\n]\r\n',
            id="array over lines without a comma",
        ),
    ],
)
def test_one_more(text: str, wanted: str) -> None:
    assert added(text) == wanted
    assert NEW in configfile.parse(Path("file"), wanted).forwards


@pytest.mark.parametrize(
    ("text", "named", "wanted"),
    [
        pytest.param(
            WHOLE,
            WEB_RULE,
            TOP + "\n# The web server,\n# which Peter looks after.\n# Here ends Peter's part.\n" + PHONE + GAME + LOG,
            id="the first, with a list over lines",
        ),
        pytest.param(WHOLE, GAME_RULE, TOP + WEB + PHONE + LOG, id="one between other tables, its blank line too"),
        pytest.param(
            WHOLE.replace("\n", "\r\n"), GAME_RULE, (TOP + WEB + PHONE + LOG).replace("\n", "\r\n"), id="returns"
        ),
        pytest.param((TOP + WEB + GAME).rstrip(), GAME_RULE, TOP + WEB, id="the last, without a newline"),
        pytest.param(TOP + "\n" + BLOCK, NEW, TOP, id="the only one"),
        pytest.param(
            'forward = [{protocol="tcp", ports=80, to="192.168.0.2"}, {protocol="tcp", ports=81, to="192.168.0.2"}]',
            WEB_RULE,
            'forward = [{protocol="tcp", ports=81, to="192.168.0.2"}]',
            id="first of an array in a line",
        ),
        pytest.param(
            'forward = [{protocol="tcp", ports=81, to="192.168.0.2"}, {protocol="tcp", ports=80, to="192.168.0.2"}]',
            WEB_RULE,
            'forward = [{protocol="tcp", ports=81, to="192.168.0.2"}]',
            id="last of an array in a line",
        ),
        pytest.param(
            'forward = [\n  # old\n  {protocol="tcp", ports=80, to="192.168.0.2"},\n  # {new}\n]\n',
            WEB_RULE,
            "forward = [\n  # old\n  # {new}\n]\n",
            id="a line of an array",
        ),
        pytest.param(
            'forward = [\n  {protocol="tcp", ports=80, to="192.168.0.2"}, # mine\n]\n',
            WEB_RULE,
            "forward = [\n  # mine\n]\n",
            id="a line with a comment",
        ),
    ],
)
def test_one_less(text: str, named: Rule, wanted: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(text.encode())
    with saving.without_rule(file, named) as draft:
        draft.keep()
    assert file.read_bytes().decode() == wanted


def test_what_only_looks_like_a_header_is_none() -> None:
    """In a text over several lines; the file could not say so today, so only the edit is asked."""
    note = 'note = """\n[[forward]]\nports = 1\n"""\n'
    text = note + "[[forward]]\nports = 1\n[[forward]]\nports = 2\n"
    assert configedit.removed(text, "forward", 0) == note + "[[forward]]\nports = 2\n"
    assert configedit.removed(text, "forward", 1) == note + "[[forward]]\nports = 1\n"


def test_a_way_of_writing_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match="with an editor"):
        configedit.removed("forward = [\n{ports.first = '{', ports.last = '}'}\n]\n", "forward", 0)


RULES = [
    *(NEW, forwards.parse("tcp", "80", ["192.168.0.2:80", "192.168.0.3:81*2"])),
    forwards.parse("udp", "default", ["192.168.0.9"]),
    forwards.parse("udp", "5000-5010", ["192.168.0.9:6000"]),
    redirects.parse("tcp", 80, 3128, "lan", source="192.168.0.0/24", not_to=["198.51.100.0/24", "192.0.2.1"]),
    redirects.parse("tcp", 80, 8080, "wan"),
    triggers.parse("udp", 6112, "tcp 6112-6119", 60),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_there_and_back(rule: Rule, tmp_path: Path) -> None:
    """Every kind of rule; the loader finds it, and removing it leaves the file as it was, byte by byte."""
    file = tmp_path / "config.toml"
    file.write_text(TOP + PHONE + LOG)
    with saving.with_rule(file, rule) as draft:
        draft.keep()
    assert configfile.load(file).rules == (rule,)
    with saving.with_rule(file, rule) as again:
        assert not again.changes
    with saving.without_rule(file, rule) as draft:
        draft.keep()
    assert file.read_text() == TOP + PHONE + LOG
    with saving.without_rule(file, rule) as again:
        assert not again.changes


def test_owner_mode_and_link_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "real.toml", tmp_path / "config.toml"
    real.write_text(TOP)
    real.chmod(0o640)
    os.chown(real, 0, 12)
    link.symlink_to(real)
    with saving.with_rule(link, NEW) as draft:
        assert real.read_text() == TOP, "not before it is kept"
        draft.keep()
    assert link.is_symlink()
    assert real.read_text() == TOP + "\n" + BLOCK
    assert (stat.S_IMODE(real.stat().st_mode), real.stat().st_gid) == (0o640, 12)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["config.toml", "real.toml"]


def test_not_kept_is_nothing(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(TOP)
    with saving.with_rule(file, NEW):
        pass
    assert file.read_text() == TOP
    assert list(tmp_path.iterdir()) == [file]


def test_somebody_else_writes_meanwhile(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(TOP)
    with saving.with_rule(file, NEW) as draft:
        file.write_text(TOP + PHONE)
        with pytest.raises(ConfigError, match="has changed meanwhile"):
            draft.keep()
    assert file.read_text() == TOP + PHONE
    assert list(tmp_path.iterdir()) == [file]


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*config\.toml"):
        saving.with_rule(tmp_path / "config.toml", NEW)


def test_wrong_already(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(TOP + 'mode = "fast"\n')
    with pytest.raises(ConfigError, match="line 5"):
        saving.with_rule(file, NEW)


def test_contradiction(tmp_path: Path) -> None:
    """A rule that the running gateway does not have, but the file does."""
    file = tmp_path / "config.toml"
    file.write_text(TOP + BLOCK.replace("192.168.0.9", "192.168.0.8"))
    with pytest.raises(ConfigError, match=r"cannot be saved in .*192\.168\.0\.8:80 .*is there already"):
        saving.with_rule(file, NEW)
    assert list(tmp_path.iterdir()) == [file]


@pytest.fixture
def small_disk(tmp_path: Path):
    """Of one page; root can write everywhere but where there is no room, or nobody may."""
    where = tmp_path / "disk"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", where], check=True)
    yield where
    subprocess.run(["umount", where], check=True)


def test_disk_full(small_disk: Path) -> None:
    file = small_disk / "config.toml"
    file.write_text(TOP)
    with pytest.raises(HostError, match=os.strerror(errno.ENOSPC)):
        saving.with_rule(file, NEW)
    assert file.read_text() == TOP
    assert list(small_disk.iterdir()) == [file]


def test_read_only(small_disk: Path) -> None:
    file = small_disk / "config.toml"
    file.write_text(TOP)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(HostError, match=os.strerror(errno.EROFS)):
        saving.with_rule(file, NEW)
    assert file.read_text() == TOP


def test_texts_are_written_alike_in_both_languages() -> None:
    assert tomllib.loads(added("")) == {"forward": [saving.entry(NEW)]}


SIP_OUTSIDE = '[[alg]]\nname = "sip"\nports = ["udp 5070"]\ninternal = ["192.168.0.16/28"]\n'
FTP_OFF = '[[alg]]\nname = "ftp"\nenabled = false\n'


def kept(folder: Path, text: str, wanted: str, make: Callable[[Path], saving.Draft]) -> Path:
    """A file with ``text``, which a draft makes into the text that is ``wanted``."""
    file = folder / "config.toml"
    file.write_text(text)
    with make(file) as draft:
        assert draft.changes == (text != wanted)
        draft.keep()
    assert file.read_text() == wanted
    return file


@pytest.mark.parametrize(
    ("text", "use", "wanted"),
    [
        pytest.param(TOP, Use.parse("irc"), TOP + '\n[[alg]]\nname = "irc"\n', id="its own ports, for all"),
        pytest.param(TOP, Use.parse("sip", ["udp 5070"], ["192.168.0.16/28"]), TOP + "\n" + SIP_OUTSIDE, id="others"),
        pytest.param(
            TOP + PHONE + LOG,
            Use.parse("sip", ["udp 5070"], ["192.168.0.16/28"]),
            TOP + "\n# Telephones\n" + LOG + "\n" + SIP_OUTSIDE,
            id="in place of what is there",
        ),
        pytest.param(TOP + PHONE, Use.parse("sip"), TOP + PHONE, id="as it is"),
        pytest.param(TOP, Use.parse("ftp"), TOP, id="as it is by default"),
        pytest.param(TOP + "\n" + FTP_OFF, Use.parse("ftp"), TOP, id="on again"),
        pytest.param(
            'alg = [{ name = "irc" }]\n',
            Use.parse("pptp"),
            'alg = [{ name = "irc" }, { name = "pptp" }]\n',
            id="in an array",
        ),
    ],
)
def test_an_alg_is_on(tmp_path: Path, text: str, use: Use, wanted: str) -> None:
    file = kept(tmp_path, text, wanted, lambda file: saving.with_alg(file, use))
    assert use in configfile.load(file).algs


@pytest.mark.parametrize(
    ("text", "name", "wanted"),
    [
        pytest.param(TOP + PHONE + GAME, "sip", TOP + "\n# Telephones\n" + GAME, id="of the file"),
        pytest.param(TOP, "ftp", TOP + "\n" + FTP_OFF, id="by default"),
        pytest.param(TOP + '\n[[alg]]\nname = "ftp"\nports = ["tcp 2121"]\n', "ftp", TOP + "\n" + FTP_OFF, id="both"),
        pytest.param(TOP + PHONE, "irc", TOP + PHONE, id="not on"),
        pytest.param(TOP + "\n" + FTP_OFF, "ftp", TOP + "\n" + FTP_OFF, id="off already"),
    ],
)
def test_an_alg_is_off(tmp_path: Path, text: str, name: str, wanted: str) -> None:
    file = kept(tmp_path, text, wanted, lambda file: saving.without_alg(file, name))
    assert name not in {use.name for use in configfile.load(file).algs}


def test_an_alg_whose_ports_the_file_gives_to_another(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(TOP + '\n[[alg]]\nname = "irc"\nports = ["tcp 21", "tcp 6667"]\n\n' + FTP_OFF)
    assert [use.name for use in configfile.load(file).algs] == ["irc"], "the one that is off has none"
    with pytest.raises(ConfigError, match=r"the ALG ftp cannot be saved in .*both read tcp port 21"):
        saving.with_alg(file, Use.parse("ftp"))
    assert list(tmp_path.iterdir()) == [file]
