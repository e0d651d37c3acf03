"""Tests of the reload: all or nothing, without effect on existing connections."""

from __future__ import annotations

import asyncio
import signal
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import AnsweredError, ServerThread, StoppedClock, configuration, eventually
from tests.server.process import ServerProcess
from zcproto.admin.metrics import server_metrics
from zcproto.alerts import AlertKind
from zcproto.auth import UserFile
from zcproto.certs import client_ca, managed
from zcproto.certs.checker import CertificateChecker
from zcproto.certs.settings import managed_site
from zcproto.client.blocking import connect_blocking
from zcproto.errors import Code, ConfigError, Unauthenticated
from zcproto.observe.log import level
from zcproto.runtime.server import Server


def test_reload_applies_limits_to_future_connections(serve: Serve) -> None:
    server = serve(limits__max_streams=8, freshness__tolerance="30s")
    with server.client("ada") as old:
        reloaded = server.reload(limits__max_streams=2, freshness__tolerance="5s")
        assert [each.key for each in reloaded.applied] == ["freshness.tolerance", "limits.max_streams"]
        assert reloaded.needs_restart == []
        with server.client("ada") as new:
            assert (old.welcome.value["max_streams"], new.welcome.value["max_streams"]) == (8, 2)
            assert new.welcome.value["tolerance_ms"] == 5000
            frames = [new.request("sleep", {"ms": 60_000}) for _ in range(3)]
            new.send(*frames)
            assert new.answer(new.stream).code == Code.RESOURCE_EXHAUSTED
        old.echo()
        assert old.is_open()


def test_reload_reports_settings_that_need_a_restart(serve: Serve) -> None:
    server = serve()
    for _ in range(2):
        reloaded = server.reload(idempotency__keep="1h")
        assert [each.key for each in reloaded.needs_restart] == ["idempotency.keep"]
        assert reloaded.applied == []
    assert server.server.config.idempotency.keep == 600.0


def metrics(server: ServerThread) -> str:
    return server.in_loop(lambda: server_metrics(server.server.parts).render(""))[1].decode()


@pytest.mark.parametrize(
    "bad",
    [
        {"limits__max_streams": 0},
        {"limits__max_frame_bytes": 2000, "limits__max_frame_bytes_before_session": 3000},
        {"alerts__webhook": "https://h.example/", "alerts__webhook_secret_file": "/no/such/file"},
        {
            "certificates__mode": "files",
            "certificates__certificate": ["/no/such.pem"],
        },
    ],
)
def test_reload_of_invalid_configuration_changes_nothing(serve: Serve, bad: dict[str, Any]) -> None:
    server = serve(sessions__per_user=3)
    config, settings = server.server.config, server.server.state.settings
    pins = server.in_loop(lambda: server.server.pins)
    with server.client("ada") as client:
        with pytest.raises(ConfigError):
            server.reload(sessions__per_user=1, **bad)
        assert server.server.config is config
        assert server.server.state.settings is settings
        client.echo()
        for _ in range(2):  # three are allowed, as before
            server.client("ada").close()
        assert server.in_loop(lambda: server.server.pins) == pins
    (alert,) = server.in_loop(server.server.parts.alerts.center.open_alerts)
    assert alert.kind is AlertKind.CONFIG_REFUSED
    assert "zcproto_config_refused 1" in metrics(server)
    assert "; the configuration was refused, a restart would fail: " in server.in_loop(server.server.summary)
    server.settings = {"sessions__per_user": 1}
    server.reload()
    assert server.server.config.sessions.per_user == 1
    assert server.in_loop(server.server.parts.alerts.center.open_alerts) == []
    assert "zcproto_config_refused 0" in metrics(server)


@pytest.mark.requirement("expiration")
def test_reload_applies_session_settings(serve: Serve) -> None:
    server = serve(sessions__per_user=2, sessions__idle_timeout="1h")
    with server.client("ada") as one:
        server.reload(sessions__per_user=1, sessions__idle_timeout="1m", sessions__lifetime="1h")
        with server.client() as other:
            assert other.refused(
                "session.open", {"scheme": "api_key", "user": "ada", "key": "the right key"}
            ).code == (Code.RESOURCE_EXHAUSTED)
            other.open_session("ben")
            assert other.opened["idle_timeout_ms"] == 60_000
        one.echo()
        server.clock.ahead_ms = 120_000
        with pytest.raises(AnsweredError) as refused:
            one.call("echo", {}, timestamp=server.clock.wall())
        assert refused.value.code == Code.TOKEN_EXPIRED


def test_reload_applies_session_settings_with_a_store(serve: Serve) -> None:
    server = serve(store__url="sqlite", sessions__per_user=5)
    with server.client("ada"):
        server.reload(sessions__per_user=1)
        with server.client() as other:
            params = {"scheme": "api_key", "user": "ada", "key": "the right key"}
            assert other.refused("session.open", params).code == Code.RESOURCE_EXHAUSTED


def test_reload_applies_connection_limits_to_future_connections(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as one, server.client("ben"):
        server.reload(limits__max_connections=1)
        with pytest.raises((OSError, ssl.SSLError)):
            server.client()
        one.echo()
        server.reload(limits__max_connections=100, limits__connections_per_address=2)
        with pytest.raises((OSError, ssl.SSLError)):
            server.client()
        server.reload(limits__connections_per_address=0)
        server.client("eve").close()


def test_reload_applies_login_throttle(serve: Serve) -> None:
    server = serve(limits__login_failures=100)
    params = {"scheme": "api_key", "user": "ada", "key": "wrong"}
    with server.client() as client:
        for _ in range(3):
            assert client.refused("session.open", params).code == Code.UNAUTHENTICATED
        server.reload(limits__login_failures=2)
        assert client.refused("session.open", params).code == Code.RESOURCE_EXHAUSTED


def test_reload_applies_request_limits_to_open_connections(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as noisy, server.client("eve") as other:
        noisy.echo()
        server.reload(limits__requests_per_user=1)
        state = server.server.state
        state.clock = StoppedClock(state.clock)  # a second admits another request
        noisy.echo()
        noisy.echo()
        refused = noisy.refused("echo")
        assert refused.code == Code.RESOURCE_EXHAUSTED
        assert 0 < refused.details["retry_after_ms"] <= 1_000
        other.echo()
        server.reload(limits__requests_per_user=0)
        noisy.echo()


def test_reload_keeps_max_frame_of_existing_connections(serve: Serve) -> None:
    server = serve(limits__max_frame_bytes=200_000)
    with server.client("ada") as old:
        server.reload(limits__max_frame_bytes=50_000)
        old.echo(size=150_000)
        with server.client("ada") as new:
            new.echo(size=10_000)
        server.reload(limits__max_frame_bytes=1_000_000)
        old.echo(size=150_000)


def test_reload_applies_https_settings(serve: Serve) -> None:
    server = serve(http__metrics="open")

    def get(path: str) -> tuple[bytes, bytes]:
        context = ssl.create_default_context(cafile=str(server.home / "certs" / "ca.crt"))
        with context.wrap_socket(server.tcp(), server_hostname="localhost") as tls:
            tls.sendall(b"GET %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path.encode())
            data = b""
            while part := tls.recv(65_536):
                data += part
        head, _, body = data.partition(b"\r\n\r\n")
        return head, body

    head, _ = get("/metrics")
    assert b" 200 " in head
    server.reload(http__metrics="off")
    head, _ = get("/metrics")
    assert b" 404 " in head
    server.reload(http__metrics="address", http__allow=["192.0.2.0/24"])
    head, _ = get("/metrics")
    assert b" 403 " in head
    server.reload(http__allow=["127.0.0.0/8"])
    head, body = get("/metrics")
    assert b" 200 " in head
    assert b"zcproto_config_reloads" in body


# --- certificates ------------------------------------------------------------------------------------------


def test_reload_replaces_certificates_without_interruption(serve: Serve) -> None:
    server = serve()
    names = server.in_loop(server.server.parts.certificate_names)
    assert "added.localhost" not in names
    pins = server.in_loop(lambda: server.server.pins)
    with server.client("ada") as old:
        server.reload(certificates__names=["added.localhost"])
        assert "added.localhost" in server.in_loop(server.server.parts.certificate_names)
        assert server.in_loop(lambda: server.server.pins) == pins  # the key is the same
        server.client("ben").close()
        old.echo()


def test_reload_of_certificate_timings_keeps_certificates(serve: Serve) -> None:
    server = serve(certificates__watch_interval="1h")
    leaf = server.in_loop(lambda: server.server.certificates[0].leaf_sha256)
    server.reload(certificates__watch_interval="200ms")
    server.reload(certificates__renew_before="10d", certificates__alert_days=[5])
    assert server.in_loop(lambda: server.server.certificates[0].leaf_sha256) == leaf
    default = managed_site(server.server.config)
    assert default is not None
    managed.renew(default.directory, default.settings, datetime.now(UTC), print)
    # The watch continues with the new interval.
    server.until(lambda: server.server.certificates[0].leaf_sha256 != leaf)


def test_reload_resolves_alerts_of_removed_certificates(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    alerts = server.server.parts.alerts

    def raise_() -> None:
        alerts.raise_(AlertKind.CERTIFICATE_FILES, "site is bad", about="/etc/site.pem")
        alerts.raise_(AlertKind.STORE_DEGRADED, "the store is out")

    server.in_loop(raise_)
    server.reload(certificates__alert_days=[3])
    kinds = server.in_loop(lambda: {each.kind for each in alerts.center.open_alerts()})
    assert kinds == {AlertKind.STORE_DEGRADED}


def test_reload_of_other_settings_does_not_check_certificates(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("certificates are checked")

    monkeypatch.setattr(CertificateChecker, "check", refuse)
    assert [each.key for each in server.reload(limits__max_streams=9).applied] == ["limits.max_streams"]
    with pytest.raises(AssertionError, match="certificates are checked"):
        server.reload(certificates__alert_days=[3])


def test_reload_applies_client_pins_to_the_next_handshake(serve: Serve) -> None:
    server = serve(tls__client_auth="optional")
    assert server.server.parts.acceptor.client_pins == frozenset()
    reloaded = server.reload(tls__client_pins=["sha256/" + "A" * 43 + "="])
    assert [each.key for each in reloaded.applied] == ["tls.client_pins"]
    assert len(server.server.parts.acceptor.client_pins) == 1
    server.client("ada").close()  # a client without a certificate needs no pin


def test_reload_applies_client_name_to_the_next_login(home: Path, certs: Path) -> None:
    now = datetime.now(UTC)
    UserFile(home / "users.toml").add("ada")
    client_ca.ensure_authority(home / "certs", now)
    issued = client_ca.issue_client(home / "certs", "ada", lifetime=timedelta(days=1), now=now)
    assert issued.key is not None
    with ServerThread(home, certs, users_file=True, tls__client_auth="optional") as server:

        def user() -> str:
            with connect_blocking(
                f"localhost:{server.port}",
                ca_file=home / "certs" / "ca.crt",
                certificate=issued.certificate,
                certificate_key=issued.key,
                home=home,
            ) as client:
                return str(client.call("session.info")["user"])

        assert user() == "ada"
        server.reload(tls__client_name="email")
        with pytest.raises(Unauthenticated):
            user()
        server.reload(tls__client_name="dns")
        assert user() == "ada"


# --- alerts ------------------------------------------------------------------------------------------------


def test_reload_adds_and_removes_alert_command(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    output = tmp_path / "alerts"
    command = ["/bin/sh", "-c", f"cat >> {output}"]
    server.reload(alerts__command=command)
    alerts = server.server.parts.alerts
    server.in_loop(lambda: alerts.raise_(AlertKind.TEST, "first"))
    eventually(lambda: output.exists() and "first" in output.read_text())
    queue = alerts.queues[0]
    server.reload(alerts__command=[*command, "x"])
    assert alerts.queues == [queue]  # its queue is delivered
    server.in_loop(lambda: alerts.raise_(AlertKind.TEST, "second", about="2"))
    server.reload(alerts__command=[])
    eventually(lambda: "second" in output.read_text())
    assert alerts.queues == []


def test_reload_of_alert_threshold_restarts_the_count(serve: Serve) -> None:
    server = serve(alerts__throttled_logins=1000, alerts__stale_frames=1000)
    alerts, login = server.server.parts.alerts, server.server.parts.login

    def count(errors: int) -> set[AlertKind]:
        login.throttled += errors
        alerts.tick()
        return {each.kind for each in alerts.center.open_alerts()}

    assert server.in_loop(lambda: count(50)) == set()
    server.reload(alerts__throttled_logins=10)
    assert server.in_loop(lambda: count(9)) == set()
    assert server.in_loop(lambda: count(1)) == {AlertKind.LOGINS_THROTTLED}
    server.reload(alerts__stale_frames=999)  # the alert of another rule stays
    assert server.in_loop(lambda: count(0)) == {AlertKind.LOGINS_THROTTLED}
    server.reload(alerts__throttled_logins=0)
    assert server.in_loop(lambda: count(50)) == set()


# --- whose configuration, and when --------------------------------------------------------------------------


def test_reload_of_a_file_that_others_can_change_is_refused(serve: Serve) -> None:
    server = serve()
    path = server.home / "config.toml"
    path.write_text("[alerts]\nstale_frames = 9\n")
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="others can change this file"):
        server.reload()
    path.chmod(0o644)
    server.reload()
    assert server.server.config.alerts.stale_frames == 9


async def test_reload_without_read_config_is_refused(tmp_path: Path, certs: Path) -> None:
    (tmp_path / "certs").symlink_to(certs)
    server = Server(config=configuration(tmp_path), home=tmp_path)
    assert not server.can_reload
    with pytest.raises(ConfigError, match="not running: start it"):
        await server.reload()
    async with server:
        with pytest.raises(ConfigError, match="pass read_config to Server"):
            await server.reload()


def test_reload_during_drain_is_refused(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as client:
        client.send(client.request("sleep", {"ms": 60_000}))
        server.begin_drain(30.0)
        server.until(lambda: server.server.state.draining)
        with pytest.raises(ConfigError, match="draining"):
            server.reload()
        client.fin()
    server.join()


def test_drain_that_begins_during_reload_prevents_it(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    checked = server.server.parts.certificates._check_with

    def check_with(*arguments: Any) -> None:
        server.in_loop(lambda: setattr(server.server.state, "draining", True))
        checked(*arguments)

    monkeypatch.setattr(server.server.parts.certificates, "_check_with", check_with)
    settings = server.server.state.settings
    with pytest.raises(ConfigError, match="draining"):
        server.reload(limits__max_streams=3, certificates__alert_days=[3])
    assert server.server.state.settings is settings
    assert server.server.state.counters.reloads_refused == 1


def test_cancelled_caller_does_not_interrupt_reload(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    began, go_on = threading.Event(), threading.Event()
    checked = server.server.parts.certificates._check_with

    def check_with(*arguments: Any) -> None:
        began.set()
        assert go_on.wait(TIMEOUT)
        checked(*arguments)

    monkeypatch.setattr(server.server.parts.certificates, "_check_with", check_with)
    server.settings = {"limits__max_streams": 3, "certificates__alert_days": [3]}
    asking = asyncio.run_coroutine_threadsafe(server.server.reload(), server.loop)
    assert began.wait(TIMEOUT)
    asking.cancel()
    go_on.set()
    server.until(lambda: server.server.state.counters.reloads == 1)
    assert server.server.state.settings.max_streams == 3


def test_concurrent_reloads_run_one_after_another(serve: Serve) -> None:
    server = serve()

    async def several() -> None:
        await asyncio.gather(*(server.server.reload() for _ in range(5)))

    server.settings = {"limits__max_streams": 3}
    asyncio.run_coroutine_threadsafe(several(), server.loop).result(TIMEOUT)
    assert server.server.state.counters.reloads == 5
    assert server.server.state.settings.max_streams == 3


def test_reload_in_a_program_leaves_its_log_alone(serve: Serve) -> None:
    server = serve()
    before = level()
    reloaded = server.reload(log__level="error")
    assert [each.key for each in reloaded.needs_restart] == ["log.level"]
    assert level() == before


# --- a process -----------------------------------------------------------------------------------------------


def test_sighup_reloads_and_invalid_file_changes_nothing(home: Path, certs: Path) -> None:
    file = home / "config.toml"
    file.write_text('[certificates]\nkey_types = ["ecdsa-p256"]\n[store]\nurl = "memory"\n')
    good = file.read_text()

    with ServerProcess(home, certs) as server:
        with server.client() as client:
            file.write_text(
                good + '[limits]\nmax_streams = 5\n[log]\nlevel = "debug"\n[server]\nport = 9999\n'
            )
            server.signal(signal.SIGHUP)
            eventually(lambda: server.events("config.reloaded"))
            (line,) = server.events("config.reloaded")
            assert line["changed"] == ["limits.max_streams", "log.level"]
            assert "restart" not in line or line["restart"] == []  # --port overrides the file
            changes = [
                [line[name] for name in ("setting", "old", "new", "effect")]
                for line in server.events("config.changed")
            ]
            assert changes == [
                ["limits.max_streams", "128", "5", "new connections"],
                ["log.level", '"info"', '"debug"', "live"],
            ]
            with server.client() as other:
                assert other.welcome.value["max_streams"] == 5
            eventually(lambda: server.events("connection.opened"))
            file.write_text(good + "[limits]\nmax_streams = 0\nmax_stream = 1\n")
            server.signal(signal.SIGHUP)
            eventually(lambda: server.events("config.refused"))
            (line,) = server.events("config.refused")
            assert len(line["faults"]) == 2
            with server.client() as other:
                assert other.welcome.value["max_streams"] == 5
            assert client.is_open()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_reload_moves_the_log_to_another_file(home: Path, certs: Path) -> None:
    file = home / "config.toml"
    good = '[certificates]\nkey_types = ["ecdsa-p256"]\n[store]\nurl = "memory"\n'
    file.write_text(good)
    with ServerProcess(home, certs) as server:
        file.write_text(f'{good}[log]\nfile = "{home}/no/such/folder/log"\n')
        server.signal(signal.SIGHUP)
        eventually(lambda: "config.refused" in server.log)
        other = home / "other.log"
        file.write_text(f'{good}[log]\nfile = "{other}"\nformat = "json"\n')
        server.signal(signal.SIGHUP)
        eventually(lambda: other.exists() and "config.reloaded" in other.read_text())
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    assert "server.ended" in other.read_text()


def test_reload_of_unchanged_configuration_changes_nothing(serve: Serve) -> None:
    """ServerThread reloads the configuration that it was created with."""
    server: ServerThread = serve(limits__max_streams=7)
    assert server.reload() == ([], [])
