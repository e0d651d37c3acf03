"""Comparison with other servers: answers are checked, ratios and bars are right."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import stage
from bench.peers import environment as environment_module
from bench.peers import measure as module
from bench.peers.calls import COMPRESSING, OWN, PLAIN, measure_calls, run_caller
from bench.peers.clients import Client, GrpcClient, StreamsClient, UvicornClient, WebsocketsClient
from bench.peers.command import BARS, REQUEST, report
from bench.peers.environment import MARK, REQUIREMENTS, Environment
from bench.peers.measure import (
    GRPC,
    ITEM_NAMES,
    NAMES,
    STREAMS,
    UVICORN,
    WEBSOCKETS,
    ZCPROTO,
    Figures,
    Plan,
    Servers,
)
from zcproto.errors import ZcprotoError

QUICK = Plan(rounds=2, requests=50, connects=2, held=5, payload_bytes=64)


def figures(**times: float) -> Figures:
    """Each server's figures, the same in all rounds but for a disturbed one; zcproto's CPU is 20."""
    usual = {ZCPROTO: 20.0, STREAMS: 30.0, GRPC: 300.0, UVICORN: 60.0, WEBSOCKETS: 50.0, **times}
    made = Figures()
    for name in NAMES:
        cost = usual[name] / 1e6
        made.request_s[name] = [cost, cost * 10, cost]
        made.connect_s[name] = [cost * 50] * 3
    for name in ITEM_NAMES:
        made.item_s[name] = [usual[name] / (2e7 if name == ZCPROTO else 1e7)] * 3
    made.memory_kib = {ZCPROTO: 36.0, STREAMS: 280.0, GRPC: 54.0, UVICORN: 59.0, WEBSOCKETS: 64.0}
    return made


# --- what figures prove ------------------------------------------------------------------------------------


def test_ratios_are_taken_by_round() -> None:
    made = report(figures(), QUICK, {"grpcio": "1.99"})
    assert made.row("request_us_ratio", GRPC).value == pytest.approx(20 / 300)
    assert made.row("request_us", GRPC).value == pytest.approx(300)
    assert made.row("memory_kib_ratio", STREAMS).value == pytest.approx(36 / 280)
    assert "request_us_ratio" not in {row.key for row in made.columns[ZCPROTO]}
    assert made.reasons() == []
    assert any("grpcio 1.99" in note for note in made.notes)


@pytest.mark.parametrize("name", [GRPC, UVICORN, WEBSOCKETS, STREAMS])
def test_unmet_bar_is_named(name: str) -> None:
    most = BARS[REQUEST][name]
    assert report(figures(**{name: 20.0 / most * 1.01}), QUICK, {}).reasons() == []
    (why,) = report(figures(**{name: 20.0 / most * 0.99}), QUICK, {}).reasons()
    assert name in why


@pytest.mark.parametrize(("own", "of_sixteen", "missed"), [(44.0, 19.0, []), (46.0, 21.0, [1, 16])])
def test_call_has_a_bar_by_the_number_in_flight(own: float, of_sixteen: float, missed: list[int]) -> None:
    made = figures()
    others = {COMPRESSING: [50.0] * 3, PLAIN: [20.0] * 3}
    made.call_us = {1: {OWN: [own, 500.0, own], **others}, 16: {OWN: [of_sixteen] * 3, **others}}
    shown = report(made, QUICK, {})
    assert shown.row("call_1_us_ratio", WEBSOCKETS).value == pytest.approx(own / 50)
    assert shown.row("call_1_us_plain_ratio", WEBSOCKETS).value == pytest.approx(own / 20)
    assert shown.row("call_16_us_ratio", WEBSOCKETS).value == pytest.approx(of_sixteen / 50)
    for depth in (1, 16):
        assert shown.row(f"call_{depth}_us_ratio", WEBSOCKETS).holds == (depth not in missed)
    assert len(shown.reasons()) == len(missed)


# --- clients --------------------------------------------------------------------------------------------------


class ScriptedTransport:
    """A TLS connection with prepared answers, a byte at a time."""

    def __init__(self, answers: bytes) -> None:
        self.answers = io.BytesIO(answers)
        self.sent = b""

    def recv(self, size: int) -> bytes:
        return self.answers.read(1)

    def sendall(self, data: bytes) -> None:
        self.sent += data

    def close(self) -> None:
        self.sent += b"<closed>"


def client(
    kind: type[Client], answers: bytes, payload: bytes = b"payload"
) -> tuple[Client, ScriptedTransport]:
    tls: Any = ScriptedTransport(answers)
    return kind(tls, payload), tls


def asked(
    kind: type[Client], answers: bytes, payload: bytes = b"payload"
) -> tuple[Client, ScriptedTransport]:
    """Return a client that has sent a request and checked its answer."""
    made, tls = client(kind, answers, payload)
    made.send(made.request())
    made.check()
    return made, tls


def h2(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + body


GRPC_ANSWER = h2(1, 4, 1, b"\x88") + h2(0, 0, 1, b"\0\0\0\0\7payload") + h2(1, 5, 1, b"\xbf")
GOOD = [
    (StreamsClient, b"\0\0\0\7payload"),
    (UvicornClient, b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\npayload"),
    (WebsocketsClient, b"HTTP/1.1 101 Switching Protocols\r\n\r\n\x82\7payload"),
    (GrpcClient, h2(4, 0, 0, b"") + h2(6, 0, 0, b"12345678") + GRPC_ANSWER),
]


@pytest.mark.parametrize(("kind", "answers"), GOOD)
def test_equal_answer_is_accepted(kind: type[Client], answers: bytes) -> None:
    made, tls = asked(kind, answers)
    assert tls.answers.read() == b""
    made.close()
    assert tls.sent.endswith(b"<closed>")


WRONG = [
    *((kind, answers.replace(b"payload", b"paylord"), "a wrong answer") for kind, answers in GOOD),
    *((kind, answers[:-1], "has closed") for kind, answers in GOOD),
    (UvicornClient, b"HTTP/1.1 500 Oh\r\n\r\n", "500"),
    (WebsocketsClient, b"HTTP/1.1 426 Upgrade Required\r\n\r\n", "426"),
    (WebsocketsClient, b"HTTP/1.1 101 S\r\n\r\n\x88\0", "0x88"),
    (GrpcClient, h2(7, 0, 0, b"enough"), "enough"),
    (GrpcClient, h2(3, 0, 1, b"reset"), "reset"),
]


@pytest.mark.parametrize(("kind", "answers", "expected"), WRONG)
def test_wrong_answer_refusal_and_closed_connection_are_errors(
    kind: type[Client], answers: bytes, expected: str
) -> None:
    with pytest.raises(ZcprotoError, match=expected):
        asked(kind, answers)


# --- measured -------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, certs: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    shutil.copytree(certs, home / "certs")
    return home


@pytest.fixture
def servers(home: Path, tmp_path: Path) -> Servers:
    """Their environment is this one: it has the standard library, which is all that streams need."""
    here = Environment(tmp_path / "environment")
    here.python = Path(sys.executable)
    return Servers(home, here, QUICK)


def test_two_servers_are_measured_side_by_side(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NAMES", (ZCPROTO, STREAMS))
    monkeypatch.setattr(stage, "SETTLE_S", 0.05)
    lines: list[str] = []
    found = module.measure(servers, QUICK, lines.append)
    for name in (ZCPROTO, STREAMS):
        assert len(found.request_s[name]) == len(found.connect_s[name]) == QUICK.rounds
        assert min(found.request_s[name] + found.connect_s[name]) > 0
        assert found.suites[name] == "TLS_AES_256_GCM_SHA384"
    assert len(found.item_s[ZCPROTO]) == QUICK.rounds
    assert min(found.item_s[ZCPROTO]) > 0
    assert found.memory_kib.keys() == {ZCPROTO, STREAMS}
    assert any("round 2 of 2" in line for line in lines)


def test_calls_of_a_client_are_measured_in_slices(home: Path, servers: Servers, tmp_path: Path) -> None:
    with servers.run(ZCPROTO) as server:
        arguments = [str(server.port), str(servers.ca_file), *servers.user, "64"]
        log = tmp_path / "log"
        with run_caller("zcproto", sys.executable, "zcproto_client", arguments, log) as caller:
            found = measure_calls((caller, caller), 1)
    assert {depth: len(by_client["zcproto"]) for depth, by_client in found.items()} == {1: 2, 16: 2}
    assert min(found[1]["zcproto"] + found[16]["zcproto"]) > 0


def write_program(file: Path, script: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o700)


def test_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Python is a program that appends its arguments to a file."""
    calls, folder = tmp_path / "calls", tmp_path / "one"

    def create(folder: Path, **options: Any) -> None:
        write_program(folder / "bin" / "python", f'echo "$*" >> {calls}')

    monkeypatch.setattr(environment_module.venv, "create", create)
    environment = Environment(folder)
    with pytest.raises(ZcprotoError, match="No such file"):
        environment.versions()
    for _ in range(2):
        Environment(folder).prepare(lambda line: None)
    (call,) = calls.read_text().splitlines()
    assert set(REQUIREMENTS) <= set(call.split())
    (folder / MARK).write_text("{broken off")
    Environment(folder).prepare(lambda line: None)
    assert calls.read_text().splitlines() == [call, call]
    write_program(environment.python, "echo no such package >&2; exit 1")
    with pytest.raises(ZcprotoError, match="no such package"):
        environment.versions()
