"""Sessions by the tokens of a real OpenID provider (npm's oidc-provider, in a process of its own, over TLS)."""

from __future__ import annotations

import asyncio
import re
import shutil
import ssl
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ServerPairs
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import AnsweredError, ServerThread
from tests.server.test_jwt_scheme import application, login
from zcproto.auth.jwt import read_json
from zcproto.auth.oidc import Provider
from zcproto.cli.login import device_login
from zcproto.errors import Code

FOLDER = Path(__file__).with_name("oidc_provider")

pytestmark = pytest.mark.skipif(
    shutil.which("node") is None or not (FOLDER / "node_modules").exists(),
    reason="oidc-provider is not installed; run npm ci in tests/server/oidc_provider",
)


class ProviderProcess:
    """The provider, and the clients that it knows."""

    def __init__(self, certificate: Path, key: Path, ca_file: Path) -> None:
        program = ["node", "provider.mjs", str(certificate), str(key)]
        self.process = subprocess.Popen(
            program, cwd=FOLDER, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.issuer = self._line()
        self._context = ssl.create_default_context(cafile=ca_file)
        self.settings: dict[str, Any] = {
            "issuer": self.issuer,
            "audience": "zcproto",
            "roles": ["billing"],
            "ca_file": str(ca_file),
        }

    def _line(self) -> str:
        return self.process.stdout.readline().strip()

    def run(self, command: str) -> None:
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        assert self._line() == "done"

    def token(self, resource: str = "https://zcproto.example") -> str:
        """Return a token for a program."""
        form = {
            "grant_type": "client_credentials",
            "client_id": "robot",
            "client_secret": "the-secret-of-the-robot-0123456789",
            "resource": resource,
        }
        data = urllib.parse.urlencode(form).encode()
        with urllib.request.urlopen(f"{self.issuer}/token", data, context=self._context) as response:
            found: str = read_json(response.read())["access_token"]
        return found

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def provider(server_pairs: ServerPairs, ca_file: Path) -> Iterator[ProviderProcess]:
    found = ProviderProcess(server_pairs.ecdsa.certificate, server_pairs.ecdsa.key, ca_file)
    yield found
    found.stop()


def is_accepted(server: ServerThread, token: str) -> bool:
    with server.client() as client:
        try:
            client.token = client.call("session.open", login(token))["token"]
        except AnsweredError as error:
            if error.code != Code.UNAUTHENTICATED:
                raise
            return False
        found: list[str] = client.call("who")
        return found == ["robot", "billing"]


def wait_until_accepted(server: ServerThread, token: str) -> None:
    """Try a token until the server may fetch the keys again, with fewer failures than are throttled."""
    for _ in range(60):
        if is_accepted(server, token):
            return
        time.sleep(0.1)
    raise AssertionError("the new key was not fetched")


def test_tokens_of_the_provider_open_sessions_through_rotation_and_outage(
    serve: Serve, provider: ProviderProcess
) -> None:
    server = serve(
        application(),
        users_file=True,
        auth__oidc=provider.settings,
        limits__login_failures=100,
        sessions__per_user=50,
    )
    old = provider.token()
    assert is_accepted(server, old)
    with server.client() as client:
        refused = client.refused("session.open", login(provider.token("https://other.example")))
        assert refused.code == Code.UNAUTHENTICATED
    provider.run("rotate")
    new = provider.token()
    server.clock.ahead_s += 30  # the keys may be fetched again
    wait_until_accepted(server, new)
    assert is_accepted(server, old)
    provider.run("rotate")
    newest = provider.token()
    server.clock.ahead_s += 30
    wait_until_accepted(server, newest)
    server.clock.ahead_s += 30  # until then its key may be a new one
    assert not is_accepted(server, old)  # its key is not published any more
    provider.stop()
    assert is_accepted(server, newest)
    assert is_accepted(server, new)


async def test_device_logs_in_when_a_person_confirms_its_code(
    serve: Serve, provider: ProviderProcess, ca_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(application(), users_file=True, auth__oidc=provider.settings)
    asked: list[float] = []

    async def approve(seconds: float) -> None:
        asked.append(seconds)
        if len(asked) == 2:  # until then the login is pending
            (code,) = re.findall("confirm the code (.*)", capsys.readouterr().err)
            await asyncio.to_thread(provider.run, f"approve {code} ada")

    site = Provider(provider.issuer, ssl.create_default_context(cafile=ca_file), TIMEOUT)
    ask = {"client_id": "cli", "scope": "openid offline_access", "resource": "https://zcproto.example"}
    found = await device_login(site, ask, approve)
    assert found["refresh_token"]

    def call() -> object:
        with server.client() as client:
            client.token = client.call("session.open", login(found["access_token"]))["token"]
            return client.call("who")

    assert await asyncio.to_thread(call) == ["ada", "billing"]
