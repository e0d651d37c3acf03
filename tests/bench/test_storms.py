"""Storms and mixes: the whole on a small scale, and that what is wrong is told."""

from __future__ import annotations

import asyncio
import io
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.row import Row
from bench.storms import __main__ as program
from bench.storms import lines as lines_module
from bench.storms import outcome as outcome_module
from bench.storms import run as run_module
from bench.storms.crowd import Crowd
from bench.storms.honest import Honest
from bench.storms.hostile import Hostile
from bench.storms.lines import Helper
from bench.storms.outcome import Felt, Mix, Storm, reasons
from bench.storms.plot import write_plot
from bench.storms.run import StormPlan, run_all
from bench.storms.stage import memory_bytes
from tests.load.conftest import Serve
from tests.server.helpers import KEY, TIMEOUT
from zcproto.app.app import App
from zcproto.common.home import Home
from zcproto.errors import ConfigError, ZcprotoError
from zcproto.load.caller import Place
from zcproto.load.latency import Latencies

QUICK = StormPlan(clients=20, honest=3, rate=100.0, rest_s=0.2, seconds=1.0, comes_back_s=0.3, within_s=30.0)


def latencies(*millis: float) -> Latencies:
    made = Latencies()
    for each in millis:
        made.add(each / 1000)
    return made


def felt(**changes: Any) -> Felt:
    usual: dict[str, Any] = {
        "sent": 100,
        "equal": 100,
        "lost": 0,
        "failed": {},
        "connections": 16,
        "latency": latencies(*[1.0] * 99, 20.0),
        "lag": latencies(0.1, 0.2),
    }
    return Felt(**{**usual, **changes})


def storm(**changes: Any) -> Storm:
    usual: dict[str, Any] = {
        "title": "with admission",
        "admission": 256,
        "clients": 4,
        "honest": 2,
        "at_rest": felt(),
        "meanwhile": felt(),
        "served_s": [1.0, 2.0, 3.0, 4.0],
        "answered": 4,
        "tries": 5,
        "wrong": 0,
        "begun_s": 0.5,
        "cpu_share": 0.7,
        "causes": {"TLS: disconnected": 1},
        "memory_before": 50 << 20,
        "memory_after": 60 << 20,
        "memory_peak": 61 << 20,
        "tls_failures": {"handshake_timeout": 1},
        "longest_pause_s": 0.01,
    }
    return Storm(**{**usual, **changes})


def mix(**changes: Any) -> Mix:
    usual: dict[str, Any] = {
        "title": "all kinds",
        "kinds": ("slow", "garbage", "replay", "deaf"),
        "hostile": 4,
        "honest": 16,
        "felt": felt(),
        "memory_peak": 60 << 20,
        "longest_pause_s": 0.01,
        "counts": {"connected": 6, "thrown_out": 4, "replays_sent": 2},
        "replays_refused": 2,
    }
    return Mix(**{**usual, **changes})


def row(outcome: Storm | Mix, key: str) -> Row:
    (found,) = (each for each in outcome.rows() if each.key == key)
    return found


# --- what figures prove ------------------------------------------------------------------------------------


def test_a_good_storm_and_a_good_mix_pass() -> None:
    assert reasons([storm(), mix()]) == []
    assert row(storm(), "all_served_s").value == 4.0
    assert row(storm(), "honest_p99_ms").value == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"served_s": [1.0, 2.0, 3.0]}, "served"),
        ({"served_s": [1.0, 2.0, 3.0]}, "all_served_s"),
        ({"served_s": [1.0, 2.0, 3.0, 15.0]}, "all_served_s"),
        ({"answered": 3}, "verified"),
        ({"wrong": 1}, "wrong"),
        ({"meanwhile": felt(equal=99)}, "honest_lost"),
        ({"meanwhile": felt(latency=latencies(*[1.0] * 9, 101.0))}, "honest_p99_ms"),
    ],
)
def test_a_storm_that_was_not_stood_is_told(changes: dict[str, Any], key: str) -> None:
    made = storm(**changes)
    assert not row(made, key).holds
    assert any(row(made, key).label in why for why in reasons([made]))


def test_without_admission_only_answers_are_judged() -> None:
    slow = storm(served_s=[20.0], meanwhile=felt(equal=99), has_bars=False)
    assert reasons([slow]) == []
    assert reasons([storm(wrong=1, has_bars=False)])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"felt": felt(equal=99, lost=1)}, "honest_lost"),
        ({"felt": felt(connections=15)}, "honest_open"),
        ({"felt": felt(latency=latencies(*[1.0] * 9, 101.0))}, "honest_p99_ms"),
        ({"felt": felt(latency=Latencies())}, "honest_p99_ms"),
        ({"replays_refused": 1}, "replays"),
        ({"counts": {"replays_sent": 2, "garbage_suffered": 1}}, "suffered"),
    ],
)
def test_a_mix_that_was_not_stood_is_told(changes: dict[str, Any], key: str) -> None:
    assert not row(mix(**changes), key).holds


def test_the_honest_alone_have_nobody_to_be_judged_by() -> None:
    alone = mix(kinds=(), hostile=0, counts={})
    assert {each.key for each in alone.rows()}.isdisjoint({"replays", "suffered"})


# --- carried out ------------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_all_of_it_on_a_small_scale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # How long anything takes is not promised on a machine that runs tests.
    monkeypatch.setattr(outcome_module, "ALL_SERVED_S", 60.0)
    monkeypatch.setattr(outcome_module, "HONEST_P99_MS", 30_000.0)
    monkeypatch.setattr(
        run_module, "MIXES", (run_module.MIXES[0], run_module.MIXES[-1])
    )  # the others are in the last
    json_file, plot = tmp_path / "storms.json", tmp_path / "storms.png"
    words = ["--clients", "20", "--honest", "3", "--rate", "100", "--seconds", "4", "--comes-back", "0.3"]
    code = program.main([*words, "--json", str(json_file), "--plot", str(plot)])
    said = capsys.readouterr()
    assert code == 0, said
    told = json.loads(json_file.read_text())
    assert [each["title"] for each in told["storms"]] == ["with admission", "without admission"]
    assert all(len(each["served_s"]) == 20 for each in told["storms"])
    by_title = {each["title"]: each for each in told["mixes"]}
    counts = by_title["all kinds"]["counts"]
    assert counts["bytes_dripped"] > 0
    assert counts["garbage_sent"] > 0
    assert counts["thrown_out"] > 0
    assert counts["deaf_requests"] > 0
    assert by_title["all kinds"]["figures"]["replays"]["value"] > 0
    assert by_title["all kinds"]["figures"]["connected"]["value"] >= 4
    assert by_title["the honest alone"]["felt"]["sent"] == 400
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert KEY not in json_file.read_text()


async def test_garbage_that_is_suffered_is_seen(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes anything is played by who never sends any."""
    monkeypatch.setattr("bench.storms.hostile.REFUSED_S", 0.05)
    monkeypatch.setattr("bench.storms.hostile.GARBAGE_BYTES", 0)
    server = serve()
    hostile = Hostile({**share(server, 1), "kinds": ["garbage"], "comes_back_s": 10.0})
    await hostile.begin(over_s=0.01)
    async with asyncio.timeout(30):
        while not hostile._counts["garbage_suffered"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    told = await hostile.end()
    assert told["garbage_suffered"] == 1
    assert told["thrown_out"] == 0


async def test_whoever_is_cut_short_in_leaving_leaves_nothing_open(serve: Serve) -> None:
    server = serve()
    place = Place("127.0.0.1", "127.0.0.1", server.port, server.home / "certs" / "ca.crt")
    caller = await place.caller()
    go_on = threading.Event()
    server.loop.call_soon_threadsafe(go_on.wait, TIMEOUT)  # the server does not close its end
    leaving = asyncio.create_task(caller.leave())
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    await asyncio.sleep(0)
    assert caller._gone.is_set()
    go_on.set()
    place.close()


async def test_another_answer_is_none(serve: Serve) -> None:
    app = App()

    @app.method("echo")
    def echo(**params: Any) -> dict[str, Any]:
        return {**params, "n": params["n"] + (params["n"] == 7)}

    server = serve(app)
    honest = Honest({**share(server, 2), "rate": 100.0})
    await honest.open()
    told = await honest.load(0.2)
    assert told["sent"] == 20
    assert told["equal"] == 19
    assert told["failed"] == {"another answer": 1}
    await honest.leave()
    crowd = Crowd(share(server, 10))
    assert await crowd.open(server.port) == {"opened": 10}
    back = await crowd.come_back(server.port, within_s=20.0)
    assert len(back["served_s"]) == 10
    assert back["wrong"] == 1
    assert await crowd.check() == {"answered": 9}
    await crowd.leave()


async def test_a_crowd_that_is_not_served_gives_up(serve: Serve) -> None:
    server = serve()
    crowd = Crowd(share(server, 2))
    await crowd.open(server.port)
    await crowd.leave()
    told = await crowd.come_back(1, within_s=0.3)
    assert told["served_s"] == []
    assert told["tries"] >= 2
    assert sum(told["causes"].values()) == told["tries"]


def share(server: Any, count: int) -> dict[str, Any]:
    return {
        "host": "127.0.0.1",
        "port": server.port,
        "ca_file": str(server.home / "certs" / "ca.crt"),
        "credentials": [[f"user-{number}", KEY] for number in range(count)],
        "seed": 1,
    }


async def test_a_helper_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        lines_module, "module_command", lambda module: [sys.executable, "-c", "input(); input()"]
    )
    async with Helper("bench.storms.nobody", {}) as helper:
        with pytest.raises(ZcprotoError, match="has ended by itself"):
            await helper.ask("open")
        with pytest.raises(ZcprotoError, match="has ended by itself"):
            await helper.ask("open")


def test_memory_is_told_of_a_process() -> None:
    now, most = memory_bytes(Path("/proc/self").resolve().name)  # type: ignore[arg-type]
    assert 1 << 20 < now <= most


# --- the program ----------------------------------------------------------------------------------------------


def said_by(outcomes: list[Storm | Mix]) -> str:
    out = io.StringIO()
    program.show(outcomes, QUICK, Console(file=out, width=140, highlight=False))
    return out.getvalue()


def test_the_report_tells_all() -> None:
    said = said_by([storm(), storm(title="without admission"), mix(kinds=(), title="alone"), mix()])
    assert "passed: every bar is met" in said
    assert "TLS: disconnected 1, server: handshake_timeout 1" in said
    assert "FAIL" not in said
    assert "FAIL" in said_by([mix(replays_refused=0)])
    assert "late were" not in said
    assert "late were the clients themselves (all kinds)" in said_by(
        [storm(), mix(felt=felt(lag=latencies(9.0)))]
    )
    assert "with admission: until all were: not measured" in said_by([storm(served_s=[])])


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (lambda: [storm()], 0),
        (lambda: [storm(wrong=1)], 1),
        (lambda: (_ for _ in ()).throw(ConfigError(["no"])), 2),
        (lambda: (_ for _ in ()).throw(ZcprotoError("no")), 1),
        (lambda: (_ for _ in ()).throw(KeyboardInterrupt), 130),
    ],
)
def test_the_exit_code_is_the_verdict(
    end: Callable[[], Any], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: object) -> Any:
        result = end()
        return result if isinstance(result, list) else next(result)

    monkeypatch.setattr(program, "run_all", run)
    assert program.main(["--clients", "20"]) == code


def test_what_is_not_known_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(ZcprotoError, match="weather"):
        run_all(QUICK, Home(tmp_path), "weather", lambda line: None)


def test_a_plot_of_either_alone(tmp_path: Path) -> None:
    for name, outcomes in (("storm", [storm()]), ("mix", [mix()])):
        write_plot(tmp_path / f"{name}.svg", outcomes)
        assert b"<svg" in (tmp_path / f"{name}.svg").read_bytes()
