"""The metrics of a running server: values, labels, and no personal data."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import subprocess
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.interop.support import needs
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import KEY, NO_TOKEN, PING, ServerThread, eventually, read_to_end, wall
from zcproto.admin.metrics import END_LABELS, server_metrics
from zcproto.admin.snapshot import status_report, take_snapshot
from zcproto.app.app import App, Items, default_app
from zcproto.client.blocking import connect_blocking
from zcproto.errors import CallError
from zcproto.observe.metrics import METRICS, TABLE
from zcproto.runs.log import ITEM_BYTES, RUN_BYTES
from zcproto.runtime import background
from zcproto.sessions import EndReason
from zcproto.sessions.token import token_text
from zcproto.stores.base import StoreUnavailable
from zcproto.stores.service import StoredSessionService
from zcproto.tls.failure import TlsFailure
from zcproto.wire.message import encode_body

SHARED_ONLY = {
    "zcproto_certificate_last_renewal_timestamp_seconds",
    "zcproto_certificate_last_renewal_success",
    "zcproto_oidc_keys_age_seconds",
    "zcproto_oidc_keys_failing",
    "zcproto_oidc_fetches_total",
}
"""Present only after a renewal, or with an identity provider."""


def render(server: ServerThread, accept: str = "") -> str:
    return server.in_loop(lambda: server_metrics(server.server.parts).render(accept))[1].decode()


def value(server: ServerThread, name: str, **labels: str) -> float:
    """Return the value of a series, or 0 without one."""
    for family in parse_text(render(server)):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return 0.0


def grows(server: ServerThread, name: str, by: float = 1, **labels: str) -> Any:
    """Assert that a series grows by exactly this much in the body."""

    @contextlib.contextmanager
    def check() -> Any:
        before = value(server, name, **labels)
        yield
        eventually(lambda: value(server, name, **labels) - before == by)

    return check()


def names_in(text: str) -> set[str]:
    """Return the full names of metrics."""
    return {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in parse_text(text)
        if family.samples
    }


# --- all of it ---------------------------------------------------------------------------------------------


@needs("promtool")
@pytest.mark.parametrize("store", ["memory", "sqlite"])
def test_promtool_reports_no_problem(serve: Serve, store: str) -> None:
    server = serve(store__url=store)
    with server.client("ada") as client:
        client.call("sleep", {"ms": 1})
        client.refused("no.such.method")
        text = render(server)
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_rendered_metrics_match_the_table(serve: Serve) -> None:
    app = default_app()
    app.topic("jobs")

    @app.method("work", durable=True)
    async def work() -> AsyncIterator[int]:
        yield 1

    server = serve(app, store__url="sqlite")
    with server.client("ada") as client:
        client.call("sleep", {"ms": 1})
        client.refused("no.such.method")
        client.send(client.frame(PING, timestamp=wall() - 3_600_000))
        client.send(client.request("echo", timestamp=wall() - 3_600_000))
        client.answer()
    server.until(lambda: not server.server.state.connections)
    rendered = names_in(render(server))
    nothing_yet = {
        "zcproto_http_responses_total",
        "zcproto_loop_held_total",
        "zcproto_telemetry_items_total",
        "zcproto_topics_away",
        "zcproto_topic_undelivered_total",
    }
    assert rendered <= METRICS.keys()
    of_workers = {metric.name for metric in TABLE["Workers"]}
    assert METRICS.keys() - rendered == SHARED_ONLY | nothing_yet | of_workers


def test_labels_match_the_table(serve: Serve) -> None:
    server = serve(store__url="sqlite")
    with server.client("ada") as client:
        client.call("sleep", {"ms": 1})
    labels = {metric.name.removesuffix("_total"): set(metric.labels) for metric in METRICS.values()}
    for parse, accept in (
        (parse_text, ""),
        (parse_openmetrics, "application/openmetrics-text;version=1.0.0"),
    ):
        for family in parse(render(server, accept)):
            for sample in family.samples:
                if family.name in labels:
                    assert set(sample.labels) - {"le"} == labels[family.name]


@pytest.mark.requirement("logs")
def test_metrics_contain_no_name_address_token_or_key(serve: Serve) -> None:
    user = f"user{secrets.token_hex(8)}"
    server = serve(store__url="sqlite", certificates__key_types=["ecdsa-p256"])
    with server.client(user) as client:
        client.echo()
        for scheme in ("api_key", user):
            refused = {"scheme": scheme, "user": user, "key": "the wrong key"}
            client.refused("session.open", refused, token=NO_TOKEN)
        client.refused(f"{user}.method")
        client.refused("echo", token=secrets.token_bytes(32))
        client.call("session.revoke", {"id": client.opened["id"]})
        secret = [token_text(client.token), client.token.hex(), token_text(client.opened["refresh_token"])]
        text = render(server)
    for hidden in (user, "127.0.0.1", "the wrong key", client.opened["id"], *secret):
        assert hidden not in text


# --- fact by fact ------------------------------------------------------------------------------------------


@pytest.mark.requirement("metrics")
@pytest.mark.parametrize("store", ["memory", "sqlite"])
def test_ended_sessions_are_counted_by_reason(serve: Serve, store: str) -> None:
    server = serve(store__url=store)
    ended = "zcproto_sessions_ended_total"
    with server.client("ada") as client, server.client("operator") as operator:
        assert value(server, "zcproto_sessions", state="live") == 2
        with grows(server, "zcproto_sessions_refreshed_total"):
            refresh_token = client.opened["refresh_token"]
            opened = client.call("session.refresh", {"refresh_token": refresh_token, "client": "test/1"})
            client.token = opened["token"]
        with grows(server, ended, reason="closed"):
            client.call("session.close")
        with grows(server, ended, reason="by_user"):
            client.open_session("ada")
            client.call("session.revoke", {"id": client.opened["id"]})
        with grows(server, ended, reason="by_operator"), grows(server, "zcproto_events_sent_total"):
            client.open_session("ada")
            operator.call("server.revoke", {"user": "ada"})
        with (
            grows(server, ended, reason="refresh_reused"),
            grows(server, "zcproto_refresh_tokens_reused_total"),
        ):
            client.open_session("ada")
            first = client.opened["refresh_token"]
            client.call("session.refresh", {"refresh_token": first, "client": "test/1"}, token=NO_TOKEN)
            client.refused("session.refresh", {"refresh_token": first, "client": "a thief"}, token=NO_TOKEN)
        assert value(server, "zcproto_sessions_opened_total") == 5
        assert value(server, ended, reason="other") == 0


def test_expired_and_evicted_sessions_have_different_reasons(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "CLEANUP_S", 0.1)
    server = serve(sessions__per_user=1, sessions__when_full="evict_oldest")
    with server.client("ada") as client:
        with grows(server, "zcproto_sessions_ended_total", reason="replaced"):
            client.open_session("ada")
        with grows(server, "zcproto_sessions_ended_total", reason="expired"):
            server.clock.ahead_ms = 25 * 3_600_000
        eventually(lambda: value(server, "zcproto_sessions", state="lapsed") == 1)
        assert value(server, "zcproto_sessions", state="live") == 0


@pytest.mark.parametrize("store", ["memory", "sqlite"])
def test_session_that_ended_without_a_connection_has_a_reason(serve: Serve, store: str) -> None:
    server = serve(sessions__per_user=1, store__url=store)
    server.client("ada").close()
    server.until_left()
    with grows(server, "zcproto_sessions_ended_total", reason="disconnected"), server.client("ada"):
        pass


def test_every_end_reason_has_a_label() -> None:
    assert END_LABELS[EndReason.USER_CHANGED] == "user_changed"
    assert set(END_LABELS) == set(EndReason)


@pytest.mark.requirement("metrics")
@pytest.mark.usefixtures("long_login_delay")
def test_logins_are_counted_by_scheme_and_result(serve: Serve) -> None:
    server = serve(limits__login_failures=1)
    bad = {"scheme": "api_key", "user": "ada", "key": "wrong"}
    with server.client() as client:
        with grows(server, "zcproto_logins_total", scheme="api_key", result="refused"):
            client.refused("session.open", bad, token=NO_TOKEN)
        assert value(server, "zcproto_logins_total", scheme="api_key", result="failed") == 0
        assert value(server, "zcproto_logins_pending") == 0
        with grows(server, "zcproto_logins_throttled_total"):
            client.refused("session.open", bad, token=NO_TOKEN)
        with grows(server, "zcproto_logins_total", scheme="api_key", result="accepted"):
            client.open_session("bob")


@pytest.mark.requirement("metrics")
def test_refused_frames_are_counted_by_reason_and_code(serve: Serve) -> None:
    server = serve(limits__max_streams=1)
    refused, errors = "zcproto_frames_refused_total", "zcproto_errors_total"
    with server.client("ada") as client:
        old = wall() - 3_600_000
        with (
            grows(server, refused, reason="stale", code="STALE_TIMESTAMP"),
            grows(server, errors, code="STALE_TIMESTAMP"),
        ):
            client.refused("echo", timestamp=old)
        with (
            grows(server, refused, reason="token", code="UNAUTHENTICATED"),
            grows(server, errors, code="UNAUTHENTICATED"),
            grows(server, "zcproto_tokens_refused_total"),
        ):
            client.refused("echo", token=secrets.token_bytes(32))
        with grows(server, refused, reason="malformed", code="INVALID_ARGUMENT"):
            client.send(client.frame(2, b"\xc1"))
            client.answer()
        with grows(server, refused, reason="deadline", code="DEADLINE_EXCEEDED"):
            client.refused("echo", meta={"deadline_ms": 0})
        with grows(server, refused, reason="max_streams", code="RESOURCE_EXHAUSTED"):
            client.send(client.request("sleep", {"ms": 3_600_000}, stream=900))
            client.refused("echo")
            assert value(server, "zcproto_limit_use", limit="limits.max_streams") == 1
            assert value(server, "zcproto_requests_in_flight") == 1
            client.cancel(900)
            client.answer(900)
        with grows(server, errors, code="UNIMPLEMENTED"):
            client.refused("no.such.method")


def test_streams_and_their_items_are_counted(serve: Serve) -> None:
    app = App()

    @app.method("echo.items")
    async def echo_items(said: Items[int]) -> AsyncIterator[int]:
        async for number in said:
            yield number

    server = serve(app)
    items, size = "zcproto_stream_items_total", "zcproto_stream_item_bytes_total"
    ca_file = server.home / "certs" / "ca.crt"
    with (
        grows(server, "zcproto_streams_opened_total", 2),
        grows(server, "zcproto_streams_cut_total", reason="caller"),
        grows(server, items, 4, direction="sent"),
        grows(server, items, 4, direction="received"),
        grows(server, size, 4 * 65, direction="sent"),
        grows(server, size, 4 * 65, direction="received"),
        connect_blocking(f"127.0.0.1:{server.port}", user="ada", key=KEY, ca_file=ca_file) as client,
    ):
        with client.stream("echo.items", items=[1, 2]) as stream:
            assert list(stream) == [1, 2]
        with client.stream("echo.items", window=(1, 1)) as stream:
            stream.send(1)
            assert stream.receive() == 1
            assert value(server, "zcproto_streams_open", method="echo.items") == 1
            assert value(server, "zcproto_limit_use", limit="streams.max_open") == 1
            stream.send(2)
            assert stream.receive() == 2
    assert value(server, "zcproto_streams_open", method="echo.items") == 0


def test_durable_runs_and_their_items_are_counted(serve: Serve) -> None:
    app, may_end = App(), asyncio.Event()

    @app.method("work", durable=True)
    async def work() -> AsyncIterator[int]:
        yield 1
        yield 2
        await may_end.wait()

    server = serve(app)
    ca_file = server.home / "certs" / "ca.crt"
    with (
        grows(server, "zcproto_run_items_total", 2),
        grows(server, "zcproto_runs_ended_total", code="ok"),
        connect_blocking(f"127.0.0.1:{server.port}", user="ada", key=KEY, ca_file=ca_file) as client,
    ):
        with client.stream("work", durable=True) as stream:
            assert [stream.receive(), stream.receive()] == [1, 2]
            assert value(server, "zcproto_runs_running") == value(server, "zcproto_runs_attached") == 1
            kept = RUN_BYTES + len(encode_body(["work", {}])) + 2 * (ITEM_BYTES + 1)
            assert value(server, "zcproto_runs_kept_bytes") == kept
            assert value(server, "zcproto_limit_use", limit="streams.durable_bytes") == kept
            server.in_loop(may_end.set)
            assert list(stream) == []
        report = server.in_loop(lambda: status_report(take_snapshot(server.server.parts)))["runs"]
    kept = RUN_BYTES + 3 * (ITEM_BYTES + 1)  # with its result, and without its params
    assert report == {"running": 0, "attached": 0, "ended": 1, "lost": 0, "kept_bytes": kept, "away": 0}


def test_replayed_frame_is_counted_and_closes_the_connection(serve: Serve) -> None:
    server = serve()
    with (
        grows(server, "zcproto_errors_total", code="REPLAYED"),
        grows(server, "zcproto_connections_ended_total", reason="replayed"),
        server.client("ada") as client,
    ):
        frame = client.request("echo")
        client.send(frame, frame)
        client.rest_until_closed()


def test_unknown_error_code_does_not_break_the_scrape(serve: Serve) -> None:
    class OurOwnError(CallError):
        code = 99  # type: ignore[assignment]

    app = App()

    @app.method("fails")
    def fails() -> None:
        raise OurOwnError("this is ours")

    try:
        server = serve(app)
        with server.client("ada") as client, grows(server, "zcproto_errors_total", code="other"):
            assert client.refused("fails").code == 99
    finally:
        del CallError.by_code[99]


def test_exceptions_of_methods_count_as_incidents(serve: Serve) -> None:
    app = App()

    @app.method("breaks")
    def breaks() -> None:
        raise ZeroDivisionError

    server = serve(app)
    with (
        server.client("ada") as client,
        grows(server, "zcproto_incidents_total"),
        grows(server, "zcproto_errors_total", code="INTERNAL"),
        grows(server, "zcproto_method_calls_total", method="breaks"),
    ):
        client.refused("breaks")


def test_limits_have_their_current_use(serve: Serve) -> None:
    server = serve(limits__max_connections=3, limits__connections_per_address=0)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(server.client("ada"))
        assert value(server, "zcproto_limit", limit="limits.max_connections") == 3
        assert value(server, "zcproto_limit_use", limit="limits.max_connections") == 3
        assert value(server, "zcproto_limit", limit="limits.connections_per_address") == float("inf")
        assert value(server, "zcproto_limit_use", limit="limits.connections_per_address") == 3
        assert value(server, "zcproto_limit_use", limit="sessions") == 3
        with grows(server, "zcproto_connections_refused_total", reason="full"), server.tcp() as raw:
            read_to_end(raw)


@pytest.mark.requirement("tls_errors", "metrics")
def test_tls_failures_are_counted_by_cause(serve: Serve) -> None:
    server = serve()
    for cause in TlsFailure:
        assert f'zcproto_tls_failures_total{{cause="{cause.value}"}} 0.0' in render(server)
    with grows(server, "zcproto_tls_failures_total", cause="plaintext_http"), server.tcp() as raw:
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
        raw.recv(100)
    with grows(server, "zcproto_tls_handshakes_completed_total"), server.client("ada"):
        pass
    assert re.search(r'^zcproto_tls_handshakes_total\{group="\w+"\} 1\.0$', render(server), re.MULTILINE)


def test_certificate_expiry_and_renewal_are_reported(serve: Serve) -> None:
    server = serve()
    path = str(server.home / "certs" / "server-ecdsa.crt")
    labels = {"path": path, "source": "own", "site": "", "key_type": "ecdsa-p256"}
    left = value(server, "zcproto_certificate_left_seconds", **labels)
    assert 89 * 86_400 < left <= 90 * 86_400
    assert left <= value(server, "zcproto_certificate_lifetime_seconds", **labels) <= 91 * 86_400
    ends = value(server, "zcproto_certificate_expires_timestamp_seconds", **labels)
    assert abs(ends - wall() / 1000 - left) < TIMEOUT
    assert value(server, "zcproto_certificate_left_seconds", **{**labels, "path": path[:-16] + "ca.crt"}) == 0
    assert "zcproto_certificate_last_renewal_success" not in render(server)
    with grows(server, "zcproto_certificate_events_total", event="renewed"):
        server.clock.ahead_ms = 61 * 86_400_000
    eventually(lambda: value(server, "zcproto_certificate_last_renewal_success") == 1)
    renewed = value(server, "zcproto_certificate_last_renewal_timestamp_seconds")
    assert abs(renewed - wall() / 1000 - 61 * 86_400) < TIMEOUT


def test_store_outage_is_reported_while_it_lasts(serve: Serve) -> None:
    server = serve(store__url="sqlite")
    sessions = server.server.state.sessions
    assert isinstance(sessions, StoredSessionService)
    sync = sessions.sync

    async def out(*_: object) -> None:
        raise StoreUnavailable("a test has taken it away")

    with server.client("ada") as client:
        assert value(server, "zcproto_store_state", state="healthy") == 1
        assert value(server, "zcproto_store_operation_seconds_count") >= 1
        assert value(server, "zcproto_store_outage_seconds") == 0
        real = sync.store.ping

        def take_away() -> None:
            sync.store.ping = out  # type: ignore[method-assign]  # so that no probe succeeds
            sync.health.begin_outage(server.clock.now())

        with grows(server, "zcproto_store_outages_total"):
            server.in_loop(take_away)
        eventually(lambda: value(server, "zcproto_store_outage_seconds") > 0)
        assert value(server, "zcproto_store_state", state="healthy") == 0
        with grows(server, "zcproto_store_pending_revocations"):
            client.call("session.close")
        server.in_loop(lambda: setattr(sync.store, "ping", real))
        eventually(lambda: value(server, "zcproto_store_state", state="healthy") == 1)
        assert value(server, "zcproto_store_outage_seconds") == 0
        assert value(server, "zcproto_store_pending_revocations") == 0
        eventually(lambda: value(server, "zcproto_store_operations_in_progress") == 0)


def test_slow_reader_is_counted(serve: Serve) -> None:
    app = App()

    @app.method("large")
    def large() -> bytes:
        return b"x" * 100_000

    server = serve(app, limits__write_buffer_bytes=65_536, limits__write_timeout=600)
    with server.client("ada", receive_buffer=4_096) as client:
        client.send(*(client.request("large", {}) for _ in range(100)))
        eventually(lambda: value(server, "zcproto_slow_readers") == 1)
        assert value(server, "zcproto_write_pauses_total") >= 1
        client.answers(100)
        eventually(lambda: value(server, "zcproto_slow_readers") == 0)


def test_draining_is_reported(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as client:
        client.send(client.request("sleep", {"ms": 3_600_000}))
        server.until(lambda: server.server.state.tasks.running)
        server.begin_drain(TIMEOUT)
        eventually(lambda: value(server, "zcproto_draining") == 1)
        client.cancel(client.stream)
    server.join()


def test_loop_lag_is_a_histogram(serve: Serve) -> None:
    server = serve()
    eventually(lambda: value(server, "zcproto_loop_lag_seconds_count") > 0)
    assert value(server, "zcproto_loop_lag_seconds_bucket", le="+Inf") > 0
