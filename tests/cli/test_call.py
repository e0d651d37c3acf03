"""`zcproto call`."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import click
import pytest

from tests.cli.helpers import LoopAhead, connect_patiently
from tests.server.conftest import Serve
from tests.server.helpers import KEY, TIMEOUT, ServerThread
from zcproto.app.app import App, Items
from zcproto.cli import connect, main
from zcproto.cli.connect import TrustChoice
from zcproto.cli.json_values import parse_params, to_json
from zcproto.cli.output import json_text
from zcproto.client.credentials import MAX_KEY
from zcproto.client.options import KEY_VARIABLE
from zcproto.common.home import Home
from zcproto.common.parameters import Ended
from zcproto.errors import FailedPrecondition

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def call(shared: ServerThread, key_file: Path, home: Path) -> Callable[..., int]:
    """Call a method of a server as ada."""

    def run(*arguments: str, server: ServerThread = shared) -> int:
        address = f"127.0.0.1:{server.port}"
        ca = str(server.home / "certs" / "ca.crt")
        return main(["call", address, *arguments, "--user", "ada", "--key-file", str(key_file), "--ca", ca])

    return run


def test_the_result_is_printed_as_json(call: Callable[..., int], capsys: Capture) -> None:
    assert call("echo", '{"word": "h\u00e4llo", "n": [1, 2.5, null, true]}') == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"word": "h\u00e4llo", "n": [1, 2.5, None, True]}
    assert "h\u00e4llo" in out
    assert err == ""


def test_key_log_is_written_on_request(call: Callable[..., int], tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "keys"
    assert call("echo", "--key-log", str(path)) == 0
    assert "CLIENT_TRAFFIC_SECRET_0 " in path.read_text()
    path.chmod(0o644)
    assert call("echo", "--key-log", str(path)) == 2
    assert "others can read or change this file" in capsys.readouterr().err


def test_params_are_optional(call: Callable[..., int], capsys: Capture) -> None:
    assert call("echo") == 0
    assert capsys.readouterr().out == "{}\n"


def test_bytes_are_base64_both_ways(call: Callable[..., int], capsys: Capture) -> None:
    assert call("echo", '{"data": {"base64": "AAECAw=="}, "deep": [{"x": {"base64": ""}}]}') == 0
    assert json.loads(capsys.readouterr().out) == {
        "data": {"base64": "AAECAw=="},
        "deep": [{"x": {"base64": ""}}],
    }


def test_nonfinite_floats_and_control_characters_are_escaped() -> None:
    assert to_json([float("nan"), float("-inf"), 0.5]) == [
        {"float": "nan"},
        {"float": "-inf"},
        0.5,
    ]
    value = {"a\x1b[31m": "\u009b\u202e\n\U000e0001 \u00e4 \U0001f600"}
    text = json_text(to_json(value))
    assert all(each.isprintable() or each == "\n" for each in text)
    assert "\u00e4 \U0001f600" in text
    assert json.loads(text) == value


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "5", '"x"', "null", '{"a": {"base64": "?"}}', "[" * 100_000, '{"a": 1} x']
)
def test_params_other_than_an_object_are_refused(text: str) -> None:
    with pytest.raises(click.UsageError):
        parse_params(text)


def test_base64_with_other_names_is_a_map() -> None:
    params = {"a": {"base64": "AA==", "b": 1}, "b": {"base64": 5}}
    assert parse_params(json.dumps(params)) == params


def test_key_from_the_environment(
    shared: ServerThread, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    ca = str(shared.home / "certs" / "ca.crt")
    assert main(["call", f"127.0.0.1:{shared.port}", "echo", "--user", "ada", "--ca", ca]) == 0
    assert capsys.readouterr().out == "{}\n"


def test_key_from_standard_input(
    shared: ServerThread, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(KEY + "\n"))
    ca = str(shared.home / "certs" / "ca.crt")
    arguments = ["call", f"127.0.0.1:{shared.port}", "echo", "--user", "ada", "--ca", ca, "--key-file", "-"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "{}\n"


def test_key_is_prompted_for_on_a_terminal(
    shared: ServerThread, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", terminal)
    asked: list[Any] = []

    def prompt(text: str, **options: Any) -> str:
        asked.append((text, options))
        return KEY

    monkeypatch.setattr("click.prompt", prompt)
    ca = str(shared.home / "certs" / "ca.crt")
    arguments = ["call", f"127.0.0.1:{shared.port}", "echo", "--user", "ada", "--ca", ca, "--key-file", "-"]
    assert main(arguments) == 0
    assert asked == [("Key", {"hide_input": True, "err": True})]


def test_public_method_without_a_user(shared: ServerThread, home: Path, capsys: Capture) -> None:
    ca = str(shared.home / "certs" / "ca.crt")
    assert main(["call", f"127.0.0.1:{shared.port}", "server.info", "--ca", ca]) == 0
    assert "methods" in json.loads(capsys.readouterr().out)


def test_ca_of_the_home_is_trusted_by_default(
    shared: ServerThread, key_file: Path, home: Path, capsys: Capture
) -> None:
    (home / "certs").mkdir(parents=True, mode=0o700)
    (home / "certs" / "ca.crt").write_bytes((shared.home / "certs" / "ca.crt").read_bytes())
    arguments = ["call", f"127.0.0.1:{shared.port}", "echo", "--user", "ada", "--key-file", str(key_file)]
    assert main(arguments) == 0


def test_pins_replace_a_ca(shared: ServerThread, key_file: Path, home: Path, capsys: Capture) -> None:
    pins = [option for pin in shared.server.pins for option in ("--pin", pin)]
    base = ["call", f"127.0.0.1:{shared.port}", "echo", "--user", "ada", "--key-file", str(key_file)]
    assert main([*base, *pins]) == 0
    assert main([*base, "--pin", "sha256/" + "A" * 43 + "="]) == 3
    err = capsys.readouterr().err
    assert "pin_mismatch" in err
    assert shared.server.pins[0] in err


def test_session_is_closed_after_the_call(serve: Serve, call: Callable[..., int], capsys: Capture) -> None:
    server = serve(sessions__per_user=1)
    for _ in range(3):
        assert call("echo", server=server) == 0
    assert len(server.server.state.registry) == 0


# --- methods that yield items ---------------------------------------------------------------------------


def app_with_stream() -> tuple[App, threading.Event, threading.Event]:
    """Return an app whose `count` yields items until a limit, and events: yield the last one, it has ended."""
    app = App()
    proceed, closed = threading.Event(), threading.Event()

    @app.method("count")
    async def count(to: int) -> AsyncIterator[Any]:
        try:
            for number in range(to):
                if number == to - 1:
                    while not proceed.is_set():  # noqa: ASYNC110 - set by another thread
                        await asyncio.sleep(0.005)
                yield {"n": number, "data": b"\0"}
            yield Ended({"count": to})
        finally:
            closed.set()

    @app.method("refuse")
    def refuse(shape: str) -> None:
        raise FailedPrecondition("not yet", {"shape": shape})

    return app, proceed, closed


def test_items_are_printed_one_per_line_then_the_result(
    serve: Serve, call: Callable[..., int], capsys: Capture
) -> None:
    app, proceed, _ = app_with_stream()
    proceed.set()
    server = serve(app)
    assert call("count", '{"to": 3}', server=server) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [*({"n": n, "data": {"base64": "AA=="}} for n in range(3)), {"count": 3}]
    assert call("count", '{"to": 0}', server=server) == 0
    assert capsys.readouterr().out == '{"count": 0}\n'


def test_precondition_of_the_method_is_an_error(
    serve: Serve, call: Callable[..., int], capsys: Capture
) -> None:
    app, _, _ = app_with_stream()
    assert call("refuse", '{"shape": "round"}', server=serve(app)) == 1
    assert "not yet" in capsys.readouterr().err


def test_timeout_applies_to_the_whole_stream(
    serve: Serve, call: Callable[..., int], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, _, closed = app_with_stream()
    loop = LoopAhead()

    def is_over(item: Any) -> Any:
        loop.ahead_s = TIMEOUT
        return to_json(item)

    monkeypatch.setattr(connect, "new_event_loop", lambda: loop)
    monkeypatch.setattr(connect, "to_json", is_over)  # when the first item is printed
    assert call("count", '{"to": 2}', "--timeout", str(TIMEOUT), server=serve(app)) == 1
    captured = capsys.readouterr()
    assert [json.loads(line)["n"] for line in captured.out.splitlines()] == [0]
    assert "DEADLINE_EXCEEDED" in captured.err
    assert closed.wait(TIMEOUT)


@pytest.fixture
def started(key_file: Path) -> Callable[..., AbstractContextManager[subprocess.Popen[bytes]]]:
    """Start a call as ada in a process with pipes."""

    @contextmanager
    def start(server: ServerThread, *call: str) -> Iterator[subprocess.Popen[bytes]]:
        arguments = ["call", f"127.0.0.1:{server.port}", *call, "--user", "ada"]
        arguments += ["--key-file", str(key_file), "--ca", str(server.home / "certs" / "ca.crt")]
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "zcproto", *arguments]
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
            try:
                yield process
            except BaseException:  # or leaving the block would wait for it without end
                process.kill()
                raise

    return start


def app_that_takes_items() -> App:
    app = App()

    @app.method("sum")
    async def sum_(items: Items[int]) -> int:
        return sum([item async for item in items])

    @app.method("chat")
    async def chat(said: Items[Any]) -> AsyncIterator[Any]:
        async for item in said:
            yield {"said": item}

    return app


def test_items_are_read_from_standard_input(serve: Serve, started: Callable[..., Any]) -> None:
    with started(serve(app_that_takes_items()), "sum") as process:
        out, err = process.communicate(b"1\n\n20\n300")
    assert (process.returncode, out, err) == (0, b"321\n", b"")


def test_items_of_both_sides_alternate(serve: Serve, started: Callable[..., Any]) -> None:
    with started(serve(app_that_takes_items()), "chat") as process:
        for word in ({"base64": "AAE="}, "two", [3]):
            process.stdin.write(json.dumps(word).encode() + b"\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline()) == {"said": word}
        process.stdin.close()
        assert process.stdout.read() == b"null\n"
    assert process.returncode == 0


@pytest.mark.parametrize("line", [b"{", b'{"base64": "?"}'])
def test_line_that_is_not_json_fails_the_call(serve: Serve, started: Callable[..., Any], line: bytes) -> None:
    with started(serve(app_that_takes_items()), "sum") as process:
        out, err = process.communicate(b"1\n" + line + b"\n3\n")
    assert (process.returncode, out) == (1, b"")
    assert b"line 2 of standard input: JSON" in err
    assert one_line(err.decode())


def test_ctrl_c_does_not_wait_for_standard_input(serve: Serve, started: Callable[..., Any]) -> None:
    server = serve(app_that_takes_items())
    with started(server, "chat") as process:
        process.stdin.write(b"1\n")
        process.stdin.flush()
        assert process.stdout.readline() == b'{"said": 1}\n'
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 130
        assert process.stderr.read() == b""
    server.until(lambda: not server.server.state.registry)


def test_ctrl_c_cancels_the_method_after_items_were_printed(
    serve: Serve, started: Callable[..., Any]
) -> None:
    app, _, closed = app_with_stream()
    server = serve(app)
    with started(server, "count", '{"to": 2}') as process:
        assert json.loads(process.stdout.readline())["n"] == 0  # while the method waits
        assert not closed.is_set()
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == b""
        assert process.stderr.read() == b""
    assert process.returncode == 130
    assert closed.wait(TIMEOUT)
    server.until(lambda: not server.server.state.registry)


# --- what goes wrong ---------------------------------------------------------------------------------


def one_line(text: str) -> bool:
    return text.endswith("\n") and text.removesuffix("\n").isprintable() and bool(text.strip())


@pytest.mark.parametrize(
    ("method", "params", "timeout", "says"),
    [
        ("no.such", "{}", TIMEOUT, "UNIMPLEMENTED"),
        ("sleep", '{"ms": -1}', TIMEOUT, "INVALID_ARGUMENT"),
        ("sleep", '{"ms": 60000}', 1.0, "DEADLINE_EXCEEDED"),
    ],
)
def test_error_response_is_one_line_and_exit_code_1(
    call: Callable[..., int],
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    params: str,
    timeout: float,
    says: str,
) -> None:
    connect_patiently(monkeypatch)
    assert call(method, params, "--timeout", str(timeout)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert one_line(err)


def test_error_message_is_escaped_for_the_terminal(
    serve: Serve, call: Callable[..., int], capsys: Capture
) -> None:
    app = App()

    @app.method("fail")
    def fail() -> None:
        from zcproto.errors import NotFound

        raise NotFound("\x1b[31mred\nline")

    assert call("fail", server=serve(app)) == 1
    assert one_line(capsys.readouterr().err)


def test_wrong_key_is_exit_code_1(
    shared: ServerThread, key_file: Path, call: Callable[..., int], capsys: Capture
) -> None:
    key_file.write_text("wrong")
    assert call("echo") == 1
    err = capsys.readouterr().err
    assert "UNAUTHENTICATED" in err
    assert "wrong" not in err


def test_connection_refused_is_exit_code_3(
    key_file: Path, home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "START_TIMEOUT", 0.0)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        options = ["--user", "ada", "--key-file", str(key_file)]
        assert main(["call", address, "echo", *options]) == 3
    err = capsys.readouterr().err
    assert "refused" in err
    assert one_line(err)


def test_silent_server_is_exit_code_3_within_the_timeout(home: Path, capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert main(["call", address, "echo", "--timeout", "0.1", "--pin", "sha256/" + "A" * 43 + "="]) == 3
    assert "no answer within 0.1 s" in capsys.readouterr().err


def test_untrusted_server_is_exit_code_3(
    shared: ServerThread, home: Path, ca_file: Path, capsys: Capture
) -> None:
    assert main(["call", f"127.0.0.1:{shared.port}", "server.info", "--ca", str(ca_file)]) == 3
    err = capsys.readouterr().err
    assert "no connection: certificate_untrusted: " in err
    assert (
        f"; {ca_file} is not the CA of this server; zcproto cert export-ca writes that: use it with --ca"
        in err
    )
    assert one_line(err)


def test_lost_connection_is_exit_code_1(serve: Serve, call: Callable[..., int], capsys: Capture) -> None:
    app = App()

    @app.method("die")
    async def die() -> None:
        server.server.state.connections.copy().pop().abort("test")

    server = serve(app)
    assert call("die", server=server) == 1
    assert one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["localhost"],
        ["localhost:0", "echo"],
        ["localhost:x", "echo"],
        ["localhost", "echo", "[1]"],
        ["localhost", "echo", "{}", "more"],
        ["localhost", "echo", "--timeout", "0"],
        ["localhost", "echo", "--timeout", "soon"],
        ["localhost", "echo", "--user", "ada"],
        ["localhost", "echo", "--user", "ada", "--key-file", "no-such-file"],
        ["localhost", "echo", "--key-file", "-"],
        ["localhost", "echo", "--pin", "sha256/x"],
        ["localhost", "echo", "--key", "secret"],
    ],
)
def test_wrong_usage_is_exit_code_2_and_sends_nothing(
    arguments: list[str], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert main(["call", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err
    assert "Traceback" not in err


def test_empty_key_is_exit_code_2(key_file: Path, home: Path, capsys: Capture) -> None:
    key_file.write_text(" \n")
    assert main(["call", "localhost", "echo", "--user", "ada", "--key-file", str(key_file)]) == 2
    assert "holds no key" in capsys.readouterr().err


def test_key_file_readable_by_others_is_refused_with_the_fix(
    key_file: Path, home: Path, capsys: Capture
) -> None:
    key_file.chmod(0o644)
    assert main(["call", "localhost", "echo", "--user", "ada", "--key-file", str(key_file)]) == 2
    assert f"chmod 600 {key_file}" in capsys.readouterr().err


def test_key_from_a_pipe(shared: ServerThread, home: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o644)
    writer = threading.Thread(target=lambda: pipe.write_text(KEY), daemon=True)
    writer.start()
    ca = str(shared.home / "certs" / "ca.crt")
    arguments = ["call", f"127.0.0.1:{shared.port}", "echo", "--user", "ada", "--ca", ca]
    assert main([*arguments, "--key-file", str(pipe)]) == 0
    writer.join(TIMEOUT)


def test_huge_key_file_is_not_read_completely(
    key_file: Path, call: Callable[..., int], capsys: Capture
) -> None:
    key_file.write_text("k" * (MAX_KEY * 100))
    assert call("echo") == 1
    assert one_line(capsys.readouterr().err)


def test_help_lists_the_exit_codes(home: Path, capsys: Capture) -> None:
    assert main(["call", "--help"]) == 0
    out = capsys.readouterr().out
    assert "Exit codes" in out
    assert "base64" in out


def test_several_addresses_are_tried(
    shared: ServerThread, key_file: Path, home: Path, capsys: Capture
) -> None:
    ca = str(shared.home / "certs" / "ca.crt")
    addresses = f"127.0.0.1:1,localhost:{shared.port}"
    arguments = ["--user", "ada", "--key-file", str(key_file), "--ca", ca]
    assert main(["call", addresses, "echo", json.dumps({"word": "hello"}), *arguments]) == 0
    assert json.loads(capsys.readouterr().out) == {"word": "hello"}


def test_own_ca_is_trusted_only_if_all_servers_are_of_this_machine(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert TrustChoice().ca_file(home, "localhost:1,127.0.0.1:2") == home.certs / "ca.crt"
    assert TrustChoice().ca_file(home, "localhost,server.example") is None
