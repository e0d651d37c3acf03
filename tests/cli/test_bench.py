"""`zcproto bench`: options, errors, and a run against a real server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import variables
from tests.limits import TIMEOUT
from tests.load.helpers import verified_result
from tests.server.helpers import PATIENT
from zcproto.cli import connect, main
from zcproto.load import command
from zcproto.load.command import Outputs
from zcproto.load.find_max import Search
from zcproto.load.plan import Credential, Plan, Target
from zcproto.load.result import Result

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "load.keys"
    path.write_text("load-1\tAAA\nload-2\tBBB\n" + "".join(f"load-{n}\tC{n}\n" for n in range(3, 23)))
    return path


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Plan, Outputs]]:
    """Record plans instead of running them."""
    seen: list[tuple[Plan, Outputs]] = []

    def run_and_report(plan: Plan, outputs: Outputs, console: Any) -> Result:
        seen.append((plan, outputs))
        return verified_result()

    monkeypatch.setattr(command, "run_and_report", run_and_report)
    monkeypatch.setattr("zcproto.cli.bench.check_connection", lambda *arguments: None)
    return seen


def test_default_run_is_small(plans: list[tuple[Plan, Outputs]], keys: Path, home: Path) -> None:
    assert main(["bench", "localhost:7443", "--keys", str(keys)]) == 0
    ((plan, outputs),) = plans
    assert (plan.host, plan.port) == ("localhost", 7443)
    assert plan.connections == plan.sessions == 100
    assert (plan.processes, plan.sources) == (1, None)
    assert plan.credentials[:2] == (Credential("load-1", "AAA"), Credential("load-2", "BBB"))
    assert len(plan.credentials) == 22
    assert plan.operator == plan.credentials[0]
    assert plan.ca_file == home / "certs" / "ca.crt", "which the server may be about to create"
    assert outputs == Outputs()


def test_each_option_is_passed_on(
    plans: list[tuple[Plan, Outputs]], keys: Path, home: Path, tmp_path: Path
) -> None:
    ops = tmp_path / "ops.keys"
    ops.write_text("ops-1\tCCC\n")
    options = {
        "--connections": 50, "--sessions": 20, "--rate": 70, "--duration": 3, "--payload": 1000, "--pipeline": 4,
        "--arrival-rate": 90, "--processes": 2, "--keys": keys, "--operator-key-file": ops, "--ca": "my.crt",
        "--sources": 3, "--seed": 9, "--stream": "repeat", "--json": "a.json", "--hdr": "a.hgrm", "--plot": "a.png",
    }  # fmt: skip
    arguments = [str(part) for option in options.items() for part in option]
    assert main(["bench", "[::1]:9000", *arguments]) == 0
    ((plan, outputs),) = plans
    assert (plan.host, plan.port, plan.connections, plan.sessions) == ("::1", 9000, 50, 20)
    assert (plan.rate, plan.duration_s, plan.payload_bytes, plan.pipeline) == (70.0, 3.0, 1000, 4)
    assert plan.stream == "repeat"
    assert (plan.arrival_rate, plan.processes, plan.sources, plan.seed) == (90.0, 2, 3, 9)
    assert plan.operator == Credential("ops-1", "CCC")
    assert str(plan.ca_file) == "my.crt"
    assert outputs == Outputs(Path("a.json"), Path("a.hgrm"), Path("a.png"))


def test_method_of_the_application_is_measured_with_one_user(
    plans: list[tuple[Plan, Outputs]], home: Path, tmp_path: Path
) -> None:
    (tmp_path / "ada.key").touch(0o600)
    (tmp_path / "ada.key").write_text("AAA\n")
    (tmp_path / "params.json").write_text('{"name": {"base64": "AAE="}}')
    who = ["--user", "ada", "--key-file", str(tmp_path / "ada.key")]
    options = ["--method", "greet", "--params", f"@{tmp_path / 'params.json'}", "--expect", "null"]
    assert main(["bench", "localhost", *who, *options, "--html", "a.html"]) == 0
    ((plan, outputs),) = plans
    assert plan.target == Target("greet", {"name": b"\x00\x01"}, (None,))
    assert plan.credentials == (Credential("ada", "AAA"),)
    assert (plan.operator, plan.connections, plan.sessions) == (None, 100, 4)
    assert outputs == Outputs(html=Path("a.html"))


def test_stream_with_params_is_a_request_of_the_application(
    plans: list[tuple[Plan, Outputs]], keys: Path, home: Path
) -> None:
    options = ["--stream", "chat", "--params", '{"prompt": "hi"}', "--expect", "2"]
    assert main(["bench", "localhost", "--keys", str(keys), *options]) == 0
    ((plan, _),) = plans
    assert plan.target == Target("chat", {"prompt": "hi"}, (2,), is_stream=True)
    assert (plan.stream, plan.load) == ("", 10_000)


def test_user_of_the_environment_gives_way_to_keys(
    plans: list[tuple[Plan, Outputs]],
    keys: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.setenv("ZCPROTO_USER", "ada")
    monkeypatch.setenv("ZCPROTO_KEY", "AAA")
    assert main(["bench", "localhost"]) == 0
    assert main(["bench", "localhost", "--keys", str(keys)]) == 0
    assert [plan.credentials[0].user for plan, _ in plans] == ["ada", "load-1"]
    assert main(["bench", "localhost", "--keys", str(keys), "--user", "eve"]) == 2
    assert "--user excludes --keys." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--expect", "1"], "--params and --expect go with --method or --stream."),
        (["--method", "m", "--params", "[]"], "JSON must be an object"),
        (
            ["--method", "m", "--params", "@none.json"],
            "none.json: No such file or directory; check the path.",
        ),
        (["--method", "m", "--expect", "{"], "JSON: "),
        (
            ["--method", "m", "--stream", "s"],
            "--stream excludes --method, and without --params also --find-max.",
        ),
        (["--find-max", "9", "--hdr", "a.hdr"], "--hdr excludes --find-max"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: list[str], fault: str, keys: Path, home: Path, capsys: Capture
) -> None:
    assert main(["bench", "localhost", "--keys", str(keys), *options]) == 2
    assert fault in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "duration", "highest", "code"),
    [([], 3.0, 700.0, 0), (["--duration", "9"], 9.0, None, 1)],
)
def test_highest_rate_is_searched(
    options: list[str],
    duration: float,
    highest: float | None,
    code: int,
    keys: Path,
    home: Path,
    plans: list[tuple[Plan, Outputs]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def find(plan: Plan, limit_ms: float, outputs: Outputs, console: Any) -> Search:
        plans.append((plan, outputs))
        search = Search(limit_ms)
        search.highest = highest
        return search

    monkeypatch.setattr(command, "find_max_and_report", find)
    assert main(["bench", "localhost", "--keys", str(keys), "--find-max", "20", *options]) == code
    assert plans[0][0].duration_s == duration


def test_ca_of_the_home_folder_is_trusted(plans: list[tuple[Plan, Outputs]], keys: Path, home: Path) -> None:
    (home / "certs").mkdir(parents=True)
    (home / "certs" / "ca.crt").touch()
    assert main(["bench", "db.example", "--keys", str(keys)]) == 0
    assert plans[0][0].ca_file == home / "certs" / "ca.crt"


def test_missing_keys_file_prints_the_command_to_create_it(home: Path, capsys: Capture) -> None:
    assert main(["bench", "localhost", "--keys", "none.keys"]) == 2
    assert "zcproto user add load --count N --out FILE" in capsys.readouterr().err


def test_missing_keys_option_prints_all_commands_that_are_needed(home: Path, capsys: Capture) -> None:
    assert main(["bench", "localhost:9000", "--connections", "20"]) == 2
    err = capsys.readouterr().err
    assert "zcproto user add load --count 5 --out load.keys\n" in err
    assert "zcproto user add ops --operator --count 1 --out ops.keys\n" in err
    assert "zcproto bench localhost:9000 --keys load.keys --operator-key-file ops.keys" in err


def test_too_few_keys_are_refused(keys: Path, home: Path, capsys: Capture) -> None:
    assert main(["bench", "localhost", "--keys", str(keys), "--connections", "200"]) == 2
    assert "the 22 users of the keys file may open 109 sessions" in capsys.readouterr().err


def test_more_sessions_than_connections_is_an_error(keys: Path, home: Path, capsys: Capture) -> None:
    options = ["--keys", str(keys), "--connections", "3", "--sessions", "4"]
    assert main(["bench", "localhost", *options]) == 2
    assert "at most --sessions 3" in capsys.readouterr().err


def test_invalid_address_is_an_error(keys: Path, home: Path, capsys: Capture) -> None:
    assert main(["bench", "localhost:http", "--keys", str(keys)]) == 2
    assert "the port must be a number" in capsys.readouterr().err


def test_missing_connection_is_reported_before_the_run(
    keys: Path, home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "START_TIMEOUT", 0.0)
    assert main(["bench", "127.0.0.1:1", "--keys", str(keys), "--connections", "9"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("zcproto: no connection: 127.0.0.1:1: Connection refused, and ")


# --- a whole run ------------------------------------------------------------------------------------------


def zcproto(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "zcproto", *arguments]


@pytest.fixture
def server(home: Path) -> Iterator[str]:
    """Start `zcproto serve` in a process and yield its address."""
    home.mkdir(mode=0o700)
    (home / "config.toml").write_text('[certificates]\nkey_types = ["ecdsa-p256"]\n')
    process = subprocess.Popen(
        zcproto("serve", "--port", "0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **variables(PATIENT)},
    )
    assert process.stdout is not None
    yield process.stdout.readline().split()[-1]
    process.terminate()
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0


def test_fifty_connections_of_new_users_are_verified(server: str, home: Path, tmp_path: Path) -> None:
    load, ops = str(tmp_path / "load.keys"), str(tmp_path / "ops.keys")
    subprocess.run(zcproto("user", "add", "load", "--count", "10", "--out", load), check=True)
    subprocess.run(zcproto("user", "add", "ops", "--operator", "--count", "1", "--out", ops), check=True)
    done = subprocess.run(
        zcproto(
            "bench", server, "--connections", "50", "--rate", "500", "--duration", "0.5",
            "--keys", load, "--operator-key-file", ops,
        ),
        capture_output=True, text=True, check=False, timeout=TIMEOUT, env={**os.environ, "COLUMNS": "110"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("verified: 50 of 50 connections, 300 correct answers, 0 errors")
    streams = subprocess.run(
        zcproto(
            "bench", server, "--connections", "20", "--rate", "400", "--duration", "0.5", "--stream", "repeat",
            "--keys", load, "--operator-key-file", ops,
        ),
        capture_output=True, text=True, check=False, timeout=TIMEOUT, env={**os.environ, "COLUMNS": "110"},
    )  # fmt: skip
    assert streams.stdout.rstrip().endswith(
        "verified: 20 of 20 connections, 200 items in order, 40 correct answers, 0 errors"
    ), streams.stderr
    # Without an operator the counts cannot be compared, so nothing is measured.
    refused = subprocess.run(
        zcproto("bench", server, "--connections", "5", "--keys", load),
        capture_output=True, text=True, check=False, timeout=TIMEOUT,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "'load-1' is not an operator, so the server's counters cannot be read" in refused.stderr
