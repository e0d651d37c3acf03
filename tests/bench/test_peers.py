"""The comparison with others: that answers are checked, ratios are right, and what is needed is told."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.peers import __main__ as program
from bench.peers import environment as environment_module
from bench.peers import measure as module
from bench.peers.clients import Client, GrpcClient, StreamsClient, UvicornClient, WebsocketsClient
from bench.peers.environment import MARK, REQUIREMENTS, Environment, default_folder
from bench.peers.measure import GRPC, NAMES, STREAMS, UVICORN, WEBSOCKETS, ZCPROTO, Figures, Plan, Servers
from bench.peers.outcome import BARS, MEMORY, NOTES, REQUEST, UNITS, Row, reasons, rows
from bench.peers.plot import write_plot
from zcproto.common.home import Home
from zcproto.errors import ConfigError, ZcprotoError
from zcproto.load.demo.server import DemoServer

QUICK = Plan(rounds=2, requests=50, connects=2, held=5, payload_bytes=64)


def figures(**times: float) -> Figures:
    """Each server's figures, the same in all rounds but for a disturbed one; zcproto's CPU is 20."""
    usual = {ZCPROTO: 20.0, STREAMS: 30.0, GRPC: 300.0, UVICORN: 60.0, WEBSOCKETS: 50.0, **times}
    made = Figures()
    for name in NAMES:
        cost = usual[name] / 1e6
        made.request_s[name] = [cost, cost * 10, cost]
        made.connect_s[name] = [cost * 50] * 3
    made.memory_kib = {ZCPROTO: 36.0, STREAMS: 280.0, GRPC: 54.0, UVICORN: 59.0, WEBSOCKETS: 64.0}
    return made


def row(found: list[Row], figure: str, name: str) -> Row:
    (one,) = (each for each in found if (each.figure, each.name) == (figure, name))
    return one


# --- what figures prove ------------------------------------------------------------------------------------


def test_ratios_are_those_of_rounds() -> None:
    found = rows(figures())
    grpc = row(found, REQUEST, GRPC)
    assert grpc.ratio == pytest.approx(20 / 300)
    assert grpc.value == pytest.approx(300)
    assert row(found, REQUEST, ZCPROTO).ratio is None
    assert row(found, MEMORY, STREAMS).ratio == pytest.approx(36 / 280)
    assert reasons(found) == []


@pytest.mark.parametrize("name", [GRPC, UVICORN, WEBSOCKETS, STREAMS])
def test_a_bar_that_is_not_met_is_told(name: str) -> None:
    most = BARS[REQUEST][name]
    assert reasons(rows(figures(**{name: 20.0 / most * 1.01}))) == []
    (why,) = reasons(rows(figures(**{name: 20.0 / most * 0.99})))
    assert name in why


def test_memory_has_bars() -> None:
    made = figures()
    made.memory_kib |= {ZCPROTO: 60.0}
    assert [each.name for each in rows(made) if not each.holds] == [STREAMS, GRPC, UVICORN]


def test_memory_may_be_left_out() -> None:
    made = figures()
    made.memory_kib = {}
    assert {each.figure for each in rows(made)} == UNITS.keys() - {MEMORY}


def test_what_is_not_the_same_is_told_of_each_figure() -> None:
    assert all(NOTES[name].keys() == UNITS.keys() for name in NAMES)


# --- clients --------------------------------------------------------------------------------------------------


class Scripted:
    """A TLS connection that answers what it was told to, a byte at a time."""

    def __init__(self, answers: bytes) -> None:
        self.answers = io.BytesIO(answers)
        self.sent = b""

    def recv(self, size: int) -> bytes:
        return self.answers.read(1)

    def sendall(self, data: bytes) -> None:
        self.sent += data

    def close(self) -> None:
        self.sent += b"<closed>"


def client(kind: type[Client], answers: bytes, payload: bytes = b"payload") -> tuple[Any, Scripted]:
    made: Any = kind.__new__(kind)
    made.tls = Scripted(answers)
    made.payload = payload
    made._rest = b""
    made._open()
    return made, made.tls


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
def test_an_answer_that_is_what_was_sent_is_taken(kind: type[Client], answers: bytes) -> None:
    made, tls = client(kind, answers)
    made.send(made.request())
    made.check()
    assert made._rest == b""
    assert tls.answers.read() == b""
    made.close()
    assert tls.sent.endswith(b"<closed>")


@pytest.mark.parametrize(("kind", "answers"), GOOD)
def test_a_wrong_answer_is_none(kind: type[Client], answers: bytes) -> None:
    made, _ = client(kind, answers.replace(b"payload", b"paylord"))
    made.send(made.request())
    with pytest.raises(ZcprotoError, match="a wrong answer"):
        made.check()


@pytest.mark.parametrize(("kind", "answers"), GOOD)
def test_a_server_that_has_closed_is_told(kind: type[Client], answers: bytes) -> None:
    made, _ = client(kind, answers[:-1])
    made.send(made.request())
    with pytest.raises(ZcprotoError, match="has closed"):
        made.check()


@pytest.mark.parametrize(
    ("kind", "answers", "said"),
    [
        (UvicornClient, b"HTTP/1.1 500 Oh\r\n\r\n", "500"),
        (WebsocketsClient, b"HTTP/1.1 101 S\r\n\r\n\x88\0", "0x88"),
        (GrpcClient, h2(7, 0, 0, b"enough"), "enough"),
        (GrpcClient, h2(3, 0, 1, b"reset"), "reset"),
    ],
)
def test_a_refusal_is_told(kind: type[Client], answers: bytes, said: str) -> None:
    made, _ = client(kind, answers)
    made.send(made.request())
    with pytest.raises(ZcprotoError, match=said):
        made.check()


def test_websockets_must_take_the_upgrade() -> None:
    with pytest.raises(ZcprotoError, match="426"):
        client(WebsocketsClient, b"HTTP/1.1 426 Upgrade Required\r\n\r\n")


def test_grpc_acknowledges_what_asks_for_it() -> None:
    made, tls = client(*GOOD[3])
    made.send(made.request())
    first = tls.sent
    made.check()
    assert tls.sent[len(first) :] == h2(4, 1, 0, b"") + h2(6, 1, 0, b"12345678")


def test_grpc_names_fields_once() -> None:
    made, tls = client(GrpcClient, GRPC_ANSWER)
    made.send(made.request())
    made.check()
    assert b"/peer.Echo/Echo" in tls.sent
    before = len(tls.sent)
    made.send(made.request())
    assert tls.sent[before:] == h2(1, 4, 3, b"\x83\x87\xc1\xc0\xbf\xbe") + h2(0, 1, 3, b"\0\0\0\0\7payload")


@pytest.mark.parametrize("size", [1, 125, 126, 16_000])
def test_websockets_masks_what_it_sends(size: int) -> None:
    payload = bytes(number % 251 for number in range(size))
    head = b"HTTP/1.1 101 S\r\n\r\n"
    length = bytes((size,)) if size < 126 else b"\x7e" + size.to_bytes(2, "big")
    made, tls = client(WebsocketsClient, head + b"\x82" + length + payload, payload)
    before = len(tls.sent)
    made.send(made.request())
    frame = tls.sent[before:]
    assert frame[0] == 0x82
    assert frame[1] & 0x80
    at = 2 if size < 126 else 4
    mask, masked = frame[at : at + 4], frame[at + 4 :]
    assert bytes(each ^ mask[number % 4] for number, each in enumerate(masked)) == payload
    made.check()


# --- measured -------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path) -> Environment:
    """An environment that is this one: it has the standard library, which is all that streams need."""
    made = Environment(tmp_path / "environment")
    made.python = Path(sys.executable)
    return made


@pytest.fixture
def servers(tmp_path: Path, certs: Path, here: Environment) -> Servers:
    home = Home(tmp_path / "home")
    home.path.mkdir(mode=0o700)
    made = Servers(home, here, QUICK)
    home.certs.symlink_to(certs)
    return made


def test_two_servers_are_measured(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NAMES", (ZCPROTO, STREAMS))
    monkeypatch.setattr(module, "SETTLE_S", 0.05)
    said: list[str] = []
    found = module.measure(servers, QUICK, said.append)
    for name in (ZCPROTO, STREAMS):
        assert len(found.request_s[name]) == len(found.connect_s[name]) == QUICK.rounds
        assert min(found.request_s[name] + found.connect_s[name]) > 0
        assert found.suites[name] == "TLS_AES_256_GCM_SHA384"
    assert found.memory_kib.keys() == {ZCPROTO, STREAMS}
    assert any("round 2 of 2" in line for line in said)


def test_a_server_that_does_not_start_says_why(servers: Servers) -> None:
    servers._certificate = (Path("/nowhere.crt"), Path("/nowhere.key"))
    with pytest.raises(ZcprotoError, match=r"did not start.*FileNotFoundError"), servers.run(STREAMS):
        pass


# --- the environment ------------------------------------------------------------------------------------------


def test_the_environment_is_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_folder() == Path(f"/cache/zcproto/peers-{sys.version_info[0]}.{sys.version_info[1]}")


def test_the_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(environment_module.venv, "create", lambda folder, **options: made.append(folder))
    monkeypatch.setattr(Environment, "_run", lambda self, *words: ran.append(words) or "")
    folder = tmp_path / "one"
    for _ in range(2):
        Environment(folder).prepare(lambda line: None)
    assert made == [folder]
    assert set(REQUIREMENTS) <= set(ran[0])
    (folder / MARK).write_text("{broken off")
    Environment(folder).prepare(lambda line: None)
    assert made == [folder, folder]


def test_an_environment_that_cannot_be_made_is_told(tmp_path: Path, here: Environment) -> None:
    with pytest.raises(ZcprotoError, match="no_such_thing"):
        here._run("-c", "import no_such_thing")
    with pytest.raises(ZcprotoError, match="No such file"):
        Environment(tmp_path)._run("-c", "")


# --- the program ----------------------------------------------------------------------------------------------


class Installed:
    """An environment that is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self, say: Any) -> None:
        say("ready")

    def versions(self) -> dict[str, str]:
        return {"grpcio": "1.99"}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Figures]:
    """Has the program measure nothing, and find these figures."""
    found = [figures()]
    monkeypatch.setattr(program, "Environment", Installed)
    monkeypatch.setattr(program, "measure", lambda servers, plan, say: found[0])
    monkeypatch.setattr(DemoServer, "__enter__", lambda self: self)
    monkeypatch.setattr(DemoServer, "__exit__", lambda self, *error: None)
    return found


def test_the_report(measured: list[Figures], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file, plot = tmp_path / "peers.json", tmp_path / "peers.png"
    assert program.main(["--connections", "100", "--json", str(json_file), "--plot", str(plot)]) == 0
    said = capsys.readouterr().out
    assert "passed: every bar is met" in said
    assert "grpcio 1.99" in said
    assert said.count("pass ") >= 7
    told = json.loads(json_file.read_text())
    assert told["reasons"] == []
    assert {each["name"] for each in told["rows"]} == set(NAMES)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_bar_that_is_not_met_is_the_exit_code(
    measured: list[Figures], capsys: pytest.CaptureFixture[str]
) -> None:
    measured[0] = figures(**{UVICORN: 30.0})
    assert program.main(["--connections", "100"]) == 1
    assert "failed: request_us" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError(["too few files"]), 2), (ZcprotoError("wrong"), 1), (KeyboardInterrupt(), 130)],
)
def test_what_cannot_be_measured(
    measured: list[Figures], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fail(*arguments: Any) -> Figures:
        raise error

    monkeypatch.setattr(program, "measure", fail)
    assert program.main(["--connections", "100"]) == code


@pytest.mark.parametrize("words", [["--connections", "-1"], ["--payload", "16001"], ["--rounds", "0"]])
def test_options_have_bounds(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        program.main(words)
    assert caught.value.code == 2
    capsys.readouterr()


def test_a_plot_without_memory(tmp_path: Path) -> None:
    made = figures()
    made.memory_kib = {}
    write_plot(tmp_path / "peers.svg", rows(made), QUICK)
    assert b"<svg" in (tmp_path / "peers.svg").read_bytes()


def test_a_table_that_is_narrow_keeps_its_figures() -> None:
    out = io.StringIO()
    with contextlib.closing(out):
        program.show(rows(figures()), QUICK, {}, {}, Console(file=out, width=100))
        said = out.getvalue()
    assert "300.0 us" in said
    assert "0.067 of it" in said
