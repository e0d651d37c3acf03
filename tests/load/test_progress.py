from __future__ import annotations

import io

import pytest
from rich.console import Console

from zcproto.load import progress
from zcproto.load.progress import Bars, Lines, new_console, view_for


def counts(**changes: int) -> dict[str, int]:
    return {"connect": 0, "load": 0, "verify": 0, "failed": 0, **changes}


def test_terminal_gets_bars_of_its_width_and_others_get_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(view_for(Console(file=io.StringIO(), force_terminal=True)), Bars)
    assert isinstance(view_for(Console(file=io.StringIO())), Lines)
    assert new_console().width == progress.PLAIN_WIDTH
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "77")
    assert new_console().width == 77


def test_lines_appear_at_start_end_and_every_period(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr(progress, "monotonic", lambda: now)
    out = io.StringIO()
    with Lines(Console(file=out, width=110, highlight=False)) as lines:
        lines.update(counts())  # before any phase
        lines.phase("connect", "connecting", 1_000)
        for now, done in ((50.5, 0), (51.0, 100), (52.0, 400), (53.0, 500), (54.0, 1_000), (54.5, 1_000)):  # noqa: B007
            lines.update(counts(connect=done, failed=2 if done == 400 else 0))
        lines.phase("close", "closing", 1_000)
        lines.update(counts(connect=1_000))
    assert out.getvalue().splitlines() == [
        "connecting: 1,000",
        "connecting: 400 of 1,000 (200/s), 2 failed",
        "connecting: 1,000 of 1,000 (250/s)",
        "closing: 1,000",
    ]


def test_bars_show_progress_and_failures() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=110, highlight=False, color_system=None)
    with Bars(console) as bars:
        bars.update(counts())  # before any phase
        bars.phase("connect", "connecting", 1_000)
        bars.update(counts(connect=400, failed=3))
        bars.phase("close", "closing", 1_000)
        bars.update(counts(connect=1_000))
    text = out.getvalue()
    assert "connecting" in text
    assert "400/1000" in text
    assert "3 failed" in text
    assert "closing" in text
