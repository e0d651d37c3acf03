"""`zcproto demo`: options and exit codes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.load.helpers import plan, verified_result
from zcproto.cli import main
from zcproto.load import demo as demonstration
from zcproto.load import fleet_demo
from zcproto.load.demo import Demo
from zcproto.load.fleet_demo import FleetDemo
from zcproto.load.result import Result

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def demos(monkeypatch: pytest.MonkeyPatch) -> list[Demo]:
    """Record the parameters instead of running."""
    seen: list[Demo] = []

    def run_demo(demo: Demo, console: Any) -> Result:
        seen.append(demo)
        return verified_result() if demo.connections > 10 else Result(plan())

    monkeypatch.setattr(demonstration, "run_demo", run_demo)
    return seen


def test_default_is_10000_connections(demos: list[Demo]) -> None:
    assert main(["demo"]) == 0
    assert demos == [Demo(10_000, 5_000.0, 6.0)]


def test_each_option_is_passed_on(demos: list[Demo]) -> None:
    options = [
        "--connections",
        "50",
        "--rate",
        "100",
        "--seconds",
        "2",
        "--json",
        "a.json",
        "--plot",
        "a.png",
    ]
    assert main(["demo", *options]) == 0
    (demo,) = demos
    assert (demo.connections, demo.rate, demo.seconds) == (50, 100.0, 2.0)
    assert (str(demo.json), str(demo.plot)) == ("a.json", "a.png")


def test_options_of_the_fleet_are_passed_on(demos: list[Demo], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[FleetDemo] = []
    monkeypatch.setattr(fleet_demo, "run_fleet_demo", lambda demo, console: seen.append(demo) or 1)
    assert main(["demo", "fleet", "--clients", "5", "--seconds", "2", "--kind", "workers"]) == 1
    assert seen == [FleetDemo(5, 2.0, "workers")]
    assert demos == []


def test_exit_code_is_1_if_not_everything_is_verified(demos: list[Demo]) -> None:
    assert main(["demo", "--connections", "5"]) == 1


@pytest.mark.parametrize("options", [["--connections", "0"], ["--rate", "0"], ["--seconds", "no"]])
def test_values_out_of_range_are_usage_errors(options: list[str], capsys: Capture) -> None:
    assert main(["demo", *options]) == 2
    assert options[0] in capsys.readouterr().err
