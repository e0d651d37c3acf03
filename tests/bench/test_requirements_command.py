"""`zcproto bench --requirements` and `--curves` from the options to the exit code, on a small scale."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from bench.curves import run as curves_run
from bench.curves import sizes, tokens
from bench.curves.run import fitting
from bench.curves.sizes import QUICK
from zcproto.certs import authority
from zcproto.cli import main
from zcproto.load.generator import PORTS_OF_AN_ADDRESS, source


@pytest.fixture(autouse=True)
def small_authority(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authority, "KEY_TYPE", "rsa-2048")


def test_one_requirement_is_checked_shown_and_written_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / f"out.{name}" for name in ("json", "html", "markdown")}
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    assert main(["bench", "--requirements", "--quick", "--step", "configuration", *words]) == 0
    shown = capsys.readouterr()
    assert "all of 1 requirements hold, each by what this run has seen" in shown.out
    assert "[1 of 1] configuration" in shown.err
    written = json.loads(files["json"].read_text())
    assert [each["verdict"] for each in written["requirements"]] == ["pass"]
    assert written["passed"] is True
    assert written["machine"]["cpus"] >= 1
    assert "4 of 4 faults at once" in files["html"].read_text()
    assert files["markdown"].read_text().startswith("# Benchmarks\n")
    assert "4 of 4 faults at once" in files["markdown"].read_text()


def test_a_requirement_that_does_not_hold_has_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.requirements.operation_checks.FAULTS", ("server.nonsense",))
    assert main(["bench", "--requirements", "--quick", "--step", "configuration"]) == 1
    assert "1 of 1 requirements do not hold: configuration" in capsys.readouterr().out


def test_curves_are_measured_fitted_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(QUICK, connections=(3, 6, 9), sessions=(1, 20, 300), requests=40, load_s=0.3)
    monkeypatch.setattr(sizes, "QUICK", small)
    files = {name: tmp_path / f"out.{name}" for name in ("json", "html", "markdown")}
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    assert main(["bench", "--curves", "--quick", *words]) == 0
    out = capsys.readouterr().out
    written = json.loads(files["json"].read_text())["curves"]
    assert written["failed"] == {}
    curves = {each["key"]: each for each in written["curves"]}
    assert set(curves) == {"sessions", "payload", "depth", "connections"}
    for curve in curves.values():
        assert curve["title"] in out
        for series in curve["series"]:
            assert len(series["values"]) == len(curve["sizes"])
            assert series["growth"] in files["markdown"].read_text()
    assert curves["connections"]["sizes"] == [3, 6, 9]
    for name in ("payload", "depth"):
        assert all(value > 0 for series in curves[name]["series"] for value in series["values"])
    html = files["html"].read_text()
    assert html.count("<svg") == len(curves)
    assert "<script" not in html


def test_a_curve_that_could_not_be_measured_is_said_to_be(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(sessions: int, checks: int) -> tokens.Point:
        raise OSError("no process any more")

    monkeypatch.setattr(curves_run.tokens, "in_a_process", broken)
    assert main(["bench", "--curves", "--quick", "--step", "sessions"]) == 1
    assert "curve sessions: not measured: OSError: no process any more" in capsys.readouterr().out


def test_settings_of_the_environment_do_not_change_what_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZCPROTO_LIMITS__NONSENSE", "1")  # no server would start with it
    assert main(["bench", "--requirements", "--quick", "--step", "first_run"]) == 0
    assert os.environ["ZCPROTO_LIMITS__NONSENSE"] == "1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Missing argument 'HOST:PORT'; or give --requirements, --curves or --soak."),
        (["localhost:1"], "Missing option '--keys'."),
        (["localhost:1", "--requirements"], "give no HOST:PORT"),
        (["--requirements", "--step", "nonsense"], "no such step: nonsense"),
        (["--curves", "--step", "nonsense"], "no such curve: nonsense"),
        (["--requirements", "--curves", "--step", "server"], "ask for one of the two"),
        (["--requirements", "--html", "/nowhere/at/all.html"], "cannot be written"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("most", "counts"),
    [
        (30_000, (100, 3_000, 30_000)),
        (19_680, (100, 3_000, 19_500)),
        (3_000, (100, 3_000)),
        (250, (100, 250)),
    ],
)
def test_the_largest_that_fits_is_taken_in_place_of_those_that_do_not(
    most: int, counts: tuple[int, ...]
) -> None:
    found, notes = fitting((100, 3_000, 30_000), most)
    assert found == counts
    assert len(notes) == (most < 30_000)


def test_more_connections_than_an_address_has_ports_come_from_several() -> None:
    assert source("127.0.0.1", PORTS_OF_AN_ADDRESS - 1) is None
    assert source("127.0.0.1", PORTS_OF_AN_ADDRESS) == ("127.0.0.2", 0)
    assert source("127.0.0.1", 3 * PORTS_OF_AN_ADDRESS) == ("127.0.0.4", 0)
    assert source("192.0.2.7", PORTS_OF_AN_ADDRESS) is None
