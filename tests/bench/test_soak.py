"""A soak: a short one on a real server, and growth and wrong answers are detected."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.scenarios import churning_clients as clients_module
from bench.scenarios import soak as module
from bench.scenarios.churning_clients import Client, Seen, now_ms
from bench.scenarios.sessions import ClientSession
from bench.scenarios.soak import Sample, SoakOutcome, SoakPlan, growth, judged, slope_per_minute
from bench.stage import Stage
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import KEY
from zcproto.app.app import App
from zcproto.errors import ConfigError, ConnectionClosed, Unavailable, ZcprotoError
from zcproto.load.caller import Caller, LoadTarget
from zcproto.load.plan import Credential

HOUR_MS = 3_600_000


def sample(at_s: float, **changes: Any) -> Sample:
    usual: dict[str, Any] = {
        "at_s": at_s,
        "memory_mib": 70.0,
        "descriptors": 36,
        "tasks": 9,
        "threads": 6,
        "connections": 13,
        "sessions": 100,
        "answers": int(at_s) * 1000,
    }
    return Sample(**{**usual, **changes})


def samples(**by_minute: Callable[[int], float]) -> list[Sample]:
    """A sample a minute, nine of them."""
    return [
        sample(minute * 60.0, **{name: value(minute) for name, value in by_minute.items()})
        for minute in range(1, 10)
    ]


def outcome(**changes: Any) -> SoakOutcome:
    seen = Seen(right=Counter({"echo": 1000, "open": 20}))
    usual: dict[str, Any] = {
        "plan": SoakPlan(30.0),
        "seen": seen,
        "samples": samples(),
        "done": Counter({"rotation": 9, "reload": 9, "outage": 4}),
        "seconds": 540.0,
    }
    return SoakOutcome(**{**usual, **changes})


# --- growth --------------------------------------------------------------------------------------------------


def test_constant_figure_has_no_growth() -> None:
    assert growth(samples(), "memory_mib") == 0
    assert slope_per_minute(samples(), "memory_mib") == 0


def test_growth_is_difference_of_medians_after_warm_up() -> None:
    some = samples(memory_mib=lambda minute: 50.0 + 2 * minute)
    assert [each.at_s for each in judged(some)] == [minute * 60.0 for minute in range(4, 10)]
    assert growth(some, "memory_mib") == pytest.approx(8.0)  # minutes 4 and 5, and 8 and 9
    assert slope_per_minute(some, "memory_mib") == pytest.approx(2.0)


def test_warm_up_and_spike_are_not_growth() -> None:
    some = samples(memory_mib=lambda minute: {1: 20.0, 2: 60.0, 8: 90.0}.get(minute, 70.0))
    assert slope_per_minute(some, "memory_mib") == 0
    some = samples(memory_mib=lambda minute: 20.0 if minute < 4 else 70.0)
    assert growth(some, "memory_mib") == 0


def test_too_few_samples_fail_growth_bar() -> None:
    assert growth(samples()[:3], "tasks") is None
    assert slope_per_minute([sample(1.0)], "tasks") is None
    assert not outcome(samples=samples()[:3]).report().row("memory_growth").holds


# --- what figures prove ----------------------------------------------------------------------------------------


def test_good_soak_passes() -> None:
    assert outcome().report().reasons() == []


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"samples": samples(memory_mib=lambda minute: 70.0 + minute)}, "memory_growth"),
        ({"samples": samples(descriptors=lambda minute: 30 + minute)}, "descriptor_growth"),
        ({"samples": samples(tasks=lambda minute: 5 + minute)}, "task_growth"),
        ({"samples": samples(threads=lambda minute: 5 + minute)}, "thread_growth"),
        ({"seen": Seen(wrong=Counter({"echo: a different answer": 1}))}, "wrong"),
        ({"seen": Seen(lost=Counter({"reset": 1}))}, "lost"),
        ({"errors": {"13": 1}}, "internal"),
        ({"failed": {"rotation": "no"}}, "not_done"),
    ],
)
def test_unmet_bar_fails(changes: dict[str, Any], key: str) -> None:
    rows = outcome(**changes).report().columns["figure"]
    assert [row.key for row in rows if not row.holds] == [key]


@pytest.mark.parametrize(("minutes", "most"), [(30.0, 4.0), (120.0, 4.0), (15.0, 9.0), (3.0, 6.0)])
def test_memory_bound_is_higher_in_short_runs(minutes: float, most: float) -> None:
    assert outcome(plan=SoakPlan(minutes)).memory_bound_mib == pytest.approx(most)


# --- carried out -----------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_short_soak_has_no_wrong_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Churn, a rotation, a reload and a full disk in each cycle."""
    monkeypatch.setattr(module, "OUTAGE_CHANCE", 1.0)
    monkeypatch.setattr(module, "SoakPlan", partial(SoakPlan, lifetime_s=3_600.0, refresh_lifetime_s=7_200.0))
    file = tmp_path / "soak.json"
    code = main(["scenario", "soak", "--minutes", "0.1", "--seed", "7", "--json", str(file)])
    printed = capsys.readouterr()
    written = json.loads(file.read_text())
    assert {"connect", "open", "echo", "refresh", "end"} <= written["answers"]["right"].keys(), printed
    assert written["answers"]["wrong"] == {}
    assert written["answers"]["lost"] == {}
    assert written["failed"] == {}
    figures = written["figures"]["figure"]
    assert figures["rotations"]["value"] == figures["reloads"]["value"] == figures["outages"]["value"] > 0
    assert written["options"]["seed"] == 7
    assert len(written["samples"]) >= 1
    assert all(each["connections"] == SoakPlan(0.1).steady + 1 for each in written["samples"])
    # A slow machine makes fewer cycles, too few to judge growth by: that fails, and is named.
    assert [why for why in written["reasons"] if "not measured" not in why] == []
    assert code == bool(written["reasons"])


@pytest.fixture
def target_of(serve: Serve) -> Callable[..., Any]:
    """Start a server and return where to connect."""

    def start(app: App | None = None) -> LoadTarget:
        server = serve(app)
        return LoadTarget("127.0.0.1", "127.0.0.1", server.port, server.home / "certs" / "ca.crt")

    return start


def client(target: Any, seen: Seen, seed: int = 1) -> Client:
    return Client(target, Credential("user-0", KEY), random.Random(seed), seen, 0.001)


async def test_different_answer_is_wrong(target_of: Callable[..., Any]) -> None:
    app = App()

    @app.method("echo")
    def echo(**params: Any) -> dict[str, Any]:
        return {**params, "n": 99}

    target, seen = target_of(app), Seen()
    made = client(target, seen)
    await made.attempt(made.open)
    await made.attempt(made.echo, made.live[0])
    assert seen.wrong["echo: a different answer"] >= 1
    assert seen.right["echo"] == 0
    await made.leave()
    target.close()


async def test_accepted_ended_session_is_wrong(target_of: Callable[..., Any]) -> None:
    """The client expects a live session to be ended."""
    target, seen = target_of(), Seen()
    made = client(target, seen)
    await made.attempt(made.open)
    await made.attempt(made.try_ended, made.live[0].token)
    assert seen.wrong == {"an ended session was accepted": 1}
    await made.attempt(made.end, made.live[0])
    await made.attempt(made.try_ended, made.ended[0])
    assert seen.right["refused"] == 1
    await made.leave()
    target.close()


async def test_accepted_expired_session_is_wrong(target_of: Callable[..., Any]) -> None:
    target, seen = target_of(), Seen()
    made = client(target, seen)
    await made.attempt(made.open)
    made.live[0].expires_at = now_ms() - HOUR_MS
    await made.attempt(made.echo, made.live[0])
    assert seen.wrong.keys() == {"echo: an expired session was accepted"}
    await made.leave()
    target.close()


async def test_refused_live_session_is_wrong(target_of: Callable[..., Any]) -> None:
    target, seen = target_of(), Seen()
    made = client(target, seen)
    await made.attempt(made.open)
    stranger = ClientSession("ada", "x", b"x" * 32, b"y" * 32, now_ms() + HOUR_MS, now_ms() + HOUR_MS)
    await made.attempt(made.echo, stranger)
    assert seen.wrong == {"echo: UNAUTHENTICATED": 1}
    stranger.expires_at = now_ms()  # about now either is right
    await made.attempt(made.echo, stranger)
    assert seen.wrong == {"echo: UNAUTHENTICATED": 1}
    assert seen.right["expired"] >= 1
    await made.leave()
    target.close()


async def test_tolerated_garbage_is_wrong(
    target_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, seen = target_of(), Seen()
    made = client(target, seen)
    await made.attempt(made.send_garbage)
    assert seen.right == {"disconnected": 1}
    monkeypatch.setattr(clients_module.Intruder, "send", lambda self, data: None)
    monkeypatch.setattr(clients_module, "DISCONNECT_S", 0.05)
    await made.attempt(made.send_garbage)
    assert seen.wrong == {"garbage was tolerated": 1}
    target.close()


class FailingTarget:
    """A target that fails to connect, with one error after the other."""

    def __init__(self, *errors: ZcprotoError) -> None:
        self.errors = list(errors)

    async def caller(self) -> Caller:
        raise self.errors.pop(0)


async def test_delayed_lost_and_failed_calls_are_counted() -> None:
    seen = Seen()
    delayed = Unavailable("later", {"retry_after_ms": 1})
    made = client(FailingTarget(delayed, ConnectionClosed("reset"), ZcprotoError("odd")), seen)
    for _ in range(3):
        await made.attempt(made.open)
    assert seen.later == {"UNAVAILABLE": 1}
    assert seen.lost == {"reset": 1}
    assert seen.wrong == {"open: odd": 1}


async def test_client_does_everything_without_wrong_answer(target_of: Callable[..., Any]) -> None:
    target, seen = target_of(), Seen()
    made = client(target, seen, seed=3)
    running = asyncio.create_task(made.run())
    wanted = {"connect", "open", "echo", "refresh", "end", "refused", "disconnected"}
    async with asyncio.timeout(TIMEOUT):
        while not wanted <= seen.right.keys():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    made.stop()
    await running
    await made.settle()
    assert seen.wrong == {}
    assert seen.lost == {}
    target.close()


# --- the log, the plan, the report -------------------------------------------------------------------------


def test_warnings_in_log_are_counted(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "home")
    stage.log_file.write_text(
        '{"level": "info", "event": "fine"}\n{"level": "error", "event": "store.degraded"}\n{"level": "er'
    )
    assert stage.log_events() == {"error: store.degraded": 1, "(a broken line)": 1}


def test_too_short_soak_is_refused() -> None:
    SoakPlan(0.1).check()
    SoakPlan(30.0).check()
    assert SoakPlan(30.0).cycle == 30.0
    with pytest.raises(ConfigError, match="at least"):
        SoakPlan(1.0, cycle_s=20.0).check()


def test_report_names_what_was_wrong() -> None:
    made = outcome(
        seen=Seen(wrong=Counter({"echo: a different answer": 2}), lost=Counter({"reset": 1})),
        failed={"reload": "not active"},
        log_events=Counter({"error: store.degraded": 3}),
    )
    notes = "\n".join(made.report().notes)
    for words in ("wrong: echo: a different answer 2", "lost: reset 1", "reload failed: not active"):
        assert words in notes
    assert "error: store.degraded 3" in notes
    assert outcome(interrupted=True).report().exit_code == 130
