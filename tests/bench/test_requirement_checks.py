"""Checks of requirements: a server of ours passes them, and one that does otherwise does not."""

from __future__ import annotations

import io
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

from bench.requirements import http_checks, operation_checks, session_checks, tls_checks
from bench.requirements.finding import Finding, Verdict
from bench.requirements.hello import (
    HANDSHAKE_FAILURE,
    NO_APPLICATION_PROTOCOL,
    PROTOCOL_VERSION,
    TLS_1_2,
    TLS_1_3,
    Answer,
    ask,
    client_hello,
)
from bench.requirements.homes import House, Served, Workshop, make_own, parse_response
from bench.requirements.run import Fill, Run, steps_of
from bench.requirements.sizes import QUICK
from zcproto.certs import authority
from zcproto.common.home import Home
from zcproto.errors import ZcprotoError

TINY = replace(
    QUICK,
    handshakes=5,
    connections=20,
    load_s=0.5,
    tokens=300,
    checks=300,
    loads=3,
    responses=200,
    rotations=2,
    rotation_rest_s=0.5,
    rotation_connections=5,
    payload_requests=20,
    opened=8,
)
FIGURES = {"tokens", "parts", "handshakes", "payloads", "connections", "rotation"}
"""Steps whose rows are figures: on a machine that is busy they may miss their target."""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default certificates. The authority has 2048 bits, as 4096 take a second to make."""
    folder = tmp_path_factory.mktemp("requirements") / "certs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authority, "KEY_TYPE", "rsa-2048")
        make_own(folder, datetime.now(UTC))
    return folder


STEPS = [step.name for step in steps_of(Workshop(Path()), Run(TINY), Console(file=io.StringIO()))]


@pytest.mark.parametrize("name", STEPS)
def test_a_server_of_ours_passes(
    name: str, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authority, "KEY_TYPE", "rsa-2048")
    run, out = Run(TINY), Console(file=io.StringIO(), width=200)
    step = next(each for each in steps_of(Workshop(tmp_path, own), run, out) if each.name == name)
    fill = Fill(out)
    with fill.failing_for(step.keys):
        step.act(fill)
    assert fill.reasons == {}
    assert set(fill.found) == set(step.keys)
    for key, finding in fill.found.items():
        assert finding is not None, key
        if name not in FIGURES:
            assert finding.verdict is Verdict.PASS, (key, finding.figure)
        else:
            assert finding.small, key
            assert finding.values, key


Check = Callable[[Served, House], Finding]


def per_user(served: Served, house: House) -> Finding:
    return session_checks.per_user(served, house, served, house)


def refresh(served: Served, house: House) -> Finding:
    return session_checks.refresh(served, house, served, house)


def hsts(served: Served, house: House) -> Finding:
    return http_checks.hsts(served)


# --- servers that do otherwise ----------------------------------------------------------------------------


@contextmanager
def other_server(own: Path, context: ssl.SSLContext, answer: bytes = b"") -> Iterator[Served]:
    """A server by Python's own TLS, which answers every request with these bytes."""
    context.load_cert_chain(own / "server-ecdsa.crt", own / "server-ecdsa.key")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                raw, _ = listener.accept()
            except OSError:  # the test is over
                return
            try:
                with context.wrap_socket(raw, server_side=True) as tls:
                    if tls.recv(65_536) and answer:
                        tls.sendall(answer)
                        tls.shutdown(socket.SHUT_WR)
                        while tls.recv(65_536):  # else what it did not read would cost its answer
                            pass
            except OSError:  # that one did not go on with its handshake
                raw.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield Served(Home(own.parent), listener.getsockname()[1], 0)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def stock() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)


def test_a_server_with_tls_1_2_is_found_out(own: Path) -> None:
    context = stock()
    context.set_alpn_protocols(["zcp/1"])
    with other_server(own, context) as served:
        finding = tls_checks.tls_version(served)
    assert finding.verdict is Verdict.FAIL
    assert "TLS 1.2 alone is refused by alert 70" in finding.figure


def test_a_server_with_another_suite_is_found_out(own: Path) -> None:
    with other_server(own, stock()) as served:
        finding = tls_checks.cipher_suites(served)
    assert finding.verdict is Verdict.FAIL
    assert "TLS_AES_128_GCM_SHA256 alone is refused by alert 40" in finding.figure


def test_a_server_that_gives_tickets_is_found_out(own: Path) -> None:
    with other_server(own, stock(), b"x") as served, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tls_checks, "_tickets", _tickets_after_a_request)
        finding = tls_checks.forward_secrecy(served)
    assert finding.verdict is Verdict.FAIL
    assert "tickets given in a whole handshake: 1 instead of 0" in finding.figure


def _tickets_after_a_request(served: Served) -> int:
    """That of the check waits for a greeting, which this server has none of."""
    with (
        socket.create_connection(("127.0.0.1", served.port), 30) as raw,
        served.context().wrap_socket(raw, server_hostname="localhost") as tls,
    ):
        tls.sendall(b"x")
        tls.recv(1)
        session = tls.session
        return int(session is not None and session.has_ticket)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"Strict-Transport-Security: max-age=0\r\n",
        b"Strict-Transport-Security: max-age=31536000\r\n" * 2,
        b"Strict-Transport-Security: includeSubDomains\r\n",
    ],
    ids=["none", "another age", "twice", "no age"],
)
def test_a_response_without_hsts_as_demanded_is_found_out(own: Path, header: bytes) -> None:
    answer = b"HTTP/1.1 200 OK\r\n" + header + b"Content-Length: 0\r\nConnection: close\r\n\r\n"
    with other_server(own, stock(), answer) as served:
        finding = http_checks.hsts(served)
    assert finding.verdict is Verdict.FAIL
    assert [fact.right for fact in finding.facts if fact.what == "health (200)"] == [False], finding.facts


@pytest.mark.parametrize(
    ("config", "check", "wrong"),
    [
        ("[freshness]\ntolerance = '10m'\n", session_checks.replays, "a frame a minute late"),
        ("[sessions]\nper_user = 7\n", per_user, "sessions by default: 7 instead of 5"),
        ("[sessions]\nrefresh = false\n", refresh, "it is another token"),
        ("[http]\nhsts_max_age_seconds = 60\n", hsts, "health (200)"),
        ("[http]\nhsts = false\n", hsts, "health (200)"),
    ],
)
def test_a_server_that_is_configured_otherwise_is_found_out(
    config: str, check: Check, wrong: str, own: Path, tmp_path: Path
) -> None:
    workshop = Workshop(tmp_path, own)
    house = workshop.house("otherwise", config, sessions=50)
    with house.serve() as served:
        finding = check(served, house)
    assert finding.verdict is Verdict.FAIL
    named = [fact.what for fact in finding.facts if not fact.right]
    assert any(wrong.partition(":")[0] in what for what in named), finding.facts
    assert wrong in f"{finding.figure} {named}"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("max-age=31536000; includeSubDomains", 31_536_000),
        ('includeSubDomains; Max-Age="5"', 5),
        ("x-max-age=5", None),
        ("max-age=5x", None),
    ],
)
def test_the_age_is_read_as_a_browser_does(value: str, seconds: int | None) -> None:
    assert http_checks.max_age(value) == seconds


def test_secrets_in_a_log_are_found(own: Path, tmp_path: Path) -> None:
    house = Workshop(tmp_path, own).house("leaky", sessions=50)
    with house.serve() as served:
        log = house.home.path / "server.log"
        with log.open("ab") as file:
            file.write(b'{"event": "x", "level": "x", "timestamp": "%b"}\n' % house.users[0].key.encode())
        finding = operation_checks.logs(served, house)
    assert finding.verdict is Verdict.FAIL
    assert "secrets in the log" in finding.figure


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1", b"HTTP/1.1 abc\r\n\r\n", b"\x15\x03\x03"])
def test_what_is_no_response_is_not_taken_for_one(data: bytes) -> None:
    with pytest.raises(ZcprotoError, match="no HTTP response"):
        parse_response(data)


# --- hellos -----------------------------------------------------------------------------------------------


def test_a_server_hello_is_read(own: Path) -> None:
    with other_server(own, stock()) as served:
        answer = ask(served.port, client_hello(suites=(0x1303,)))
        old = ask(served.port, client_hello((TLS_1_2,), (0xC02B,)))
    assert (answer.version, answer.suite, answer.retry) == (TLS_1_3, 0x1303, False)
    assert answer.key_share is not None
    assert len(answer.key_share) == 32
    assert (old.version, old.suite, old.key_share) == (TLS_1_2, 0xC02B, None)


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b"", Answer()),
        (b"\x15\x03\x03\x00\x02\x02\x28", Answer(alert=HANDSHAKE_FAILURE)),
        (b"\x15\x03\x03\x00\x02\x02\x46", Answer(alert=PROTOCOL_VERSION)),
        (b"\x15\x03\x03\x00\x02\x02\x78", Answer(alert=NO_APPLICATION_PROTOCOL)),
        (b"\x15\x03\x03\x00\x02\x02", Answer(plain=b"\x15\x03\x03\x00\x02\x02")),
        (b"HTTP/1.1 400 \r\n", Answer(plain=b"HTTP/1.1 400 \r\n")),
    ],
)
def test_what_comes_in_the_clear_is_told_apart(data: bytes, answer: Answer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(65_536)
                peer.sendall(data)

        thread = threading.Thread(target=serve)
        thread.start()
        assert ask(listener.getsockname()[1], client_hello()) == answer
        thread.join()
