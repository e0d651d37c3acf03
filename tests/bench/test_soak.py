"""A soak: seconds of it on a real server, that growth and wrong answers are seen, and the command."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.row import Row
from bench.soak import clients as clients_module
from bench.soak import command
from bench.soak import harm as harm_module
from bench.soak import run as module
from bench.soak.clients import Client, Held, Seen, now_ms
from bench.soak.command import show, soak_and_report
from bench.soak.outcome import SoakOutcome
from bench.soak.plan import SoakPlan, check_plan
from bench.soak.plot import write_plot
from bench.soak.run import log_events
from bench.soak.watch import Sample, growth, judged, per_minute
from tests.load.conftest import Serve
from tests.server.helpers import KEY, ServerThread
from zcproto.app.app import App
from zcproto.cli import main
from zcproto.errors import ConfigError, ConnectionClosed, Unavailable, ZcprotoError
from zcproto.load.caller import Place
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
        "outages": 0,
    }
    return Sample(**{**usual, **changes})


def samples(**by_minute: Callable[[int], float]) -> list[Sample]:
    """A sample a minute, nine of them."""
    return [
        sample(minute * 60.0, **{name: value(minute) for name, value in by_minute.items()})
        for minute in range(1, 10)
    ]


def outcome(**changes: Any) -> SoakOutcome:
    seen = Seen(done=Counter({"echo": 1000, "open": 20}))
    usual: dict[str, Any] = {
        "plan": SoakPlan(30.0),
        "seen": seen,
        "samples": samples(),
        "done": Counter({"rotation": 9, "reload": 9, "outage": 4}),
        "seconds": 540.0,
    }
    return SoakOutcome(**{**usual, **changes})


def row(made: SoakOutcome, key: str) -> Row:
    (found,) = (each for each in made.rows() if each.key == key)
    return found


# --- growth --------------------------------------------------------------------------------------------------


def test_what_does_not_grow_has_no_growth() -> None:
    assert growth(samples(), "memory_mib") == 0
    assert per_minute(samples(), "memory_mib") == 0


def test_growth_is_that_of_medians_after_the_warm_up() -> None:
    some = samples(memory_mib=lambda minute: 50.0 + 2 * minute)
    assert [each.at_s for each in judged(some)] == [minute * 60.0 for minute in range(4, 10)]
    assert growth(some, "memory_mib") == pytest.approx(8.0)  # minutes 4 and 5, and 8 and 9
    assert per_minute(some, "memory_mib") == pytest.approx(2.0)


def test_a_warm_up_and_a_spike_are_no_growth() -> None:
    some = samples(memory_mib=lambda minute: {1: 20.0, 2: 60.0, 8: 90.0}.get(minute, 70.0))
    assert per_minute(some, "memory_mib") == 0
    some = samples(memory_mib=lambda minute: 20.0 if minute < 4 else 70.0)
    assert growth(some, "memory_mib") == 0


def test_too_few_samples_tell_nothing() -> None:
    assert growth(samples()[:3], "tasks") is None
    assert per_minute([sample(1.0)], "tasks") is None
    assert not row(outcome(samples=samples()[:3]), "memory_growth").holds


# --- what figures prove ----------------------------------------------------------------------------------------


def test_a_good_soak_passes() -> None:
    assert outcome().reasons() == []


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"samples": samples(memory_mib=lambda minute: 70.0 + minute)}, "memory_growth"),
        ({"samples": samples(descriptors=lambda minute: 30 + minute)}, "descriptor_growth"),
        ({"samples": samples(tasks=lambda minute: 5 + minute)}, "task_growth"),
        ({"samples": samples(threads=lambda minute: 5 + minute)}, "thread_growth"),
        ({"seen": Seen(wrong=Counter({"echo: another answer": 1}))}, "wrong"),
        ({"seen": Seen(lost=Counter({"reset": 1}))}, "lost"),
        ({"errors": {"13": 1}}, "internal"),
        ({"failed": {"rotation": "no"}}, "not_done"),
    ],
)
def test_what_must_not_be_fails(changes: dict[str, Any], key: str) -> None:
    made = outcome(**changes)
    assert not row(made, key).holds
    assert any(why.startswith(row(made, key).label) for why in made.reasons())


@pytest.mark.parametrize(("minutes", "most"), [(30.0, 4.0), (120.0, 4.0), (15.0, 9.0), (3.0, 6.0)])
def test_short_runs_see_what_is_kept_fill(minutes: float, most: float) -> None:
    assert outcome(plan=SoakPlan(minutes)).memory_bound_mib == pytest.approx(most)


# --- carried out -----------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_seconds_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is done in half an hour, once: churn, a rotation, a reload and a full disk in each cycle."""
    monkeypatch.setattr(module, "OUTAGE_CHANCE", 1.0)
    monkeypatch.setattr(harm_module, "SEEN_S", 60.0)
    monkeypatch.setattr(harm_module, "RECOVER_S", 60.0)
    monkeypatch.setattr(module, "GONE_S", 60.0)
    json_file, plot = tmp_path / "soak.json", tmp_path / "soak.png"
    code = main(["bench", "--soak", "0.1", "--seed", "7", "--json", str(json_file), "--plot", str(plot)])
    said = capsys.readouterr()
    told = json.loads(json_file.read_text())
    right = told["answers"]["right"]
    assert {"connect", "open", "echo", "refresh", "end"} <= right.keys(), said
    assert told["answers"]["wrong"] == {}
    assert told["answers"]["lost"] == {}
    assert told["failed"] == {}
    figures = told["figures"]
    assert figures["rotations"]["value"] == figures["reloads"]["value"] == figures["outages"]["value"] > 0
    assert told["plan"]["seed"] == 7
    assert len(told["samples"]) >= 1
    assert all(each["connections"] == told["plan"]["steady"] + 1 for each in told["samples"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    # A machine that is slow makes fewer cycles, of which too few to judge growth by: that fails, and says so.
    reasons = [why for why in told["reasons"] if "not measured" not in why]
    assert reasons == []
    assert code == bool(told["reasons"])


@pytest.fixture
def place(serve: Serve) -> Callable[..., Any]:
    def make(app: App | None = None) -> tuple[ServerThread, Place]:
        server = serve(app)
        return server, Place("127.0.0.1", "127.0.0.1", server.port, server.home / "certs" / "ca.crt")

    return make


def client(seen: Seen, seed: int = 1) -> Client:
    return Client(Credential("user-0", KEY), random.Random(seed), seen, 0.001)


async def test_another_answer_is_wrong(place: Callable[..., Any]) -> None:
    app = App()

    @app.method("echo")
    def echo(**params: Any) -> dict[str, Any]:
        return {**params, "n": 99}

    _, where = place(app)
    seen = Seen()
    made = client(seen)
    made._place = where
    await made._guarded(made._open)
    await made._guarded(made._ask, made._live[0])
    assert seen.wrong["echo: another answer"] >= 1
    assert seen.done["echo"] == 0
    await made._leave()
    where.close()


async def test_an_ended_session_that_is_let_in_is_wrong(place: Callable[..., Any]) -> None:
    """The client is told of an end that there was not."""
    _, where = place()
    seen = Seen()
    made = client(seen)
    made._place = where
    await made._guarded(made._open)
    await made._guarded(made._try_dead, made._live[0].token)
    assert seen.wrong == {"a session that had ended was let in": 1}
    await made._guarded(made._end, made._live[0])
    await made._guarded(made._try_dead, made._dead[0])
    assert seen.done["refused"] == 1
    await made._leave()
    where.close()


async def test_an_expired_session_that_is_let_in_is_wrong(place: Callable[..., Any]) -> None:
    _, where = place()
    seen = Seen()
    made = client(seen)
    made._place = where
    await made._guarded(made._open)
    made._live[0].expires_at = now_ms() - HOUR_MS
    await made._check_echo(made._caller, made._live[0], 1, 16)  # type: ignore[arg-type]
    assert seen.wrong == {"echo: an expired session was let in": 1}
    await made._leave()
    where.close()


async def test_a_live_session_that_is_refused_is_wrong(place: Callable[..., Any]) -> None:
    _, where = place()
    seen = Seen()
    made = client(seen)
    made._place = where
    await made._guarded(made._open)
    stranger = Held("x", b"x" * 32, b"y" * 32, now_ms() + HOUR_MS, now_ms() + HOUR_MS)
    await made._guarded(made._ask, stranger)
    assert seen.wrong == {"ask: UNAUTHENTICATED": 1}
    stranger.expires_at = now_ms()  # about now either is right
    await made._guarded(made._ask, stranger)
    assert seen.wrong == {"ask: UNAUTHENTICATED": 1}
    assert seen.done["expired"] >= 1
    await made._leave()
    where.close()


async def test_who_has_been_thrown_out_says_so(
    place: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, where = place()
    seen = Seen()
    made = client(seen)
    made._place = where
    await made._guarded(made._rave)
    assert seen.done == {"thrown out": 1}
    monkeypatch.setattr(clients_module.Intruder, "send", lambda self, data: None)
    monkeypatch.setattr(clients_module, "OUT_S", 0.05)
    await made._guarded(made._rave)
    assert seen.wrong == {"garbage was suffered": 1}
    where.close()


async def test_what_is_put_off_or_lost_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen()
    made = client(seen)

    async def put_off() -> None:
        raise Unavailable("later", {"retry_after_ms": 1})

    async def lose() -> None:
        raise ConnectionClosed("reset")

    async def fail() -> None:
        raise ZcprotoError("odd")

    for act in (put_off, lose, fail):
        await made._guarded(act)
    assert seen.later == {"UNAVAILABLE": 1}
    assert seen.lost == {"reset": 1}
    assert seen.wrong == {"fail: ZcprotoError": 1}


async def test_a_client_does_everything(place: Callable[..., Any]) -> None:
    """What a client of each kind may do, until all of it was done, and nothing wrong."""
    _, where = place()
    seen = Seen()
    made = client(seen, seed=3)
    running = asyncio.create_task(made.run(where))
    wanted = {"connect", "open", "echo", "refresh", "end", "refused", "thrown out"}
    async with asyncio.timeout(60):
        while not wanted <= seen.done.keys():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    made.stop()
    await running
    await made.settle(where)
    assert seen.wrong == {}
    assert seen.lost == {}
    where.close()


# --- the log, the plan, the command ---------------------------------------------------------------------------


def test_warnings_of_the_log_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "server.log"
    file.write_text(
        '{"level": "info", "event": "fine"}\n{"level": "error", "event": "store.degraded"}\n{"level": "er'
    )
    assert log_events(file) == {"error: store.degraded": 1, "(a broken line)": 1}


def test_a_soak_has_to_be_long_enough() -> None:
    check_plan(SoakPlan(0.1))
    check_plan(SoakPlan(30.0))
    assert SoakPlan(30.0).cycle == 30.0
    with pytest.raises(ConfigError, match="at least"):
        check_plan(SoakPlan(1.0, cycle_s=20.0))


@pytest.mark.parametrize(
    ("changes", "code"),
    [({}, 0), ({"errors": {"13": 1}}, 1), ({"interrupted": True, "errors": {"13": 1}}, 130)],
)
def test_the_exit_code_is_the_verdict(
    changes: dict[str, Any], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[SoakPlan] = []

    def run(plan: SoakPlan, *others: Any) -> SoakOutcome:
        asked.append(plan)
        return outcome(**changes)

    monkeypatch.setattr(command, "run_soak", run)
    assert main(["bench", "--soak", "9", "--seed", "3"]) == code
    assert asked == [SoakPlan(9.0, seed=3)]


@pytest.mark.parametrize(
    "words", [["localhost:1", "--soak", "1"], ["--curves", "--soak", "1"], ["--soak", "0"]]
)
def test_a_soak_is_measured_alone(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    assert "--soak" in capsys.readouterr().err


def test_files_that_cannot_be_written_are_told_before(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        soak_and_report(SoakPlan(1.0), tmp_path / "no" / "where.json", None, Console(file=io.StringIO()))


def test_the_report_tells_what_was_wrong() -> None:
    made = outcome(
        seen=Seen(wrong=Counter({"echo: another answer": 2}), lost=Counter({"reset": 1})),
        failed={"reload": "not in force"},
        log_events=Counter({"error: store.degraded": 3}),
    )
    out = io.StringIO()
    show(made, Console(file=out, width=110))
    said = out.getvalue()
    for words in ("wrong: echo: another answer: 2", "lost: reset: 1", "gone wrong: reload: not in force"):
        assert words in said
    assert "error: store.degraded 3" in said
    assert "failed: of them wrong: 2.00" in said
    out = io.StringIO()
    show(dataclasses.replace(made, interrupted=True), Console(file=out, width=110))
    assert "interrupted: nothing is proven" in out.getvalue()


def test_a_plot_of_one_sample(tmp_path: Path) -> None:
    write_plot(tmp_path / "soak.svg", outcome(samples=samples()[:1], outage_spans=[(1.0, 2.0)]))
    assert b"<svg" in (tmp_path / "soak.svg").read_bytes()
