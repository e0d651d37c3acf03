"""Storms and mixes: a small run of all, and unmet bars are detected."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.scenarios import storms as module
from bench.scenarios.helper import Helper
from bench.scenarios.storm_clients import CameBack, Crowd, Honest, Hostile, Served
from bench.scenarios.storms import Mix, Storm, report
from bench.stage import memory_bytes
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import KEY
from zcproto.app.app import App
from zcproto.errors import Code, ZcprotoError
from zcproto.load import caller
from zcproto.load.plan import Credential
from zcproto.load.record import Latencies

STATS = {
    "longest_pause_s": 0.01,
    "tls_failures": {"handshake_timeout": 1},
    "errors": {str(int(Code.REPLAYED)): 2},
}


def latencies(*millis: float) -> Latencies:
    made = Latencies()
    for each in millis:
        made.add(each / 1000)
    return made


def served(**changes: Any) -> Served:
    usual: dict[str, Any] = {
        "sent": 100,
        "equal": 100,
        "connections": 16,
        "latency": latencies(*[1.0] * 99, 20.0),
        "lag": latencies(0.1, 0.2),
    }
    return Served(**{**usual, **changes})


def storm(served_s: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0), wrong: int = 0, **changes: Any) -> Storm:
    usual: dict[str, Any] = {
        "clients": 4,
        "has_bars": True,
        "at_rest": served(),
        "served": served(),
        "back": CameBack([*served_s], 5, wrong, Counter({"TLS: disconnected": 1}), 0.5, 0.7),
        "answered": 4,
        "memory_after": 60 << 20,
        "memory_peak": 61 << 20,
        "stats": STATS,
    }
    return Storm(**{**usual, **changes})


def mix(**changes: Any) -> Mix:
    usual: dict[str, Any] = {
        "kinds": ("slow", "garbage", "replay", "deaf"),
        "honest": 16,
        "served": served(),
        "memory_peak": 60 << 20,
        "stats": STATS,
        "counts": Counter({"connected": 6, "disconnected": 4, "replays_sent": 2}),
    }
    return Mix(**{**usual, **changes})


def failing(outcome: Storm | Mix) -> set[str]:
    return {row.key for row in outcome.rows() if not row.holds}


def test_good_storm_and_good_mix_pass() -> None:
    made = report({"with admission": storm(), "all kinds": mix()})
    assert made.reasons() == []
    assert made.row("all_served_s", "with admission").value == 4.0
    assert "with admission: connections that failed: TLS: disconnected 1" in made.notes


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"served_s": (1.0, 2.0, 3.0)}, {"served", "all_served_s"}),
        ({"served_s": (1.0, 2.0, 3.0, 15.0)}, {"all_served_s"}),
        ({"answered": 3}, {"verified"}),
        ({"wrong": 1}, {"wrong"}),
        ({"served": served(equal=99)}, {"honest_lost"}),
        ({"served": served(latency=latencies(*[1.0] * 9, 101.0))}, {"honest_p99_ms"}),
    ],
)
def test_unmet_bar_of_storm_fails(changes: dict[str, Any], keys: set[str]) -> None:
    assert failing(storm(**changes)) == keys


def test_storm_without_admission_is_judged_by_answers_alone() -> None:
    assert failing(storm((20.0,), served=served(equal=99), has_bars=False)) == set()
    assert failing(storm(wrong=1, has_bars=False)) == {"wrong"}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"served": served(equal=99)}, "honest_lost"),
        ({"served": served(connections=15)}, "honest_open"),
        ({"served": served(latency=latencies(*[1.0] * 9, 101.0))}, "honest_p99_ms"),
        ({"served": served(latency=Latencies())}, "honest_p99_ms"),
        ({"counts": Counter(replays_sent=3)}, "replays"),
        ({"counts": Counter(replays_sent=2, garbage_tolerated=1)}, "tolerated"),
    ],
)
def test_unmet_bar_of_mix_fails(changes: dict[str, Any], key: str) -> None:
    assert failing(mix(**changes)) == {key}


def test_mix_of_honest_alone_has_no_rows_of_hostile_clients() -> None:
    alone = mix(kinds=(), counts=Counter())
    assert {row.key for row in alone.rows()}.isdisjoint({"replays", "tolerated"})


def test_late_clients_are_noted() -> None:
    made = report({"all kinds": mix(served=served(lag=latencies(9.0)))})
    assert any("clients themselves were late (all kinds)" in note for note in made.notes)


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_small_storm_and_mix_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # No duration is promised on a machine that runs tests. The other mixes are part of the last one.
    monkeypatch.setattr(module, "ALL_SERVED_S", TIMEOUT)
    monkeypatch.setattr(module, "HONEST_P99_MS", TIMEOUT * 1000)
    monkeypatch.setattr(module, "MIXES", (module.MIXES[0], module.MIXES[-1]))
    file = tmp_path / "storms.json"
    words = ["--clients", "20", "--honest", "3", "--rate", "100", "--seconds", "4", "--comes-back", "0.3"]
    code = main(["scenario", "storms", *words, "--json", str(file)])
    assert code == 0, capsys.readouterr()
    written = json.loads(file.read_text())
    assert all(len(each) == 20 for each in written["served_s"].values())
    counts = written["counts"]["all kinds"]
    assert all(
        counts[name] > 0 for name in ("bytes_dripped", "garbage_sent", "disconnected", "deaf_requests")
    )
    assert written["figures"]["all kinds"]["replays"]["value"] > 0
    assert written["figures"]["all kinds"]["connected"]["value"] >= 4
    assert KEY not in file.read_text()


def users(count: int) -> list[Credential]:
    return [Credential(f"user-{number}", KEY) for number in range(count)]


async def test_tolerated_garbage_is_counted(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """No garbage at all looks like a server that accepts any."""
    monkeypatch.setattr("bench.scenarios.storm_clients.DISCONNECT_S", 0.05)
    monkeypatch.setattr("bench.scenarios.storm_clients.GARBAGE_BYTES", 0)
    server = serve()
    hostile = Hostile(server.port, server.home / "certs" / "ca.crt", users(1), ["garbage"], 10.0)
    await hostile.begin(over_s=0.01)
    async with asyncio.timeout(TIMEOUT):
        while not hostile.counts["garbage_tolerated"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    counts, _ = await hostile.end()
    assert counts["garbage_tolerated"] == 1
    assert counts["disconnected"] == 0


async def test_different_answer_is_not_counted_as_equal(serve: Serve) -> None:
    app = App()

    @app.method("echo")
    def echo(**params: Any) -> dict[str, Any]:
        return {**params, "n": params["n"] + (params["n"] == 7)}

    server = serve(app)
    ca_file = server.home / "certs" / "ca.crt"
    honest = Honest(server.port, ca_file, users(2), 100.0)
    await honest.open()
    found = await honest.load(0.2)
    assert (found.sent, found.equal) == (20, 19)
    assert found.failed == {"a different answer": 1}
    await honest.disconnect()
    crowd = Crowd(ca_file, users(10))
    await crowd.open(server.port)
    back = await crowd.come_back(server.port, within_s=TIMEOUT)
    assert len(back.served_s) == 10
    assert back.wrong == 1
    assert await crowd.check() == 9
    await crowd.disconnect()


async def test_crowd_without_server_gives_up(serve: Serve) -> None:
    server = serve()
    crowd = Crowd(server.home / "certs" / "ca.crt", users(2))
    await crowd.open(server.port)
    await crowd.disconnect()
    back = await crowd.come_back(1, within_s=0.0)
    assert back.served_s == []
    assert back.tries >= 2
    assert back.causes.total() == back.tries


class Dying:
    """A helper whose process ends in its first call."""

    async def add(self, first: int, second: int) -> int:
        return first + second

    async def die(self) -> None:
        raise SystemExit(1)


async def test_helper_calls_methods_in_other_process() -> None:
    async with Helper(Dying) as helper:
        assert await helper.call("add", 3, 4) == 7


class Timeout:
    """A helper that returns a constant of its process."""

    async def get(self) -> float:
        return caller.TIMEOUT


async def test_helper_replaces_constants_in_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Helper, "constants", {"zcproto.load.caller.TIMEOUT": 7.5})
    async with Helper(Timeout) as helper:
        assert await helper.call("get") == 7.5


async def test_helper_that_dies_fails_its_calls() -> None:
    async with Helper(Dying) as helper:
        for _ in range(2):
            with pytest.raises(ZcprotoError, match="the process of Dying ended unexpectedly"):
                await helper.call("die")


def test_memory_of_process_is_read() -> None:
    now, peak = memory_bytes(int(Path("/proc/self").resolve().name))
    assert 1 << 20 < now <= peak
