"""TLS and passwords of the metrics endpoint, from a file in the format of Prometheus' exporter-toolkit.

https://github.com/prometheus/exporter-toolkit/blob/master/docs/web-configuration.md; what of it we do not have is
refused in words, never ignored. PyYAML and bcrypt are asked for only by those who have such a file.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import importlib
import os
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from xdpmasq.errors import ConfigError, HostError

_TLS_KEYS = ("cert_file", "key_file", "client_ca_file", "client_auth_type", "min_version", "max_version")
_CLIENTS = {
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}
_VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
_KNOWN_MOST = 64  # passwords found right, which need not be hashed again

Check = Callable[[bytes, bytes], bool]  # of a password against its hash


@dataclass(frozen=True)
class Web:
    """Who may come, and how.

    Attributes:
        tls: None: plain HTTP.
        users: name → bcrypt hash; empty: everybody.
    """

    tls: ssl.SSLContext | None = None
    users: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Web:
        """From a file.

        Raises:
            ConfigError: it is not there, not as it should be, or a file that it names is not.
            HostError: it asks for a library that is not installed.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = (error.strerror if isinstance(error, OSError) else "") or str(error)
            raise _wrong(path, "cannot be read", why) from error
        document = _parse(path, text)
        _refuse_unknown(path, document, ("tls_server_config", "basic_auth_users"), "")
        tls, users = document.get("tls_server_config"), document.get("basic_auth_users") or {}
        return cls(_tls(path, tls) if tls else None, _users(path, users))

    def gate(self) -> Gate:
        """Asks for passwords, if there are any."""
        return Gate(self.users, _library("bcrypt", "python3-bcrypt").checkpw if self.users else None)


class Gate:
    """Whom a request's ``Authorization`` lets in. A right password is hashed once: bcrypt is slow on purpose."""

    def __init__(self, users: Mapping[str, str], check: Check | None) -> None:
        self._users, self._check = users, check
        self._salt = os.urandom(16)
        self._known: set[bytes] = set()
        self._one_by_one = threading.Lock()  # guessing takes one processor at most

    def admits(self, authorization: str | None) -> bool:
        if not self._check:
            return True
        name, password = _credentials(authorization or "")
        proof = hmac.digest(self._salt, name + b"\0" + password, hashlib.sha256)
        if proof in self._known:
            return True
        with self._one_by_one:
            # A name that is not there takes as long as one that is: nobody is to learn which there are.
            hashed = self._users.get(name.decode(errors="replace"), "")
            right = self._check(password[:72], (hashed or next(iter(self._users.values()))).encode()) and bool(hashed)
        if right:
            if len(self._known) >= _KNOWN_MOST:
                self._known.clear()
            self._known.add(proof)
        return right


def _credentials(authorization: str) -> tuple[bytes, bytes]:
    """Name and password of ``Basic …`` (RFC 7617); empty where there are none."""
    scheme, _, encoded = authorization.partition(" ")
    try:
        decoded = base64.b64decode(encoded, validate=True) if scheme.lower() == "basic" else b""
    except binascii.Error:
        decoded = b""
    name, _, password = decoded.partition(b":")
    return name, password.replace(b"\0", b"")


def _wrong(path: Path, what: str, why: str, do: str = "") -> ConfigError:
    return ConfigError(f"metrics.web_config: {path} {what}", why, do)


def _library(name: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        do = f"apt install {package}, or pip install {name}, or do without metrics.web_config"
        raise HostError("metrics.web_config needs a library that is not here", str(error), do) from error


def _parse(path: Path, text: str) -> dict[str, Any]:
    yaml = _library("yaml", "python3-yaml")
    try:
        document = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise _wrong(path, "is not YAML", " ".join(str(error).split())) from error
    if not isinstance(document, dict):
        raise _wrong(path, "is not a mapping", "expected tls_server_config: or basic_auth_users:")
    return document


def _refuse_unknown(path: Path, given: object, known: tuple[str, ...], where: str) -> None:
    if not isinstance(given, dict):
        raise _wrong(path, f"has {where} that is no mapping", f"its keys are {', '.join(known)}")
    for key in given:
        if key not in known:
            what = f"asks for {key}" + (f" in {where}" if where else "")
            raise _wrong(path, what, f"xdpmasq knows {', '.join(known)}")


def _tls(path: Path, given: Any) -> ssl.SSLContext:
    _refuse_unknown(path, given, _TLS_KEYS, "tls_server_config")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _one_of(path, given, "min_version", _VERSIONS, "TLS12")
    if "max_version" in given:
        context.maximum_version = _one_of(path, given, "max_version", _VERSIONS, "TLS13")
    files = {
        key: path.parent / str(given[key]) for key in ("cert_file", "key_file", "client_ca_file") if given.get(key)
    }
    if not {"cert_file", "key_file"} <= files.keys():
        raise _wrong(path, "has tls_server_config without cert_file or key_file", "TLS needs both")
    try:
        # A key with a passphrase fails at once, where OpenSSL would ask at the terminal.
        context.load_cert_chain(files["cert_file"], files["key_file"], password=lambda: "")
        if "client_ca_file" in files:
            context.load_verify_locations(files["client_ca_file"])
    except (OSError, ValueError) as error:
        named = ", ".join(map(str, files.values()))
        raise _wrong(path, "names TLS files that cannot be used", f"{named}: {error}") from error
    context.verify_mode = _one_of(path, given, "client_auth_type", _CLIENTS, "NoClientCert")
    if context.verify_mode is not ssl.CERT_NONE and "client_ca_file" not in files:
        raise _wrong(path, f"has client_auth_type: {given['client_auth_type']}", "that needs client_ca_file")
    return context


def _one_of(path: Path, given: Mapping[str, Any], key: str, allowed: Mapping[str, Any], default: str) -> Any:
    value = given.get(key, default)
    if value not in allowed:
        raise _wrong(path, f"has {key}: {value}", f"allowed is {', '.join(allowed)}")
    return allowed[value]


def _users(path: Path, given: Any) -> dict[str, str]:
    if not isinstance(given, dict):
        raise _wrong(path, "has basic_auth_users that is no mapping", "expected NAME: HASH")
    check = _library("bcrypt", "python3-bcrypt").checkpw if given else None
    for name, hashed in given.items():
        try:
            assert check
            check(b"", str(hashed).encode())
        except ValueError as error:
            do = "make one with `htpasswd -nBC 10 NAME`"
            raise _wrong(path, f"has no bcrypt hash for {name}", str(error), do) from error
    return {str(name): str(hashed) for name, hashed in given.items()}
