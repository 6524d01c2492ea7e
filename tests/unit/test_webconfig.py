"""TLS and passwords in the format of Prometheus' exporter-toolkit: what is taken, and what is refused in words."""

import base64
import ssl
import sys
from pathlib import Path
from typing import Any

import bcrypt
import pytest

from xdpmasq.errors import ConfigError, HostError
from xdpmasq.webconfig import Gate, Web


@pytest.fixture
def web(tmp_path: Path, tls: Path) -> Any:
    """Reads a file of that text, which may name {cert}, {key} and {hash}."""

    def read(text: str) -> Web:
        path = tmp_path / "web.yml"
        hashed = bcrypt.hashpw(b"open sesame", bcrypt.gensalt(4)).decode()
        path.write_text(text.format(cert=tls / "cert.pem", key=tls / "key.pem", hash=hashed))
        return Web.read(path)

    return read


def test_tls(web: Any) -> None:
    context = web("tls_server_config:\n  cert_file: {cert}\n  key_file: {key}\n  min_version: TLS13\n").tls
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert context.verify_mode is ssl.CERT_NONE


def test_client_certificates(web: Any) -> None:
    lines = ("cert_file: {cert}", "key_file: {key}", "client_ca_file: {cert}")
    wanted = "client_auth_type: RequireAndVerifyClientCert"
    text = "tls_server_config:\n" + "".join(f"  {line}\n" for line in (*lines, wanted))
    assert web(text).tls.verify_mode is ssl.CERT_REQUIRED


def test_files_are_looked_for_beside_the_file(tmp_path: Path, tls: Path) -> None:
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).write_bytes((tls / name).read_bytes())
    (tmp_path / "web.yml").write_text("tls_server_config: {cert_file: cert.pem, key_file: key.pem}")
    assert Web.read(tmp_path / "web.yml").tls


def basic(name: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


@pytest.mark.parametrize(
    ("authorization", "admitted"),
    [
        pytest.param(basic("ali", "open sesame"), True, id="right"),
        pytest.param(basic("ali", "open"), False, id="wrong password"),
        pytest.param(basic("cassim", "open sesame"), False, id="nobody's name, somebody's password"),
        pytest.param("Bearer open", False, id="another scheme"),
        pytest.param("Basic !!", False, id="no base64"),
        pytest.param(basic("ali", "x" * 100), False, id="longer than bcrypt takes"),
        pytest.param(None, False, id="none"),
    ],
)
def test_passwords(web: Any, authorization: str | None, admitted: bool) -> None:
    gate = web("basic_auth_users:\n  ali: {hash}\n").gate()
    assert [gate.admits(authorization) for _ in range(2)] == [admitted] * 2


def test_a_right_password_is_hashed_once() -> None:
    asked = []

    def check(password: bytes, hashed: bytes) -> bool:
        asked.append(password)
        return password == b"right"

    gate = Gate({"ali": "hash"}, check)
    assert [gate.admits(basic("ali", word)) for word in ("right", "right", "wrong", "wrong")] == [
        True,
        True,
        False,
        False,
    ]
    assert asked == [b"right", b"wrong", b"wrong"]


def test_no_file_lets_everybody_in() -> None:
    assert Web().gate().admits(None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("tls_server_config: [", "is not YAML", id="syntax"),
        pytest.param("- a", "is not a mapping", id="a list"),
        pytest.param("tls_server_configs: {{}}", "asks for tls_server_configs", id="unknown key"),
        pytest.param("http_server_config: {{}}", "asks for http_server_config", id="what we do not have"),
        pytest.param(
            "tls_server_config: {{cert_file: {cert}, key_file: {key}, cipher_suites: [a]}}",
            "asks for cipher_suites in tls_server_config",
            id="ciphers",
        ),
        pytest.param("tls_server_config: {{cert_file: {cert}}}", "without cert_file or key_file", id="no key"),
        pytest.param(
            "tls_server_config: {{cert_file: {key}, key_file: {key}}}", "cannot be used", id="no certificate"
        ),
        pytest.param("tls_server_config: {{cert_file: {cert}, key_file: no.pem}}", "no.pem", id="no such file"),
        pytest.param(
            "tls_server_config: {{cert_file: {cert}, key_file: {key}, min_version: TLS10}}",
            "min_version: TLS10: allowed is TLS12, TLS13",
            id="old TLS",
        ),
        pytest.param(
            "tls_server_config: {{cert_file: {cert}, key_file: {key}, client_auth_type: RequireAnyClientCert}}",
            "client_auth_type: RequireAnyClientCert",
            id="unverified clients",
        ),
        pytest.param(
            "tls_server_config: {{cert_file: {cert}, key_file: {key}, client_auth_type: VerifyClientCertIfGiven}}",
            "that needs client_ca_file",
            id="no CA",
        ),
        pytest.param("basic_auth_users: {{ali: secret}}", "no bcrypt hash for ali", id="a password in clear"),
        pytest.param("basic_auth_users: [ali]", "is no mapping", id="users as a list"),
    ],
)
def test_what_is_wrong_is_said(web: Any, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        web(text)
    assert said in str(caught.value)
    assert "web.yml" in str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Web.read(tmp_path / "none.yml")


@pytest.mark.parametrize(("library", "package"), [("yaml", "python3-yaml"), ("bcrypt", "python3-bcrypt")])
def test_a_missing_library_is_named(web: Any, monkeypatch: pytest.MonkeyPatch, library: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(HostError, match=package):
        web("basic_auth_users:\n  ali: x\n")
