"""Tests of the scheme jwt on a server: tokens of an identity provider, which publishes its keys over TLS."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest

import zcproto
from tests.alerts.receiver import Receiver, answer
from tests.auth.issuer import AUDIENCE, jwk, key_set, private_key
from tests.auth.test_jwt import FORGED
from tests.conftest import ServerPairs
from tests.server.conftest import Serve
from tests.server.helpers import AnsweredError, Client, ServerThread, eventually
from zcproto import App, CallableAuthenticator, Context
from zcproto.admin.metrics import server_metrics
from zcproto.app.app import default_app
from zcproto.auth.jwt import LEEWAY_S
from zcproto.config import AuthConfig, LogConfig, OidcConfig, config_as_toml, load_config
from zcproto.errors import Code, ConfigError
from zcproto.observe.log import configure_logging
from zcproto.runtime.build import build_jwt


class Company:
    """An identity provider at a port of this machine."""

    def __init__(self, certificate: tuple[Path, Path], ca_file: Path) -> None:
        self.receiver = Receiver(certificate)
        self.issuer = self.receiver.url.partition("/hook")[0]
        metadata = {"issuer": self.issuer, "jwks_uri": f"{self.issuer}/keys"}
        keys = answer(200, body=key_set(jwk("RS256")))
        self.receiver.answers[:] = [answer(200, body=json.dumps(metadata).encode()), keys]
        self.settings: dict[str, Any] = {
            "issuer": self.issuer,
            "audience": AUDIENCE,
            "roles": ["billing", "Ops Team=operator"],
            "ca_file": str(ca_file),
        }

    def token(self, life_s: float = 600, **changes: Any) -> str:
        now = time.time()
        claims = {
            "iss": self.issuer,
            "aud": AUDIENCE,
            "sub": "ada",
            "iat": int(now),  # as providers write it; the server's clock has milliseconds
            "exp": now + life_s,
            **changes,
        }
        return jwt.encode(claims, private_key("RSA"), "RS256", headers={"kid": "one"})


@pytest.fixture
def company(server_pairs: ServerPairs, ca_file: Path) -> Iterator[Company]:
    found = Company((server_pairs.ecdsa.certificate, server_pairs.ecdsa.key), ca_file)
    with found.receiver:
        yield found


def application() -> App:
    app = default_app()

    @app.method("who")
    def who(context: Context) -> list[str]:
        return [context.user, *sorted(context.roles)]

    @app.method("invoice", roles={"billing"})
    def invoice() -> str:
        return "created"

    return app


def login(token: str) -> dict[str, Any]:
    return {"scheme": "jwt", "token": token}


def opened(server: ServerThread, token: str) -> tuple[Client, dict[str, Any]]:
    client = server.client()
    found = client.call("session.open", login(token))
    client.token = found["token"]
    return client, found


def test_token_opens_a_session_with_its_user_roles_and_end(serve: Serve, company: Company) -> None:
    server = serve(application(), users_file=True, auth__oidc=company.settings)
    client, session = opened(server, company.token(roles=["billing", "admin"]))
    with client:
        assert client.call("who") == ["ada", "billing"]
        assert client.call("invoice") == "created"
        assert session["refresh_token"] is None
        assert session["expires_at"] <= (time.time() + 631) * 1000
    operator, _ = opened(server, company.token(sub="eve", roles=["Ops Team"]))
    with operator:
        assert operator.call("who") == ["eve", "operator"]
        assert operator.call("server.sessions")
        assert operator.refused("invoice").code == Code.PERMISSION_DENIED


def test_session_may_outlive_its_token_and_be_refreshed(serve: Serve, company: Company) -> None:
    server = serve(application(), users_file=True, auth__oidc={**company.settings, "outlive_token": True})
    client, session = opened(server, company.token(roles=["billing"]))
    with client:
        assert session["expires_at"] > (time.time() + 3600) * 1000
        client.token = client.call("session.refresh", {"refresh_token": session["refresh_token"]})["token"]
        assert client.call("who") == ["ada", "billing"]


def test_forged_tokens_get_one_answer_and_are_not_logged(
    serve: Serve, company: Company, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(LogConfig(format="json"))
    server = serve(application(), users_file=True, auth__oidc=company.settings, limits__login_failures=100)
    answers = set()
    forged = [
        *FORGED.values(),
        company.token(aud="another"),
        company.token(-60),
        company.token(nbf=time.time() + 60),
    ]
    for text in forged:
        with server.client() as client:
            refused = client.refused("session.open", login(text))
            answers.add((refused.code, refused.message, str(refused.details)))
    assert len(answers) == 1
    assert answers.pop()[0] == Code.UNAUTHENTICATED
    log = capsys.readouterr().err
    events = [json.loads(line) for line in log.splitlines()]
    assert {event["scheme"] for event in events if event["event"] == "login.refused"} == {"jwt"}
    for text in forged:
        assert not any(part in log for part in text.split(".") if len(part) > 8)


def test_client_opens_another_session_with_a_fresh_token(serve: Serve, company: Company) -> None:
    server = serve(application(), users_file=True, auth__oidc=company.settings)
    given: list[float] = []

    def fresh() -> dict[str, Any]:
        given.append(2.0 - LEEWAY_S if not given else 600.0)
        return login(company.token(given[-1]))

    with zcproto.connect_blocking(f"localhost:{server.port}", login=fresh, ca_file=server.ca_file) as client:
        assert client.call("who") == ["ada"]
        eventually(lambda: client.call("who") == ["ada"] and len(given) > 1)
    assert given == [2.0 - LEEWAY_S, 600.0]


def test_keys_are_logged_when_they_are_loaded_and_when_they_cannot_be(
    serve: Serve, company: Company, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(LogConfig(format="json"))
    settings = {**company.settings, "issuer": f"{company.issuer}/other"}
    server = serve(application(), users_file=True, auth__oidc=[company.settings, settings])
    with server.client() as client:
        client.call("session.open", login(company.token()))
        other = client.refused("session.open", login(company.token(iss=f"{company.issuer}/other")))
        assert (other.code, other.message) == (
            Code.UNAVAILABLE,
            "the identity provider does not answer; try again",
        )
    events = {event["event"]: event for event in map(json.loads, capsys.readouterr().err.splitlines())}
    assert events["oidc.keys_loaded"].items() >= {"issuer": company.issuer, "count": 1}.items()
    assert events["oidc.keys_failed"]["issuer"] == f"{company.issuer}/other"
    assert events["oidc.keys_failed"]["can_serve"] is False


def test_keys_that_cannot_be_fetched_are_an_alert_and_in_the_metrics(serve: Serve, company: Company) -> None:
    works = company.receiver.answers[:]
    company.receiver.answers[:] = [answer(503)]
    server = serve(application(), users_file=True, auth__oidc=company.settings)
    issuer = f'{{issuer="{company.issuer}"'
    assert f"zcproto_oidc_keys_failing{issuer}}} 0.0" in scraped(server)
    with server.client() as client:
        assert client.refused("session.open", login(company.token())).code == Code.UNAVAILABLE
        (alert,) = server.server.parts.alerts.report()["open"]
        shown = (alert["kind"], alert["about"], alert["severity"])
        assert shown == ("oidc.keys_failed", company.issuer, "error")
        assert "logins by its tokens are not possible" in alert["title"]
        text = scraped(server)
        assert f"zcproto_oidc_keys_failing{issuer}}} 1.0" in text
        assert f'zcproto_oidc_fetches_total{issuer},result="failed"}} 1.0' in text
        assert "zcproto_oidc_keys_age_seconds{" not in text
        company.receiver.answers[:] = works
        server.clock.ahead_s += 30
        eventually(lambda: is_opened(client, company.token()))
    assert server.server.parts.alerts.report()["open"] == []
    text = scraped(server)
    assert f"zcproto_oidc_keys_failing{issuer}}} 0.0" in text
    assert f'zcproto_oidc_fetches_total{issuer},result="fetched"}} 1.0' in text
    assert f"zcproto_oidc_keys_age_seconds{issuer}}}" in text


def scraped(server: ServerThread) -> str:
    return server.in_loop(lambda: server_metrics(server.server.parts).render(""))[1].decode()


def is_opened(client: Client, token: str) -> bool:
    with contextlib.suppress(AnsweredError):
        return bool(client.call("session.open", login(token)))
    return False


# --- configuration -------------------------------------------------------------------------------------------


def test_one_provider_may_be_a_plain_table(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        '[[auth.role]]\nname = "a"\n[auth.oidc]\nissuer = "https://a.example"\naudience = "x"\nroles = ["G=a"]\n'
    )
    loaded = load_config(config, home=tmp_path, environ={})
    assert loaded.auth.oidc == (OidcConfig(issuer="https://a.example", audience=("x",), roles=("G=a",)),)
    again = tmp_path / "again.toml"
    again.write_text(config_as_toml(loaded))
    assert load_config(again, home=tmp_path, environ={}) == loaded


def test_application_with_its_own_schemes_alone_has_no_tokens(serve: Serve, company: Company) -> None:
    app = App(authenticators=[CallableAuthenticator("own", lambda: "ada")])
    with pytest.raises(ConfigError, match="add BUILT_IN_SCHEMES to them"):
        serve(app, users_file=True, auth__oidc=company.settings)


def test_missing_package_is_a_fault_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jwt", None)
    config = AuthConfig(oidc=(OidcConfig(issuer="https://a.example", audience=("x",)),))
    clock: Any = None
    alerts: Any = None
    with pytest.raises(ConfigError, match=r'in a clone of zcproto: pip install "\.\[oidc\]"'):
        build_jwt(config, clock, alerts)
    assert build_jwt(AuthConfig(), clock, alerts) is None


def test_ca_file_without_certificates_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    config = OidcConfig(issuer="https://a.example", audience=("x",), ca_file=tmp_path / "ca.pem")
    clock: Any = type("Clock", (), {"now": float, "wall": int})()
    alerts: Any = None
    with pytest.raises(ConfigError, match=r"auth.oidc\[0\].ca_file: .*contains no PEM certificates"):
        build_jwt(AuthConfig(oidc=(config,)), clock, alerts)


def test_core_imports_no_package_of_the_extra() -> None:
    program = "import sys, zcproto, zcproto.runtime.build; zcproto.Server; assert 'jwt' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
