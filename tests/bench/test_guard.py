"""`python -m bench guard`: growth of a count fails, and the function that grew is named."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.guard import command
from bench.guard.accepted import file_of, read, write
from bench.guard.command import compare, count_all
from bench.guard.counting import Cost
from bench.guard.script import STEPS

pytestmark = pytest.mark.no_cover  # coverage traces, too


@functools.cache
def counts_here() -> dict[str, dict[str, Cost]]:
    return count_all()


@pytest.fixture(autouse=True)
def accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Accept the present counts, in a folder of the test; return the file."""
    path = file_of(tmp_path)
    monkeypatch.setattr(command, "file_of", lambda: path)
    write(path, counts_here(), "for the test")
    return path


def plant(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let Python run this code at the start of each process."""
    (folder / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))


SLOWER_READ = """
from zcproto.connection.server import ServerConnection

usual = ServerConnection.receive_data

def slower_read(*args):
    for _ in range(10):
        pass
    return usual(*args)

ServerConnection.receive_data = slower_read
"""

SLOWER_CALL = """
from zcproto.client.client import Client

usual = Client.call

async def slower_call(self, *args):
    for _ in range(3):
        sum(range(1000))  # few bytecodes and much work
    return await usual(self, *args)

Client.call = slower_call
"""


@pytest.mark.parametrize(
    ("code", "grown", "places", "untouched"),
    [
        (
            SLOWER_READ,
            "request: bytecodes",
            ["sitecustomize.py slower_read (0.00 ->"],
            "call of a client",
        ),
        pytest.param(
            *(SLOWER_CALL, "call of a client: calls", ["slower_call (0.00 ->", "sum (0.00 -> 3.00)"]),
            "request",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_planted_slowdown_fails_and_is_named(
    code: str,
    grown: str,
    places: list[str],
    untouched: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plant(tmp_path, monkeypatch, code)
    assert main(["guard"]) == 1
    shown = capsys.readouterr().out
    assert f"{grown} grew by" in shown
    assert all(place in shown for place in places)
    assert f"{untouched}: bytecodes grew" not in shown


SLOW_BUILD = """
import asyncio

usual = asyncio.BaseEventLoop.time
asyncio.BaseEventLoop.time = lambda loop: usual(loop) + 60.0
"""


def test_counts_are_same_in_another_process_whose_build_takes_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, monkeypatch, SLOW_BUILD)
    assert count_all() == counts_here()


@pytest.mark.parametrize(
    ("before", "now", "code", "notes"),
    [
        ({"a f": Cost(1000, 10)}, {"a f": Cost(1029, 10)}, 0, []),
        (
            {"a f": Cost(1000, 10)},
            {"a f": Cost(900, 10)},
            0,
            ["request: bytecodes fell by 10.0%; accept it, or later growth hides in the difference"],
        ),
        (
            {"a f": Cost(100, 1), "a g": Cost(50, 1), "a h": Cost(9, 1)},
            {"a f": Cost(101, 1), "a g": Cost(1, 1), "b new": Cost(70, 0), "a h": Cost(9, 1)},
            1,
            [
                "request: bytecodes grew by 13.8%:",
                "  +70.00  b new (0.00 -> 70.00)",
                "  +1.00  a f (100.00 -> 101.00)",
            ],
        ),
    ],
    ids=["within the bar", "shrinkage", "growth"],
)
def test_counts_are_compared_by_function(
    before: dict[str, Cost], now: dict[str, Cost], code: int, notes: list[str]
) -> None:
    report = compare({"depth_1": now}, {"depth_1": before})
    assert (report.exit_code, report.notes) == (code, notes)
    assert "no accepted count" in compare({"depth_1": now}, {}).faults[0]


def test_counts_can_be_compared_after_they_were_accepted(
    accepted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accepted.unlink()
    assert main(["guard"]) == 2
    assert "--accept REASON" in capsys.readouterr().err
    assert main(["guard", "--accept", "check the new field"]) == 0
    assert json.loads(accepted.read_text())["reason"] == "check the new field"
    assert set(read(accepted)) == set(STEPS)
    assert read(accepted)["depth_1"] == counts_here()["depth_1"]
