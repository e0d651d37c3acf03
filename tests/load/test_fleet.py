"""Fleets that are hurt: what counts as a loss, the picture, and a small demonstration."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from zcproto.load import fleet, fleet_demo
from zcproto.load.fleet import Fault, Seen, judge
from zcproto.load.fleet_clients import Outcome
from zcproto.load.fleet_demo import FleetDemo, conclusion, draw, picture, run_fleet_demo, show

ITEMS = 3
OWNER = 7
LOST = {"end": "UNKNOWN", "reason": "owner_lost", "items": 2, "end_items": 2}


def outcome(**more: Any) -> Outcome:
    return Outcome(
        **{"run": "one", "reader": "ada", "began": 1.0, "ended": 9.0, "items": ITEMS, "end": "result"} | more
    )


def seen_of(*outcomes: Outcome, faults: list[Fault] | None = None, owner: int | None = OWNER) -> Seen:
    started = [] if owner is None else [(each.run, owner) for each in outcomes]
    return Seen(0.0, 20.0, outcomes=[*outcomes], faults=faults or [], started=started)


def killed(victim: str = "worker", at: float = 5.0, pid: int = OWNER) -> Fault:
    return Fault(at, victim, pid)


@pytest.mark.parametrize(
    ("given", "faults", "kind"),
    [
        ({}, [], "complete"),
        ({"items": 2}, [], "wrong"),
        ({"faults": ["item 1 is 0"]}, [], "wrong"),
        (LOST, [killed()], "owner_lost"),
        (LOST, [killed("server")], "owner_lost"),
        (LOST, [killed(pid=8)], "unexplained"),
        (LOST, [killed("coordinator")], "unexplained"),
        (LOST | {"end_items": 3}, [killed()], "wrong"),
        ({"end": "NOT_FOUND"}, [killed(), killed("coordinator", 6.0, 9)], "both_lost"),
        ({"end": "NOT_FOUND"}, [killed(), killed("coordinator", 60.0, 9)], "unexplained"),
        ({"end": "NOT_FOUND"}, [killed("coordinator", -60.0, 9), killed()], "unexplained"),
        ({"end": "NOT_FOUND"}, [killed()], "unexplained"),
        ({"end": "CANCELLED", "reason": "resumed_elsewhere"}, [killed()], "unexplained"),
    ],
)
def test_outcome_is_judged_by_what_was_killed(given: dict[str, Any], faults: list[Fault], kind: str) -> None:
    found = judge(seen_of(outcome(**given), faults=faults), ITEMS)
    counts = {
        "complete": found.complete,
        "owner_lost": found.owner_lost,
        "both_lost": found.both_lost,
        "wrong": len(found.wrong),
        "unexplained": len(found.unexplained),
        "twice": len(found.twice),
    }
    assert counts[kind] == 1
    assert fleet_demo.has_loss(found) == (kind in ("wrong", "unexplained"))


def test_run_that_was_lost_before_its_method_began_needs_a_kill_meanwhile() -> None:
    given = LOST | {"items": 0, "end_items": 0}
    assert judge(seen_of(outcome(**given), faults=[killed(pid=8)], owner=None), ITEMS).owner_lost == 1
    late = killed(at=15.0, pid=8)
    assert judge(seen_of(outcome(**given), faults=[late], owner=None), ITEMS).unexplained


def test_method_that_ran_twice_is_a_loss() -> None:
    seen = seen_of(outcome())
    seen.started *= 2
    found = judge(seen, ITEMS)
    assert found.twice == ["one"]
    assert conclusion(found) == "Lost: methods that ran twice: 1"


def pictured() -> Seen:
    runs = [
        outcome(times=[2.0, 3.0, 8.0], cuts=[4.0], restarts=[5.0]),
        outcome(run="two", began=9.0, ended=19.0, times=[10.0, 11.0], **LOST),
        outcome(run="three", reader="bob", ended=20.0, times=[19.9]),
    ]
    seen = seen_of(*runs, faults=[killed(at=12.0)])
    seen.ticks = [
        {"at": at, "items": int(at), "longest": 0.5, "waiting": 0, "done": 0, "begun": 3} for at in (1.0, 2.0)
    ]
    return seen


@pytest.mark.parametrize("is_ascii", [False, True])
def test_picture_has_a_line_for_each_client_with_its_gaps(
    monkeypatch: pytest.MonkeyPatch, is_ascii: bool
) -> None:
    monkeypatch.setattr(fleet_demo, "WIDTH", 20)
    lines = picture(pictured(), is_ascii=is_ascii)
    text = "\n".join(lines).replace("█", "#").replace("·", ".")
    assert "\nkilled                 W\n" in text
    assert "\nclient 1   ..##xr..#.##.......L\n" in text
    assert "\nclient 2   ...................#\n" in text
    assert "W a worker was killed" in text
    assert text.isascii()


def test_plot_is_an_image_and_the_report_names_what_was_lost() -> None:
    seen = pictured()
    assert ElementTree.fromstring(draw(seen, "a fleet")).tag.endswith("svg")
    out = io.StringIO()
    show(seen, judge(seen, ITEMS), out)
    assert "ended with owner_lost: their process was killed" in out.getvalue()
    assert out.getvalue().rstrip().endswith("after the items that were stored.")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_small_demonstration_loses_nothing_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: Callable[[], list[int]]
) -> None:
    monkeypatch.setattr(fleet_demo, "PAUSE_S", 0.05)
    monkeypatch.setattr(fleet_demo, "INTERVAL_S", 1.0)
    monkeypatch.setattr(fleet.WorkerFleet, "victims", ("worker",))
    out, path = io.StringIO(), tmp_path / "fleet.json"
    demo = FleetDemo(clients=4, seconds=4.0, kind="workers", json=path)
    assert run_fleet_demo(demo, out) == 0, out.getvalue()
    written = json.loads(path.read_text())
    assert written["counts"]["a worker was killed, times"] >= 1
    assert not any(written["lost"].values())
    assert children() == []
