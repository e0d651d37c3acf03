"""What `zcproto.connect` finds by itself, as the commands do: the CA, the user and the key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.server.helpers import KEY, PATIENT_CLIENT, ServerThread
from zcproto.client import connect, connect_blocking
from zcproto.client.credentials import ApiKey, CertificateLogin
from zcproto.client.endpoints import parse_addresses
from zcproto.client.options import ConnectOptions, choose_credentials, complete_options
from zcproto.errors import ConfigError


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "ada.key"
    path.touch(mode=0o600)
    path.write_text(f" {KEY}\n")
    return path


def completed(address: str = "localhost", **options: object) -> ConnectOptions:
    return complete_options(ConnectOptions(**options), parse_addresses(address))  # type: ignore[arg-type]


async def test_client_of_this_machine_trusts_its_home_folder_and_reads_the_key_file(
    shared: ServerThread, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZCPROTO_HOME", str(shared.home))
    monkeypatch.setenv("HOME", str(key_file.parent))
    async with connect(f"localhost:{shared.port}", user="ada", key_file="~/ada.key", **PATIENT_CLIENT) as ada:
        assert await ada.call("echo", word="a") == {"word": "a"}
        async with ada.session_for(user="bob", key_file=key_file) as bob:
            assert bob.session is not None


def test_environment_names_the_user_and_the_key(
    shared: ServerThread, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZCPROTO_USER", "ada")
    monkeypatch.setenv("ZCPROTO_KEY_FILE", str(key_file))
    monkeypatch.setenv("ZCPROTO_CA_FILE", str(shared.home / "certs" / "ca.crt"))
    with connect_blocking(f"localhost:{shared.port}", **PATIENT_CLIENT) as client:
        assert client.session is not None
        assert client.session.user == "ada"


@pytest.mark.parametrize(
    ("options", "user", "key"),
    [
        ({}, "env", "env-key"),
        ({"user": "bob"}, "bob", "env-key"),
        ({"user": "bob", "session": False}, "bob", "env-key"),
        ({"key": "k"}, "env", "k"),
        ({"user": "bob", "key": "k\n"}, "bob", "k"),
    ],
)
def test_options_come_before_the_environment(
    options: dict[str, object], user: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZCPROTO_USER", "env")
    monkeypatch.setenv("ZCPROTO_KEY", "env-key")
    found = choose_credentials(completed(**options))
    assert isinstance(found, ApiKey)
    assert (found.user, found.key) == (user, key)


def test_environment_is_not_used_beside_other_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZCPROTO_USER", "env")
    assert choose_credentials(completed(session=False)) is None
    assert choose_credentials(completed(certificate="ada.crt")) == CertificateLogin(None)


@pytest.mark.parametrize(
    ("address", "exists", "is_acme", "options", "is_own"),
    [
        ("localhost", False, False, {}, True),
        ("[::1]", False, False, {}, True),
        ("127.0.0.1,example.com", False, False, {}, False),
        ("example.com", True, False, {}, True),
        ("localhost", True, True, {}, False),
        ("localhost", True, False, {"system_store": True}, False),
        ("localhost", True, False, {"verify": False}, False),
        ("localhost", True, False, {"pins": ["sha256/x"]}, False),
    ],
)
def test_ca_of_the_home_folder_is_the_default(
    home: Path, address: str, exists: bool, is_acme: bool, options: dict[str, object], is_own: bool
) -> None:
    own = home / "certs" / "ca.crt"
    (home / "certs" / "acme").mkdir(parents=True)
    if exists:
        own.touch()
    if is_acme:
        (home / "certs" / "acme" / "server-a.crt").touch()
    assert completed(address, **options).ca_file == (own if is_own else None)


def test_user_without_a_home_folder_uses_the_systems_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZCPROTO_HOME", "~missing-user")
    assert completed(key_log_file="~missing-user/x").ca_file is None
    with pytest.raises(ConfigError, match="no home folder"):
        completed(home="~missing-user")


def test_unknown_option_is_refused_by_either_client() -> None:
    make: Callable[..., object]
    for make in (connect, connect_blocking):
        with pytest.raises(TypeError, match=r"has no option 'cafile'; give ca_file"):
            make("localhost", cafile="ca.crt")
