"""Machine tokens at the HTTPS side: scopes, expiry, revocation, throttling, last use and alerts."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from tests.admin.https_client import ask, bearer
from tests.helpers import FakeClock
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import client_context, eventually
from zcproto.admin.machines import MachineTokens, build_tokens
from zcproto.alerts import AlertKind, Severity
from zcproto.alerts.service import ServerAlerts
from zcproto.auth import Login, Throttle
from zcproto.auth.tokens import TokenFile
from zcproto.common.home import Home
from zcproto.config.model import LogConfig
from zcproto.http.messages import HttpRequest, HttpResponse, Peer
from zcproto.observe.log import configure_logging
from zcproto.sessions.token import token_from_text

DAY = timedelta(days=1)


def token_of(home: Path, name: str = "prometheus", *scopes: str, life: timedelta = 90 * DAY) -> bytes:
    now = datetime.now(UTC)
    text = TokenFile(home / "tokens.toml").add(name, scopes or ("metrics",), now, now + life).reveal()
    return cast("bytes", token_from_text(text))


def test_metrics_are_for_tokens_with_their_scope_alone(serve: Serve) -> None:
    server = serve(http__metrics="token")
    missing = ask(server, "/metrics")
    assert missing.status == 401
    assert missing.one("www-authenticate") == 'Bearer realm="zcproto"'
    good, other = token_of(server.home), token_of(server.home, "page", "status")
    found = ask(server, "/metrics", headers=bearer(good))
    assert found.status == 200
    assert b"zcproto_build_info" in found.body
    assert ask(server, "/metrics", "HEAD", headers=bearer(good)).status == 200
    lacking = ask(server, "/metrics", headers=bearer(other))
    assert lacking.status == 403
    assert (
        lacking.one("www-authenticate")
        == 'Bearer realm="zcproto", error="insufficient_scope", scope="metrics"'
    )
    with server.client("ada") as client:
        of_session = ask(server, "/metrics", headers=bearer(client.token))
    malformed = ask(server, "/metrics", headers={"Authorization": "Bearer x"})
    other_scheme = ask(server, "/metrics", headers={"Authorization": "Basic YTpi"})
    for refused in (of_session, malformed, other_scheme):
        assert refused.status == 401
        assert refused.one("www-authenticate") == 'Bearer realm="zcproto", error="invalid_token"'
    assert len({refused.body for refused in (of_session, malformed, other_scheme)}) == 1


def test_status_is_for_sessions_and_for_tokens_with_its_scope(serve: Serve) -> None:
    server = serve()
    good, other = token_of(server.home, "page", "status"), token_of(server.home)
    found = ask(server, "/status.json", headers=bearer(good))
    assert found.status == 200
    assert json.loads(found.body)["operator"] is False
    assert ask(server, "/status.json", headers=bearer(other)).status == 403
    assert ask(server, "/status.json", headers=bearer(bytes(32))).status == 401
    with server.client("ada") as client:
        assert ask(server, "/status.json", headers=bearer(client.token)).status == 200
    assert ask(server, "/metrics", headers=bearer(good)).status == 401, "metrics are for sessions here"


def test_expired_token_is_refused_by_the_clock_of_the_server(serve: Serve) -> None:
    server = serve(http__metrics="token")
    token = token_of(server.home, life=DAY)
    assert ask(server, "/metrics", headers=bearer(token)).status == 200
    server.clock.ahead_ms = 86_400_000
    refused = ask(server, "/metrics", headers=bearer(token))
    assert (refused.status, "error" in refused.one("www-authenticate")) == (401, True)
    server.clock.ahead_ms = 0
    assert ask(server, "/metrics", headers=bearer(token)).status == 200


def test_revocation_applies_to_the_next_request_of_an_open_connection(serve: Serve) -> None:
    server = serve(http__metrics="token")
    token = token_of(server.home)
    context = client_context(server.home / "certs" / "ca.crt", ())
    connection = http.client.HTTPSConnection("localhost", server.port, timeout=TIMEOUT, context=context)
    with contextlib.closing(connection):

        def status() -> int:
            connection.request("GET", "/metrics", headers=bearer(token))
            answer = connection.getresponse()
            answer.read()
            return answer.status

        assert status() == 200
        TokenFile(server.home / "tokens.toml").remove("prometheus")
        assert status() == 401


@pytest.mark.usefixtures("long_login_delay")
def test_unknown_tokens_are_throttled_and_logged_without_the_token(serve: Serve, tmp_path: Path) -> None:
    configure_logging(LogConfig(level="info", file=tmp_path / "log"))
    server = serve(http__metrics="token", limits__login_failures=5)
    token = token_of(server.home, life=DAY)
    for number in range(5):
        assert ask(server, "/metrics", headers=bearer(bytes([number]) * 32)).status == 401
    refused = ask(server, "/metrics", headers=bearer(bytes([9]) * 32))
    assert refused.status == 429
    assert int(refused.one("retry-after")) >= 1
    assert ask(server, "/metrics", headers=bearer(token)).status == 200, "strangers cannot keep a scraper out"
    text = (tmp_path / "log").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["peer"] for line in lines if line["event"] == "http.token_refused"] == 5 * ["127.0.0.1"]
    for number in (0, 4, 9):
        assert bearer(bytes([number]) * 32)["Authorization"].split()[1] not in text


def test_known_tokens_are_not_throttled_and_are_logged_with_their_names(serve: Serve, tmp_path: Path) -> None:
    configure_logging(LogConfig(level="info", file=tmp_path / "log"))
    server = serve(http__metrics="token", limits__login_failures=5)
    expired, lacking = token_of(server.home, "old", life=DAY), token_of(server.home, "page", "status")
    server.clock.ahead_ms = 2 * 86_400_000
    for _ in range(7):
        assert ask(server, "/metrics", headers=bearer(expired)).status == 401
    assert ask(server, "/metrics", headers=bearer(lacking)).status == 403
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    named = [(line["machine"], line["reason"]) for line in lines if line["event"] == "http.token_refused"]
    assert named == [*7 * [("old", "it has expired")], ("page", "it lacks the scope metrics")]


def test_last_use_is_stored(serve: Serve) -> None:
    server = serve(http__metrics="token")
    token = token_of(server.home)
    file = TokenFile(server.home / "tokens.toml")
    assert ask(server, "/metrics", headers=bearer(token)).status == 200

    def is_stored() -> bool:
        file.load()
        return file.entries["prometheus"].last_used is not None

    eventually(is_stored)
    assert ask(server, "/metrics", headers=bearer(token)).status == 200


def test_token_stays_valid_while_its_file_is_faulty(serve: Serve) -> None:
    server = serve(http__metrics="token")
    token = token_of(server.home)
    assert ask(server, "/metrics", headers=bearer(token)).status == 200
    (server.home / "tokens.toml").write_text("nonsense")
    assert ask(server, "/metrics", headers=bearer(token)).status == 200


# --- upkeep --------------------------------------------------------------------------------------------------


class Upkeep:
    """Tokens with manual clock and recorded alerts."""

    def __init__(self, folder: Path, *, reports: bool = True) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self.home = Home(folder)
        self.file = TokenFile(self.home.tokens)
        self.clock = FakeClock()
        self.time = datetime(2026, 1, 1, tzinfo=UTC)
        self.raised: list[tuple[str, Severity, str]] = []
        self.resolved: list[str] = []
        self.tokens: MachineTokens = build_tokens(
            self.home,
            Login([], Throttle()),
            cast("ServerAlerts", self),
            self.clock,
            lambda: self.time,
            reports=reports,
        )

    def raise_(self, kind: AlertKind, title: str, *, about: str, severity: Severity, **_: Any) -> None:
        assert kind is AlertKind.MACHINE_EXPIRY
        self.raised.append((about, severity, title))

    def resolve(self, kind: AlertKind, title: str, *, about: str) -> None:
        assert kind is AlertKind.MACHINE_EXPIRY
        self.resolved.append(about)

    def add(self, name: str, life: timedelta) -> bytes:
        text = self.file.add(name, ("metrics",), self.time, self.time + life).reveal()
        return cast("bytes", token_from_text(text))

    async def use(self, token: bytes) -> HttpResponse | None:
        request = HttpRequest("GET", "/metrics", peer=Peer("192.0.2.1"))
        return await self.tokens.refusal(token, request, "metrics")

    async def tick(self) -> None:
        """Run one round of the upkeep."""
        rounds = 0

        async def sleep(seconds: float) -> None:
            nonlocal rounds
            rounds += 1
            if rounds == 2:
                raise asyncio.CancelledError

        self.tokens._sleep = sleep
        with contextlib.suppress(asyncio.CancelledError):
            await self.tokens.run()


async def test_token_in_use_raises_an_alert_before_it_ends_and_when_it_has(tmp_path: Path) -> None:
    upkeep = Upkeep(tmp_path / "home")
    used = upkeep.add("used", 90 * DAY)
    upkeep.add("unused", 90 * DAY)
    for days, expected in (
        (70, None),
        (76, (Severity.WARNING, "the token used, which is in use, expires in 14 days")),
        (80, None),
        (89.5, None),
    ):
        upkeep.time = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=days)
        await upkeep.use(used)
        await upkeep.tick()
        assert upkeep.raised == ([] if expected is None else [("used", *expected)])
        upkeep.raised.clear()
    upkeep.time = datetime(2026, 1, 1, tzinfo=UTC) + 90 * DAY
    await upkeep.tick()
    assert upkeep.raised == [("used", Severity.ERROR, "the token used, which is in use, has expired")]
    assert upkeep.resolved == []
    upkeep.file.remove("used")
    await upkeep.tick()
    assert upkeep.resolved == ["used"]


async def test_use_by_a_clock_that_was_ahead_is_replaced_and_no_alert(tmp_path: Path) -> None:
    upkeep = Upkeep(tmp_path / "home")
    token = upkeep.add("used", 90 * DAY)
    right = upkeep.time + 80 * DAY
    upkeep.time = right + 9 * DAY
    await upkeep.use(token)
    await upkeep.tick()
    upkeep.raised.clear()
    upkeep.time = right
    await upkeep.tick()
    assert upkeep.resolved == ["used"], "it is not known to be in use"
    await upkeep.use(token)
    await upkeep.tick()
    upkeep.file.load()
    assert upkeep.file.entries["used"].last_used == right
    await upkeep.tick()
    assert [about for about, _, _ in upkeep.raised] == ["used"]


async def test_last_use_is_not_stored_through_a_link(tmp_path: Path) -> None:
    """As to the file of a Secret: the link would become a copy, which no longer follows it."""
    upkeep = Upkeep(tmp_path / "home")
    token = upkeep.add("used", 90 * DAY)
    upkeep.home.tokens.rename(tmp_path / "tokens.toml")
    upkeep.home.tokens.symlink_to(tmp_path / "tokens.toml")
    before = (tmp_path / "tokens.toml").read_text()
    assert await upkeep.use(token) is None
    await upkeep.tick()
    assert upkeep.home.tokens.is_symlink()
    assert (tmp_path / "tokens.toml").read_text() == before


async def test_alert_ends_when_the_token_is_not_used_any_more(tmp_path: Path) -> None:
    upkeep = Upkeep(tmp_path / "home")
    token = upkeep.add("used", 20 * DAY)
    upkeep.time += 16 * DAY
    await upkeep.use(token)
    await upkeep.tick()
    assert upkeep.raised == [("used", Severity.WARNING, "the token used, which is in use, expires in 4 days")]
    upkeep.time += 12 * DAY
    await upkeep.tick()
    assert upkeep.resolved == ["used"]


async def test_short_lived_token_is_an_alert_in_its_last_quarter(tmp_path: Path) -> None:
    upkeep = Upkeep(tmp_path / "home")
    token = upkeep.add("used", timedelta(hours=8))
    for hours, alerts in ((5, 0), (6.5, 1)):
        upkeep.time = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=hours)
        await upkeep.use(token)
        await upkeep.tick()
        assert len(upkeep.raised) == alerts
    assert upkeep.raised[0][2].endswith("expires in 2 hours")


async def test_one_process_reports_and_all_store_uses(tmp_path: Path) -> None:
    worker = Upkeep(tmp_path / "home", reports=False)
    token = worker.add("used", 4 * DAY)
    worker.time += 3.5 * DAY
    assert await worker.use(token) is None
    await worker.tick()
    assert worker.raised == []
    coordinator = Upkeep(tmp_path / "home")
    coordinator.time = worker.time
    await coordinator.tick()
    assert [name for name, _, _ in coordinator.raised] == ["used"]


async def test_use_is_written_once_an_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upkeep = Upkeep(tmp_path / "home")
    token = upkeep.add("used", 90 * DAY)
    writes: list[object] = []
    mark: Callable[..., None] = TokenFile.mark_used

    def counted(file: TokenFile, uses: Any) -> None:
        writes.append(uses)
        mark(file, uses)

    monkeypatch.setattr(TokenFile, "mark_used", counted)
    for minutes in range(0, 121, 10):
        upkeep.time = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=minutes)
        await upkeep.use(token)
        await upkeep.tick()
    assert len(writes) == 3


async def test_file_that_cannot_be_written_is_logged_once_and_stops_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure_logging(LogConfig(file=tmp_path / "log"))
    upkeep = Upkeep(tmp_path / "home")
    token = upkeep.add("used", 90 * DAY)
    monkeypatch.setattr(
        "zcproto.auth.files.replace_file", lambda path, data: (_ for _ in ()).throw(OSError(30, "full"))
    )
    for _ in range(3):
        assert await upkeep.use(token) is None
        await upkeep.tick()
    assert (tmp_path / "log").read_text().count("tokens.uses_not_stored") == 1
