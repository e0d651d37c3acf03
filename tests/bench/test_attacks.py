"""A server under attack: a small run of all attacks, and unmet bars are detected."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.scenarios import attacks as module
from bench.scenarios.attackers import Logins
from bench.scenarios.attacks import ATTACKS, AttackPlan, Figures, Outcome, report
from bench.scenarios.storm_clients import Served
from zcproto.load.record import Latencies

MIB = 1 << 20
SMALL = AttackPlan(seconds=1.0, rest_s=0.2, honest=3, rate=20.0, logins=5.0)


def latencies(*millis: float) -> Latencies:
    made = Latencies()
    for each in millis:
        made.add(each / 1000)
    return made


def outcome(name: str, **changes: Any) -> Outcome:
    quiet_ms = changes.pop("quiet_ms", 1.0)
    logins = {"begun": 100, "opened": 100, "latency": latencies(*[10.0] * 99, 150.0)}
    served = {"sent": 50, "equal": 50, "connections": 5, "latency": latencies(1.0)}
    figures = {"before": 50 * MIB, "peak": 60 * MIB, "after": 51 * MIB, "stats": {"refused_full": 3}}
    for part in (logins, served, figures):
        part.update({key: changes.pop(key) for key in [*changes] if key in part})
    figures |= changes
    return Outcome(
        ATTACKS[name],
        rest=Logins(10, 10, latency=latencies(9.0)),
        quiet=Served(50, 50, 5, latency=latencies(quiet_ms)),
        logins=Logins(**logins, failed=Counter({"refused": logins["begun"] - logins["opened"]})),
        served=Served(**served),
        connections=5,
        counts=Counter({"connects": 7}),
        figures=Figures(**figures),
    )


@pytest.mark.parametrize("name", ATTACKS)
def test_good_outcome_of_every_attack_passes(name: str) -> None:
    made = report({name: outcome(name)})
    assert made.reasons() == []
    assert f"{name}: the attackers' counts: connects 7" in made.notes
    assert f"{name}: refused connections: refused_full 3" in made.notes


@pytest.mark.parametrize(
    ("name", "changes", "keys"),
    [
        ("silence: nothing", {"opened": 99}, {"logins_failed"}),
        ("silence: nothing", {"latency": latencies(*[10.0] * 9, 200.0)}, {"login_p99_ms"}),
        ("flood: nothing", {"latency": latencies(*[900.0] * 94)}, {"at_once"}),
        ("flood: nothing", {"latency": latencies(*[900.0] * 94, *[1000.0] * 6)}, {"at_once"}),
        ("flood: nothing", {"connections": 4}, {"connections_lost"}),
        ("requests", {"opened": 99}, {"logins_failed"}),
        ("requests", {"equal": 49}, {"requests_lost"}),
        ("requests", {"unhealthy": 1}, {"unhealthy"}),
        ("frames: of one user", {"peak": 146 * MIB}, {"growth_mib"}),
        ("frames: of 60 users", {"after": 66 * MIB}, {"kept_mib"}),
        ("waste", {"quiet_ms": 0.25}, {"times_quiet"}),
        ("threads", {"equal": 49}, {"requests_lost"}),
        ("items: of one user", {"peak": 146 * MIB}, {"growth_mib"}),
    ],
)
def test_unmet_bar_fails(name: str, changes: dict[str, Any], keys: set[str]) -> None:
    assert {row.key for row in outcome(name, **changes).rows() if not row.holds} == keys


def test_flood_may_delay_a_few_logins() -> None:
    delayed = outcome("flood: a ClientHello", opened=96, latency=latencies(*[900.0] * 95, 3000.0))
    assert all(row.holds for row in delayed.rows())


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_small_attacks_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # No duration is promised on a machine that runs tests.
    lenient = {name: replace(attack, p99_ms=None, at_once=None) for name, attack in ATTACKS.items()}
    monkeypatch.setattr(module, "ATTACKS", lenient)
    monkeypatch.setattr(module, "TIMES_QUIET", 10_000.0)
    monkeypatch.setattr(module, "AttackPlan", lambda seconds, logins: SMALL)
    file = tmp_path / "attacks.json"
    assert main(["scenario", "attacks", "--json", str(file)]) == 0, capsys.readouterr()
    figures = json.loads(file.read_text())["figures"]
    assert [*figures] == [*ATTACKS]
    assert all(each["logins"]["value"] == 5 for each in figures.values())
