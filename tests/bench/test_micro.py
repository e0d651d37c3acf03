"""Micro benchmarks: small runs of each."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.micro import hsts_header, metrics_cost, session_cleanup
from tests.stores.valkey.server_process import PROGRAMS, needs
from zcproto.http.messages import SecurityHeaders
from zcproto.server.protocol import ServerProtocol
from zcproto.wire.frame import HEADER_SIZE
from zcproto.wire.message import decode_body

BARS = {
    "certificate_loading": {"all_p50_ms", "all_p99_ms"},
    "hot_path": {"ratio"},
    "hsts_header": {"added_ns", "alone_ns"},
    "large_bodies": {"faults", "after_mb"},
    "metrics_cost": {"added"},
    "session_cleanup": {
        *("lapsing_rate", "lapsing_slice_longest_ms", "ending_rate", "ending_slice_longest_ms"),
        *("file_rate", "added_ms"),
    },
    "session_opening": {"rate", "memory_mb", "start_s", "clean_rate"},
    "session_opening_valkey": {"rate", "news_longest_ms"},
    "session_opening_workers": {"rate", "revocation_p99_ms"},
    "token_check": {
        *("memory_mb", "check_p99_9_us"),
        *("lapsing_rate", "lapsing_slice_longest_ms", "ending_rate", "ending_slice_longest_ms"),
    },
    "typed_values": {"added"},
}
SMALL = {
    "certificate_loading": ["--loads", "3"],
    "hot_path": ["--requests", "500"],
    "hsts_header": ["--responses", "200"],
    "large_bodies": ["--requests", "6", "--connections", "3"],
    "metrics_cost": ["--requests", "2000"],
    "session_cleanup": ["--sessions", "500"],
    "session_opening": ["--sessions", "300", "--concurrency", "8"],
    "session_opening_valkey": ["--sessions", "500"],
    "session_opening_workers": [
        *("--sessions", "200", "--concurrency", "8", "--rate", "200", "--revocations", "5"),
    ],
    "token_check": ["--tokens", "300", "--checks", "500"],
    "typed_values": ["--calls", "300"],
}
WITH_VALKEY = {"session_cleanup", "session_opening_valkey"}
WITH_FOLDER = {*WITH_VALKEY, "session_opening", "session_opening_workers"}


def measured(name: str, words: list[str], file: Path) -> dict[str, dict[str, Any]]:
    code = main(["micro", name, *words, "--json", str(file)])
    written = json.loads(file.read_text())
    assert code == (0 if written["passed"] else 1)
    columns: dict[str, dict[str, dict[str, Any]]] = written["figures"]
    return next(iter(columns.values()))


@pytest.mark.parametrize(
    ("name", "program"),
    [(name, "") for name in BARS if name not in WITH_VALKEY]
    + [(name, program) for name in sorted(WITH_VALKEY) for program in PROGRAMS],
)
def test_small_run_measures_every_figure(
    name: str,
    program: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = SMALL[name]
    if program:
        needs(program)
        words = [*words, "--program", program]
    if name in WITH_FOLDER:
        words = [*words, "--folder", str(tmp_path)]
    monkeypatch.setattr(session_cleanup, "OPENED", 400)  # each waits for the disk
    file = tmp_path / "figures.json"
    rows = measured(name, words, file)
    table = capsys.readouterr().out
    assert all(row["label"] in table for row in rows.values())
    assert {key for key, row in rows.items() if row["below"] is not None or row["at_least"]} == BARS[name]
    assert all(row["value"] is not None for key, row in rows.items())
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"], "a temporary file is left"


def test_hsts_benchmark_checks_that_header_is_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hsts_header, "WITH", SecurityHeaders(tls=False))
    with pytest.raises(AssertionError):
        hsts_header.measure(100)


async def test_protocol_without_counting_answers_and_counts_nothing() -> None:
    state = metrics_cost.state_on(asyncio.get_running_loop())
    for kind, counted in ((metrics_cost.without_counting(), 0), (ServerProtocol, 3)):
        peer = metrics_cost.Peer(state, kind, "ada")
        for _ in range(3):
            peer.protocol.data_received(peer.request())
            assert decode_body(peer.transport.last[HEADER_SIZE:]) == {"data": b"x" * 64}
        echo = state.methods["echo"]
        assert (state.counters.requests, echo.calls) == (counted, counted)
        assert bool(sum(echo.durations.counts)) == bool(counted)
    state.close()


def test_changed_counting_lines_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(metrics_cost.COUNTING, "method.calls += 2", "pass")
    with pytest.raises(AssertionError, match="does not occur exactly once"):
        metrics_cost.without_counting()
