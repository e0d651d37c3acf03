"""Tests of `zcproto login`: the device authorization grant, and the tokens that `zcproto call --login` uses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from tests.alerts.receiver import Receiver, answer
from tests.conftest import ServerPairs
from zcproto.auth.oidc import KeysFailed
from zcproto.cli import main
from zcproto.cli.login import FILE, device_login, stored_login
from zcproto.common.home import Home
from zcproto.common.https import Response
from zcproto.errors import ConfigError

Capture = pytest.CaptureFixture[str]
BEGUN = {
    "device_code": "the-device-code",
    "user_code": "ABCD-EFGH",
    "verification_uri": "https://login.example.com/device",
    "expires_in": 30,
    "interval": 5,
}
ASK = {"client_id": "cli", "scope": "openid"}


class Answers:
    """A provider that answers in turn."""

    def __init__(self, *answers: tuple[int, Any]) -> None:
        self._answers = list(answers)
        self.asked: list[tuple[str, dict[str, list[str]]]] = []
        self.waited: list[float] = []

    async def address(self, name: str) -> str:
        return name

    async def post(self, address: str, form: bytes) -> Response:
        self.asked.append((address, parse_qs(form.decode())))
        status, body = self._answers.pop(0)
        if status == 0:
            raise KeysFailed("localhost cannot be reached: Connection refused")
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return Response(status=status, body=data, headers={})

    async def sleep(self, seconds: float) -> None:
        self.waited.append(seconds)


async def result(answers: Answers) -> dict[str, Any]:
    provider: Any = answers
    return await device_login(provider, ASK, answers.sleep)


async def test_code_is_shown_and_tokens_are_awaited(capsys: Capture) -> None:
    pending = (400, {"error": "authorization_pending"})
    answers = Answers((200, BEGUN), pending, (400, {"error": "slow_down"}), (200, {"access_token": "t"}))
    assert await result(answers) == {"access_token": "t"}
    assert (
        capsys.readouterr().err == "Open https://login.example.com/device\nand confirm the code ABCD-EFGH\n"
    )
    assert answers.waited == [5, 5, 10]
    assert [address for address, _ in answers.asked] == [
        "device_authorization_endpoint",
        *["token_endpoint"] * 3,
    ]
    assert answers.asked[-1][1]["device_code"] == ["the-device-code"]


async def test_what_the_provider_sends_is_escaped_and_bounded(capsys: Capture) -> None:
    odd = {**BEGUN, "user_code": "\x1b[2J", "interval": 1e9, "expires_in": 10**9}
    odd["verification_uri_complete"] = "x" * 999
    answers = Answers((200, odd), (200, {}))
    await result(answers)
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert len(err) < 600
    assert answers.waited == [5]


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([(200, BEGUN), *[(400, {"error": "authorization_pending"})] * 6], "was not confirmed in time"),
        ([(200, BEGUN), (400, {"error": "access_denied"})], "refused the login: access_denied"),
        ([(400, {"error": "invalid_client", "error_description": "\x1bno"})], r"invalid_client: \\x1bno"),
        ([(200, {})], "refused the login: no reason"),
        ([(200, b"<html>")], "device_authorization_endpoint is not JSON"),
        ([(0, b"")], "cannot be used: localhost cannot be reached"),
    ],
)
async def test_login_that_fails_says_why(answers: list[tuple[int, Any]], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        await result(Answers(*answers))


# --- the command ---------------------------------------------------------------------------------------------


class Site:
    """A provider at a port of this machine."""

    def __init__(self, pairs: ServerPairs) -> None:
        self.receiver = Receiver((pairs.ecdsa.certificate, pairs.ecdsa.key))
        self.issuer = self.receiver.url.partition("/hook")[0]
        self.metadata = {
            "issuer": self.issuer,
            "device_authorization_endpoint": f"{self.issuer}/device",
            "token_endpoint": f"{self.issuer}/token",
        }

    def answers(self, *bodies: Any) -> None:
        all_ = self.metadata, *bodies
        self.receiver.answers[:] = [answer(200, body=json.dumps(body).encode()) for body in all_]


@pytest.fixture
def site(server_pairs: ServerPairs) -> Iterator[Site]:
    found = Site(server_pairs)
    with found.receiver:
        yield found


def log_in(site: Site, ca_file: Path, *more: str) -> int:
    return main(["login", "--issuer", site.issuer, "--client-id", "cli", "--ca", str(ca_file), *more])


async def test_tokens_are_kept_and_refreshed(home: Path, site: Site, ca_file: Path, capsys: Capture) -> None:
    first = {"access_token": "first", "id_token": "i", "refresh_token": "r1", "expires_in": 10}
    site.answers({**BEGUN, "interval": 1}, first)
    assert await asyncio.to_thread(log_in, site, ca_file) == 0
    assert "logged in" in capsys.readouterr().err
    path = home / FILE
    assert path.stat().st_mode & 0o777 == 0o600
    fresh = stored_login(Home(home))
    site.answers({"access_token": "second", "expires_in": 36_000})
    assert await fresh() == {"scheme": "jwt", "token": "second"}
    assert await fresh() == {"scheme": "jwt", "token": "second"}
    form = parse_qs(site.receiver.received[-1].body.decode())
    assert (form["grant_type"], form["refresh_token"]) == (["refresh_token"], ["r1"])
    kept = json.loads(path.read_text())
    assert (kept["refresh_token"], kept["kind"]) == ("r1", "access_token")
    path.write_text(json.dumps({**kept, "expires_at": 0, "refresh_token": ""}))
    with pytest.raises(ConfigError, match="the login has expired"):
        await fresh()
    path.write_text(json.dumps({**kept, "expires_at": 0}))
    site.receiver.answers[1:] = [answer(400, body=b'{"error": "invalid_grant"}')]
    site.receiver.answers[0] = answer(200, body=json.dumps(site.metadata).encode())
    with pytest.raises(ConfigError, match="refused the login: invalid_grant"):
        await fresh()


def test_id_token_is_used_on_request(home: Path, site: Site, ca_file: Path) -> None:
    site.answers({**BEGUN, "interval": 1}, {"access_token": "opaque", "id_token": "the-id-token"})
    assert log_in(site, ca_file, "--id-token", "--resource", "https://zcproto.example") == 0
    assert json.loads((home / FILE).read_text())["token"] == "the-id-token"
    (asked,) = [each for each in site.receiver.received if "/device" in each.line]
    assert parse_qs(asked.body.decode())["resource"] == ["https://zcproto.example"]


def test_answer_without_a_token_is_refused(home: Path, site: Site, ca_file: Path, capsys: Capture) -> None:
    site.answers({**BEGUN, "interval": 1}, {"token_type": "bearer"})
    assert log_in(site, ca_file) == 2
    assert "has issued no access_token" in capsys.readouterr().err
    assert not (home / FILE).exists()


@pytest.mark.parametrize(
    "issuer", ["http://login.example.com", "ftp://x", "", "https://a@b", "http://localhost.evil.example"]
)
def test_issuer_must_be_reached_over_tls(home: Path, issuer: str, capsys: Capture) -> None:
    assert main(["login", "--issuer", issuer, "--client-id", "cli"]) == 2
    assert "--issuer must be the address of an identity provider" in capsys.readouterr().err


def test_call_needs_a_login_and_no_other_user(home: Path, capsys: Capture) -> None:
    home.mkdir(mode=0o700)
    assert main(["call", "localhost:1", "who", "--login"]) == 2
    assert "there is no login; run zcproto login" in capsys.readouterr().err
    assert main(["call", "localhost:1", "who", "--login", "--user", "ada"]) == 2
    assert "--login goes without --user and --key-file" in capsys.readouterr().err
    (home / FILE).write_text("nonsense")
    (home / FILE).chmod(0o600)
    assert main(["call", "localhost:1", "who", "--login"]) == 2
    assert "cannot be used" in capsys.readouterr().err
