"""The HTTPS side of a server over real TLS: with http.client, raw bytes and curl."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.admin.https_client import HSTS, OPEN, add, ask, exchange, read_to_end, tls
from tests.http.helpers import GET, answers
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import ServerThread, bystander, eventually
from zcproto.certs import client_ca
from zcproto.http.connection import HttpLimits
from zcproto.http.messages import HttpRequest, HttpResponse, Route, text_response

# --- what there is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", OPEN)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_public_resources_need_no_session(shared: ServerThread, path: str, method: str) -> None:
    answer = ask(shared, path, method)
    assert answer.status == 200
    assert answer.one("strict-transport-security") == HSTS
    assert int(answer.one("content-length")) > 0
    assert (answer.body == b"") is (method == "HEAD")


def test_healthz_returns_ok(shared: ServerThread) -> None:
    assert ask(shared, "/healthz").body == b"ok\n"


def test_well_known_describes_the_server(shared: ServerThread) -> None:
    found = json.loads(ask(shared, "/.well-known/zcp").body)
    assert found["alpn"] == ["zcp/1"]
    assert found["versions"] == [1]
    assert found["auth"] == ["api_key"]
    assert found["pins"] == shared.server.pins
    assert found["pins_next"] is None
    with shared.client() as client:
        welcome = client.welcome.value
    assert found["sts"] == welcome["sts"] == {"max_age": 31_536_000, "include_subdomains": True}
    for key in ("max_frame", "max_streams", "idle_timeout_ms", "tolerance_ms"):
        assert found["limits"][key] == welcome[key]


def test_unknown_path_or_method_is_refused(shared: ServerThread) -> None:
    assert ask(shared, "/nothing").status == 404
    refused = ask(shared, "/healthz", "POST", body=b"x")
    assert (refused.status, refused.one("allow")) == (405, "GET, HEAD")


def test_requests_beyond_the_limit_of_their_address_get_429(serve: Serve) -> None:
    server = serve(limits__public_requests_per_address=1)
    request = GET.replace(b"GET /", b"GET /healthz")
    last = request.replace(b"Host: a", b"Host: a\r\nConnection: close")
    received = exchange(server, 30 * request + last)
    refused = [answer for answer in received if answer.status == 429]
    assert [answer.status for answer in received[:2]] == [200, 200]
    assert refused
    assert refused[0].one("retry-after") == "1"
    assert b"too many requests" in refused[0].body
    assert server.server.state.request_limits.refused == {"public_requests_per_address": len(refused)}


# --- readiness -------------------------------------------------------------------------------------------


def ready(server: ServerThread) -> tuple[int, dict[str, Any]]:
    answer = ask(server, "/readyz")
    return answer.status, json.loads(answer.body)


def test_readyz_lists_its_checks(shared: ServerThread) -> None:
    status, found = ready(shared)
    assert status == 200
    assert (found["ready"], found["reasons"], found["warnings"]) == (True, [], [])
    assert found["checks"]["draining"] is False
    assert found["checks"]["store"] == "healthy"
    (certificate,) = found["checks"]["certificates"]
    assert certificate["key_type"] == "ecdsa-p256"
    assert 89 * 86_400 < certificate["seconds_left"] <= 90 * 86_400


def test_readyz_reports_an_expired_certificate(serve: Serve) -> None:
    server = serve(certificates__watch_interval="1h")
    server.clock.ahead_ms = 91 * 86_400_000
    status, found = ready(server)
    assert status == 503
    assert found["ready"] is False
    assert found["reasons"] == ["certificate: a serving certificate has expired"]


@pytest.mark.requirement("recovery")
def test_readyz_reports_an_unavailable_store(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    sessions = server.server.state.sessions
    monkeypatch.setattr(sessions, "statistics", lambda: {"state": "degraded"})
    status, found = ready(server)
    assert status == 503
    assert [reason.partition(":")[0] for reason in found["reasons"]] == ["store"]
    assert "known sessions continue" in found["reasons"][0]
    server.in_loop(server.server.state.registry.refuse_all)
    assert "every token is refused" in ready(server)[1]["reasons"][0]


def test_readyz_warns_of_a_misconfigured_store_and_stays_ready(serve: Serve) -> None:
    server = serve(store__url="sqlite")
    assert server.server.parts.store is not None
    server.server.parts.store.problems = ("appendonly is off",)
    status, found = ready(server)
    assert (status, found["ready"], found["reasons"]) == (200, True, [])
    assert found["warnings"] == ["store: appendonly is off"]


def test_readyz_reports_draining_in_the_last_response(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as busy, tls(server) as connection:
        busy.send(busy.request("sleep", {"ms": 3_600_000}))
        server.until(lambda: server.server.state.tasks.running == 1)
        connection.sendall(GET.replace(b"GET /", b"GET /readyz"))
        (before,) = answers(receive_one(connection))
        server.begin_drain(TIMEOUT)
        server.until(lambda: server.server.state.draining)
        connection.sendall(GET.replace(b"GET /", b"GET /readyz"))
        (after,) = answers(read_to_end(connection))
        busy.close()
    assert (before.status, before.closes) == (200, False)
    assert (after.status, after.closes) == (503, True)
    assert json.loads(after.body)["reasons"] == ["draining: the server is stopping"]
    server.join()


def receive_one(connection: ssl.SSLSocket) -> bytes:
    """Read one response with a Content-Length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65_536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65_536)
    return head + b"\r\n\r\n" + body


def add_waiting_route(server: ServerThread) -> asyncio.Event:
    """Add /wait, whose handler waits for the returned event."""
    gate = server.in_loop(asyncio.Event)

    async def wait(request: HttpRequest) -> HttpResponse:
        await gate.wait()
        return text_response(200, "waited")

    add(server, Route("GET", "/wait", wait))
    return gate


def test_drain_waits_for_http_handlers(serve: Serve) -> None:
    server = serve()
    gate = add_waiting_route(server)
    with tls(server) as waiting:
        waiting.sendall(GET.replace(b"GET /", b"GET /wait"))
        server.until(lambda: server.server.parts.http.endpoint.answering == 1)  # type: ignore[union-attr]
        server.begin_drain(TIMEOUT)
        server.until(lambda: server.server.state.draining)
        server.in_loop(gate.set)
        (answer,) = answers(read_to_end(waiting))
    assert (answer.body, answer.closes) == (b"waited\n", True)
    server.join()


def test_idle_http_connections_do_not_delay_shutdown(serve: Serve) -> None:
    server = serve()
    with tls(server) as idle, tls(server) as silent:
        idle.sendall(GET)
        receive_one(idle)
        silent.sendall(b"GET / HT")
        server.until(lambda: server.server.statistics()["http"]["connections"] == 2)
        server.begin_drain(TIMEOUT)
        assert read_to_end(idle) == b""
        assert read_to_end(silent) == b""
    server.join()


# --- which protocol --------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpn", [(), ("http/1.1",), ("h2", "http/1.1"), ("http/1.1", "h2", "http/1.0")])
def test_client_without_zcp_alpn_gets_http(shared: ServerThread, alpn: tuple[str, ...]) -> None:
    with tls(shared, alpn) as connection:
        assert connection.selected_alpn_protocol() == ("http/1.1" if alpn else None)
        connection.sendall(GET)
        assert answers(receive_one(connection))[0].status == 200


def test_zcp_alpn_is_preferred_over_http(shared: ServerThread) -> None:
    with tls(shared, ("http/1.1", "zcp/1")) as connection:
        assert connection.selected_alpn_protocol() == "zcp/1"
        connection.sendall(GET)
        assert b"HTTP/1.1" not in read_to_end(connection)


def test_zcp_frame_over_http_is_a_bad_request(shared: ServerThread) -> None:
    with shared.client() as client:
        frame = client.request("server.info")
    (answer,) = exchange(shared, frame)
    assert answer.status == 400


def test_disabled_http_refuses_its_alpn(serve: Serve) -> None:
    server = serve(http__enabled=False)
    with pytest.raises(ssl.SSLError, match=r"(?i)no.application.protocol"):
        tls(server)
    assert server.stats["http"] is None
    with server.client("ada") as client:
        client.echo()


# --- every response, each header once --------------------------------------------------------------------


@pytest.mark.requirement("hsts")
@pytest.mark.parametrize(
    ("status", "data"),
    [
        (200, b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"),
        (400, b"\0"),
        (400, b"GET / HTTP/1.1\nHost: a\n\n"),
        (404, b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"),
        (405, b"PUT / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"),
        (413, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n" + bytes(100_000)),
        (414, b"GET /" + b"x" * 20_000),
        (431, b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 20_000),
        (501, b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n"),
        (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    ],
)
def test_every_response_has_hsts_and_no_version(shared: ServerThread, status: int, data: bytes) -> None:
    with bystander(shared):
        (answer,) = exchange(shared, data)
    assert answer.status == status
    assert answer.closes
    names = [name for name, _ in answer.headers]
    assert len(names) == len(set(names))
    assert answer.one("strict-transport-security") == HSTS
    assert answer.one("x-frame-options") == "DENY"
    assert answer.all("server") == []


def test_native_clients_get_the_same_sts_policy(shared: ServerThread) -> None:
    policy = {"max_age": 31_536_000, "include_subdomains": True}
    assert json.loads(ask(shared, "/.well-known/zcp").body)["sts"] == policy
    with shared.client() as client:
        assert client.welcome.value["sts"] == policy


# --- time and limits -------------------------------------------------------------------------------------


def test_slow_request_head_times_out(serve: Serve) -> None:
    server = serve(loop_factory=asyncio.new_event_loop, limits__idle_timeout="1h")
    with bystander(server), tls(server) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n")
        server.in_loop(lambda: None)  # it reads what was sent
        server.advance(300)
        (answer,) = answers(read_to_end(connection))
    assert answer.status == 408
    assert answer.one("strict-transport-security") == HSTS


def test_silent_and_idle_connections_are_closed(serve: Serve) -> None:
    server = serve(loop_factory=asyncio.new_event_loop)
    with tls(server) as silent, tls(server) as idle:
        idle.sendall(GET)
        assert len(answers(receive_one(idle))) == 1
        server.advance(300)
        assert read_to_end(silent) == b""
        server.advance(3_600)
        assert read_to_end(idle) == b""
    server.until_left()


def test_pipelined_requests_are_answered_in_order(shared: ServerThread) -> None:
    paths = [*OPEN, "/nothing", *OPEN]
    data = b"".join(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode() for path in paths * 20)
    end = b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    with bystander(shared):
        found = exchange(shared, data + end)
    assert [answer.status for answer in found] == [
        404 if path == "/nothing" else 200 for path in paths * 20
    ] + [200]
    assert [answer.closes for answer in found] == [False] * len(paths) * 20 + [True]


def test_requests_per_connection_are_limited(shared: ServerThread) -> None:
    found = exchange(shared, GET.replace(b"GET /", b"GET /healthz") * 1_001)
    assert len(found) == 1_000
    assert [answer.closes for answer in found[-2:]] == [False, True]


def test_http_client_that_never_reads_is_disconnected(serve: Serve) -> None:
    server = serve(limits__write_timeout=0.5)
    add(server, Route("GET", "/big", lambda request: text_response(200, "x" * 1_000_000)))
    with bystander(server), tls(server) as connection:
        with contextlib.suppress(OSError):
            connection.settimeout(TIMEOUT)
            connection.sendall(GET.replace(b"GET /", b"GET /big") * 200)
        eventually(lambda: server.stats["http"]["write_timeouts"] == 1)
        assert server.stats["http"]["responses"]["200"] < 50
    server.until_left()


def test_late_reader_gets_all_responses_without_buffering(serve: Serve) -> None:
    server = serve()
    add(server, Route("GET", "/big", lambda request: text_response(200, "x" * 3_000_000)))
    big = GET.replace(b"GET /", b"GET /big")
    with bystander(server), tls(server) as connection:
        connection.sendall(big * 7 + big.replace(b"Host", b"Connection: close\r\nHost"))
        server.until(
            lambda: any(
                each._paused_since is not None for each in server.server.parts.http.endpoint.connections
            )
        )  # type: ignore[union-attr]
        made = server.stats["http"]["responses"]["200"]
        found = answers(read_to_end(connection))
    assert made < 8
    assert [len(answer.body) for answer in found] == [3_000_001] * 8
    assert [answer.closes for answer in found] == [False] * 7 + [True]


def test_http_connections_count_towards_the_limit(serve: Serve) -> None:
    server = serve(limits__connections_per_address=2)
    with tls(server), tls(server):
        server.until(lambda: server.server.statistics()["http"]["connections"] == 2)
        assert server.stats["tcp_connections"] == 2
        with pytest.raises((ssl.SSLError, ConnectionError)):
            tls(server)
    assert server.stats["refused_per_address"] == 1
    server.until_left()


def test_closed_http_connections_leave_nothing_behind(serve: Serve) -> None:
    server = serve()
    for _ in range(3):
        with tls(server) as closed:
            closed.sendall(GET)
            receive_one(closed)
            with contextlib.suppress(OSError):
                closed.unwrap()
        with tls(server) as cut:
            cut.sendall(b"GET / HTTP/1.1\r\n")
        with tls(server) as refused:
            refused.sendall(b"\0")
            read_to_end(refused)
    server.until_left()
    server.until(lambda: server.server.statistics()["http"]["connections"] == 0)


def test_http_connection_of_a_revoked_certificate_is_closed(serve: Serve) -> None:
    server = serve(tls__client_auth="optional")
    folder, now = server.home / "certs", datetime.now(UTC)
    good, bad = (
        client_ca.issue_client(folder, name, lifetime=timedelta(days=30), now=now) for name in ("good", "bad")
    )
    with tls(server) as first, tls(server, shows=good) as second, tls(server, shows=bad) as third:
        for connection in (first, second, third):
            connection.sendall(GET)
            assert answers(receive_one(connection))[0].status == 200
        client_ca.revoke_client(folder, name="bad", now=now)
        asyncio.run_coroutine_threadsafe(server.server.parts.certificates.check(), server.loop).result(
            TIMEOUT
        )
        assert read_to_end(third) == b""
        for connection in (first, second):
            connection.sendall(GET)
            assert answers(receive_one(connection))[0].status == 200


# --- handlers --------------------------------------------------------------------------------------------


async def broken_later(request: HttpRequest) -> HttpResponse:
    await asyncio.sleep(0)
    raise RuntimeError("a secret of ours")


def broken(request: HttpRequest) -> HttpResponse:
    raise RuntimeError("a secret of ours")


def unwritable(request: HttpRequest) -> HttpResponse:
    return text_response(200, "x", headers=(("X", "a\r\nb"),))


@pytest.mark.parametrize("handler", [broken, broken_later, unwritable])
def test_internal_error_is_500_with_only_an_incident_id(serve: Serve, handler: Any) -> None:
    server = serve()
    add(server, Route("GET", "/broken", handler))
    answer = ask(server, "/broken")
    assert answer.status == 500
    assert answer.closes
    assert answer.body.startswith(b"internal error, incident ")
    assert b"secret" not in answer.body
    assert answer.one("strict-transport-security") == HSTS
    assert ask(server, "/healthz").status == 200


def test_waiting_handler_blocks_only_its_connection(serve: Serve) -> None:
    server = serve()
    gate = add_waiting_route(server)
    with tls(server) as waiting:
        waiting.sendall(GET.replace(b"GET /", b"GET /wait") + GET.replace(b"GET /", b"GET /healthz"))
        server.until(lambda: server.server.parts.http.endpoint.answering == 1)  # type: ignore[union-attr]
        assert ask(server, "/healthz").status == 200
        server.in_loop(gate.set)
        first, second = receive_one(waiting), receive_one(waiting)
    assert answers(first)[0].body == b"waited\n"
    assert answers(second)[0].body == b"ok\n"


def test_handler_is_cancelled_with_its_connection(serve: Serve) -> None:
    server = serve()

    async def wait(request: HttpRequest) -> HttpResponse:
        await asyncio.Event().wait()
        raise AssertionError

    add(server, Route("GET", "/wait", wait))
    with tls(server) as waiting:
        waiting.sendall(GET.replace(b"GET /", b"GET /wait"))
        server.until(lambda: server.server.state.tasks.running == 1)
    server.until_left()
    assert server.server.parts.http is not None
    assert server.server.parts.http.endpoint.answering == 0


# --- other programs --------------------------------------------------------------------------------------


@pytest.fixture
def curl(shared: ServerThread) -> Any:
    program = shutil.which("curl")
    if program is None:
        pytest.skip("curl is not installed")

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [
                program,
                "-sS",
                "--max-time",
                "20",
                "--cacert",
                str(shared.home / "certs" / "ca.crt"),
                *arguments,
            ],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_curl_reads_all_resources_on_one_connection(shared: ServerThread, curl: Any) -> None:
    before = shared.stats["http"]["connections_opened"]
    out = curl(
        "-w",
        "%{http_code} %{num_connects} %{http_version}\n",
        "-o",
        "/dev/null",
        *(part for path in OPEN for part in (f"https://localhost:{shared.port}{path}", "-o", "/dev/null")),
    )
    assert out.split("\n")[:4] == ["200 1 1.1", "200 0 1.1", "200 0 1.1", "200 0 1.1"]
    assert shared.stats["http"]["connections_opened"] == before + 1


def test_curl_sends_bodies_of_every_kind(shared: ServerThread, curl: Any) -> None:
    url = f"https://localhost:{shared.port}/healthz"
    for arguments in (
        ["-d", "x" * 2_000],
        ["-d", "x" * 2_000, "-H", "Expect: 100-continue"],
        ["-d", "x" * 2_000, "-H", "Transfer-Encoding: chunked"],
        ["--http1.0", "-d", "x"],
        ["-I"],
        ["--no-alpn"],
    ):
        out = curl("-o", "/dev/null", "-w", "%{http_code}", *arguments, url)
        assert out == ("405" if "-d" in arguments else "200"), arguments


@pytest.mark.requirement("hsts")
def test_curl_remembers_hsts(shared: ServerThread, curl: Any, tmp_path: Any) -> None:
    curl("--hsts", str(tmp_path / "hsts"), f"https://localhost:{shared.port}/")
    kept = (tmp_path / "hsts").read_text()
    assert ".localhost" in kept


def test_plaintext_http_gets_400_on_the_tls_port(shared: ServerThread) -> None:
    with socket.create_connection(("127.0.0.1", shared.port), timeout=TIMEOUT) as raw:
        raw.sendall(GET)
        answer = b""
        while data := raw.recv(65_536):
            answer += data
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"Strict-Transport-Security" not in answer


# --- the edge of it, in the server's own loop --------------------------------------------------------------


def test_connection_during_drain_gets_one_response(serve: Serve) -> None:
    server = serve()
    side = server.server.parts.http
    assert side is not None
    server.in_loop(side.endpoint.drain)
    with tls(server) as connection:
        connection.sendall(GET)
        (answer,) = answers(read_to_end(connection))
    assert answer.status == 200
    assert answer.closes
    asyncio.run_coroutine_threadsafe(side.endpoint.wait_at_rest(), server.loop).result(TIMEOUT)


def test_handler_timeout_is_503(serve: Serve) -> None:
    server = serve(loop_factory=asyncio.new_event_loop)
    begun, ended = [], []

    async def wait(request: HttpRequest) -> HttpResponse:
        begun.append(request.path)
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(request.path)
        raise AssertionError

    add(server, Route("GET", "/wait", wait))
    with tls(server) as waiting:
        waiting.sendall(GET.replace(b"GET /", b"GET /wait"))
        eventually(lambda: begun)
        server.advance(HttpLimits().answer_timeout)
        (answer,) = answers(read_to_end(waiting))
    assert (answer.status, answer.closes) == (503, True)
    server.until_left()
    assert ended == ["/wait"]
