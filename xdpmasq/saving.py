"""`--save`: what a command changes is written in the configuration file as well, by the command itself, as the agent
may have /etc read-only.

The new text is there, whole and checked, before the tables change, and takes the old one's place by a rename. Whoever
saves holds :func:`presence.changing`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import tomllib
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from xdpmasq import algs, configedit, configfile
from xdpmasq.algs import Use
from xdpmasq.config import Config, from_fields
from xdpmasq.errors import ConfigError, HostError, UsageError
from xdpmasq.forwards import Rule

if TYPE_CHECKING:
    from xdpmasq.datapath import Attached


class Draft:
    """What a file is to say, beside it until it is kept; gone at the end of a ``with`` if it has not been.

    Attributes:
        changes: False where the file says so already.
        taken: the rule that it had.
    """

    def __init__(self, file: Path, old: str, new: str) -> None:
        self.file, self.changes = file, old != new
        self.taken: Rule | None = None
        self._old, self._path = old.encode(), file.resolve()  # a symbolic link stays one
        self._temporary = self._write(new.encode()) if self.changes else None

    def _write(self, new: bytes) -> Path:
        with contextlib.ExitStack() as undo:
            try:
                status = self._path.stat()
                number, name = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)
                undo.callback(os.unlink, name)
                with open(number, "wb") as file:
                    os.fchown(number, status.st_uid, status.st_gid)
                    os.fchmod(number, status.st_mode & 0o7777)
                    file.write(new)
                    file.flush()
                    os.fsync(number)
            except OSError as error:
                raise self._unwritable(error) from error
            undo.pop_all()
        return Path(name)

    def _unwritable(self, error: OSError) -> HostError:
        why = error.strerror or str(error)
        return HostError(f"cannot save in {self.file}", why, "nothing is changed; without --save it would be")

    def keep(self) -> None:
        """Puts it in the file's place.

        Raises:
            MasqError: that is not possible; the file is as it was.
        """
        if not self._temporary:
            return
        try:
            if self._path.read_bytes() != self._old:
                raise ConfigError(f"{self.file} has changed meanwhile", "somebody else wrote it", "try again")
            self._temporary.replace(self._path)
            self._temporary = None
        except OSError as error:
            raise self._unwritable(error) from error
        with contextlib.suppress(OSError):  # it is there already; this makes it outlive a power cut
            _sync(self._path.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._temporary:
            self._temporary.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    number = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def with_rule(file: Path, rule: Rule) -> Draft:
    """With a rule more, if it is not there.

    Raises:
        MasqError: it cannot stand beside what is there, or the file cannot be read or written.
    """
    old = configfile.read(file)
    before = configfile.parse(file, old)
    rules = _of_kind(before, rule)
    if rule in rules:
        return Draft(file, old, old)
    return _draft(file, old, configedit.added(old, rule.kind, entry(rule)), rule, **{f"{rule.kind}s": (*rules, rule)})


def without_rule(file: Path, named: Rule) -> Draft:
    """Without the rule of that kind and name, if it is there."""
    old = configfile.read(file)
    rules = _of_kind(configfile.parse(file, old), named)
    nth = next((nth for nth, each in enumerate(rules) if each.name == named.name), None)
    if nth is None:
        return Draft(file, old, old)
    new, left = configedit.removed(old, named.kind, nth), (*rules[:nth], *rules[nth + 1 :])
    draft = _draft(file, old, new, named, **{f"{named.kind}s": left})
    draft.taken = rules[nth]
    return draft


def with_alg(file: Path, use: Use) -> Draft:
    """With an ALG on, in place of what the file says of it."""
    return _about_alg(file, use.name, use)


def without_alg(file: Path, name: str) -> Draft:
    """With an ALG off."""
    return _about_alg(file, name, None)


def _about_alg(file: Path, name: str, wanted: Use | None) -> Draft:
    old = configfile.read(file)
    before = configfile.parse(file, old).algs
    if next((use for use in before if use.name == name), None) == wanted:
        return Draft(file, old, old)
    new = old
    said = [each.get("name") for each in tomllib.loads(old).get("alg", ())]
    for nth in reversed([nth for nth, each in enumerate(said) if each == name]):
        new = configedit.removed(new, "alg", nth)
    usual = next((use for use in algs.default() if use.name == name), None)
    if wanted and wanted != usual:
        own = algs.Use.parse(name).as_fields()
        fields = {key: value for key, value in wanted.as_fields().items() if key == "name" or value != own[key]}
        new = configedit.added(new, "alg", fields)
    elif usual and not wanted:
        new = configedit.added(new, "alg", {"name": name, "enabled": False})
    left = {use.name: use for use in before if use.name != name} | ({name: wanted} if wanted else {})
    return _draft(file, old, new, f"the ALG {name}", algs=tuple(left.values()))


def _of_kind(config: Any, rule: Rule) -> tuple[Rule, ...]:
    rules: tuple[Rule, ...] = getattr(config, f"{rule.kind}s")
    return rules


def _draft(file: Path, old: str, new: str, what: object, **changed: Any) -> Draft:
    """Checked by what loads it at the next start: it differs in what has ``changed``, and in nothing else."""
    wanted = replace(configfile.parse(file, old), **changed)
    try:
        found = configfile.parse(file, new)
    except ConfigError as error:  # its line is none that can be looked at
        raise ConfigError(f"{what} cannot be saved in {file}", error.why or error.what, error.do) from error
    if _sorted(found) != _sorted(wanted):
        raise ConfigError(f"{file} would not say what it should", "", "change it with an editor")
    return Draft(file, old, new)


def _sorted(config: Config) -> Config:
    """The order of ALGs means nothing."""
    return replace(config, algs=tuple(sorted(config.algs)))


def entry(rule: Rule) -> dict[str, Any]:
    """A rule by the keys of a file."""
    fields = {{"source": "from"}.get(key, key): value for key, value in rule.as_fields().items()}
    return {
        key: value[0] if isinstance(value, list) and len(value) == 1 else value
        for key, value in fields.items()
        if value
    }


def file_of(attached: Attached, named: str) -> Path:
    """The file of the running configuration, or the one ``named``.

    Raises:
        UsageError: there is neither.
    """
    if named:
        return Path(named).absolute()
    origin = from_fields(attached.manifest["config"]).origin
    if origin is None:
        what = "there is no configuration file to save in"
        raise UsageError(what, "xdpmasq was attached with options only", "name one: --config FILE")
    return Path(origin.file)
