"""The redirecting port without TLS: redirects, refusals, limits."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Any

import pytest

from bench.server_process import free_port
from tests.http.helpers import Answer, answers
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import ServerThread, eventually, read_to_end
from zcproto.admin.https import MAX_REDIRECT_CONNECTIONS, PER_ADDRESS, Redirects, has_name, host_of
from zcproto.errors import ConfigError
from zcproto.http.messages import HttpRequest, HttpResponse
from zcproto.server.request_limits import RequestSettings

NAMES = ("localhost", "a.example", "*.b.example", "Mixed.Example", "127.0.0.1", "::1")


def find(
    host: str | None, path: str = "/", method: str = "GET", port: int = 7443, **headers: str
) -> HttpResponse:
    fields = headers if host is None else {"host": host, **headers}
    path, _, query = path.partition("?")
    return Redirects(lambda: NAMES, port).find(HttpRequest(method, path, query, fields))


def location(answer: HttpResponse) -> str:
    assert answer.status == 308
    ((name, value),) = answer.headers
    assert name == "Location"
    return value


@pytest.mark.parametrize(
    ("host", "path", "expected"),
    [
        ("localhost", "/", "https://localhost:7443/"),
        ("LOCALHOST:80", "/x?y=1&z", "https://localhost:7443/x?y=1&z"),
        ("a.example.", "/", "https://a.example:7443/"),
        ("x.b.example", "/", "https://x.b.example:7443/"),
        ("mixed.example", "/", "https://mixed.example:7443/"),
        ("127.0.0.1:8080", "/", "https://127.0.0.1:7443/"),
        ("[0:0:0:0:0:0:0:1]:80", "/", "https://[::1]:7443/"),
        ("localhost", "//evil.example/", "https://localhost:7443//evil.example/"),
        ("localhost", "/\\evil.example", "https://localhost:7443/\\evil.example"),
    ],
)
def test_get_is_redirected_to_the_same_path_over_https(host: str, path: str, expected: str) -> None:
    assert location(find(host, path)) == expected
    assert location(find(host, path, "HEAD")) == expected


def test_challenge_of_a_ca_is_answered_for_any_name() -> None:
    texts = {"a-token": b"a-token.thumbprint"}
    redirects = Redirects(lambda: NAMES, 7443, texts.get)

    def answer(path: str, method: str = "GET", **headers: str) -> HttpResponse:
        return redirects.find(HttpRequest(method, path, "", {"host": "unknown.example", **headers}))

    found = answer("/.well-known/acme-challenge/a-token")
    assert (found.status, found.body) == (200, b"a-token.thumbprint")
    assert answer("/.well-known/acme-challenge/another").status == 421
    assert answer("/.well-known/acme-challenge/").status == 421
    assert answer("/.well-known/acme-challenge/a-token", "POST").status == 403
    assert answer("/.well-known/acme-challenge/a-token", cookie="a=b").status == 403


def test_default_https_port_is_omitted_from_the_location() -> None:
    assert location(find("localhost", port=443)) == "https://localhost/"


@pytest.mark.parametrize(
    "host",
    [
        *(
            None,
            "",
            ":80",
            "evil.example",
            "localhost.evil.example",
            "b.example",
            "x.y.b.example",
            "*.b.example.x",
        ),
        *(
            "192.0.2.1",
            "[::2]",
            "[",
            "localhost,evil.example",
            "127.1",
            "example",
        ),
    ],
)
def test_unknown_host_is_421(host: str | None) -> None:
    assert find(host).status == 421


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_methods_other_than_get_and_head_are_refused(method: str) -> None:
    assert find("localhost", method=method).status == 403


@pytest.mark.parametrize("name", ["authorization", "cookie", "proxy-authorization"])
def test_credentials_in_plaintext_are_refused_with_a_warning(name: str) -> None:
    answer = find("localhost", **{name: "Bearer x"})
    assert answer.status == 403
    assert b"revoke" in answer.body


def test_host_header_is_normalized() -> None:
    assert host_of("A.Example.:80") == "a.example"
    assert host_of("[::0001]") == "::1"
    assert host_of("[::1") is None
    assert host_of("") is None
    assert has_name(NAMES, "::1")
    assert not has_name(["*.b.example"], "b.example")


# --- on a whole server -----------------------------------------------------------------------------------


@pytest.fixture
def server(serve: Serve) -> ServerThread:
    while True:
        try:
            return serve(http__redirect_port=free_port())
        except ConfigError as error:
            if "cannot listen" not in str(error):  # otherwise another process took the port
                raise


@pytest.fixture
def port(server: ServerThread) -> int:
    return int(server.server.config.http.redirect_port)


def plain(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)


def exchange(port: int, data: bytes) -> Answer:
    with plain(port) as connection:
        connection.sendall(data)
        received, how = read_to_end(connection)
    assert how == "FIN"
    (answer,) = answers(received)
    return answer


def test_redirect_has_no_hsts_and_closes_the_connection(server: ServerThread, port: int) -> None:
    for data, status in (
        (b"GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n", 308),
        (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\nx", 403),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n", 413),
        (b"GET / HTTP/1.1\nHost: localhost\n\n", 400),
        (b"\x16\x03\x01\x00\x05hello", 400),
    ):
        answer = exchange(port, data)
        assert answer.status == status
        assert answer.closes
        assert answer.all("strict-transport-security") == []
        assert answer.one("x-content-type-options") == "nosniff"
        if status == 308:
            assert answer.one("location") == f"https://localhost:{server.port}/x"
    assert server.stats["http"]["redirect"]["responses"] == {"308": 1, "400": 2, "403": 1, "413": 1, "421": 1}


def test_second_request_is_not_read(server: ServerThread, port: int) -> None:
    request = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert exchange(port, request * 50).status == 308


def test_requests_count_for_the_limit_of_their_address(server: ServerThread, port: int) -> None:
    limits = server.server.state.request_limits
    server.in_loop(lambda: limits.reconfigure(RequestSettings(public_per_address=1)))
    request = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert exchange(port, request).status == 308
    assert any(exchange(port, request).status == 429 for _ in range(50))


def test_response_survives_further_input(server: ServerThread, port: int) -> None:
    with plain(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000\r\n\r\n")
        connection.sendall(b"x" * 60_000)
        received, how = read_to_end(connection)
    assert how == "FIN"
    assert answers(received)[0].status == 413


def test_endless_input_is_reset(server: ServerThread, port: int) -> None:
    with plain(port) as connection:
        connection.sendall(b"\0")
        with pytest.raises(OSError):  # noqa: PT011 - reset, or a broken pipe
            connection.sendall(bytes(100_000_000))


def test_client_that_never_closes_is_reset(server: ServerThread, port: int) -> None:
    with plain(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        read_to_end(connection)
        eventually(lambda: server.stats["http"]["redirect"]["connections"] == 0)
    server.until_left()


def test_connections_per_address_are_limited(server: ServerThread, port: int) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(PER_ADDRESS):
            stack.enter_context(plain(port))
        server.until(lambda: server.server.statistics()["http"]["redirect"]["connections"] == PER_ADDRESS)
        with plain(port) as refused:
            assert read_to_end(refused)[0] == b""
        assert server.stats["http"]["redirect"]["refused"] == 1
        assert PER_ADDRESS < MAX_REDIRECT_CONNECTIONS
    server.until(lambda: server.server.statistics()["http"]["redirect"]["connections"] == 0)
    assert exchange(port, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").status == 308


def test_redirect_port_closes_with_the_server(server: ServerThread, port: int) -> None:
    with plain(port) as silent, plain(port) as half, plain(port) as lingering:
        half.sendall(b"GET / HTTP/1.1\r\n")
        lingering.sendall(b"\0")
        assert read_to_end(lingering)[0].startswith(b"HTTP/1.1 400 ")
        server.until(lambda: server.server.statistics()["http"]["redirect"]["connections"] >= 2)
        server.drain(5.0)
        assert read_to_end(silent)[0] == read_to_end(half)[0] == b""
    with pytest.raises(ConnectionRefusedError):
        plain(port)


def test_reset_connection_leaves_nothing_behind(server: ServerThread, port: int) -> None:
    connection = plain(port)
    connection.sendall(b"GET / HT")
    server.until(lambda: server.server.statistics()["http"]["redirect"]["connections"] == 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    server.until(lambda: server.server.statistics()["http"]["redirect"]["connections"] == 0)
    server.until_left()


def test_redirect_port_in_use_is_a_config_error(serve: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as raised:
            serve(http__redirect_port=port)
    (fault,) = raised.value.faults
    assert f"http.redirect_port = {port}: cannot listen" in fault


def test_curl_follows_the_redirect(server: ServerThread, port: int) -> Any:
    import shutil
    import subprocess

    program = shutil.which("curl")
    if program is None:
        pytest.skip("curl is not installed")
    ca = str(server.home / "certs" / "ca.crt")
    done = subprocess.run(
        [program, "-sSL", "--max-time", "20", "--cacert", ca, f"http://localhost:{port}/healthz"],
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.stdout == b"ok\n", done.stderr
