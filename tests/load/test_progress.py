from __future__ import annotations

import io
from contextlib import closing

import pytest

from zcproto.load import progress
from zcproto.load.progress import Progress


def counts(**changes: int) -> dict[str, int]:
    return {"connect": 0, "load": 0, "verify": 0, "failed": 0, **changes}


def test_lines_appear_at_start_end_and_every_period(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr(progress, "monotonic", lambda: now)
    out = io.StringIO()
    with closing(Progress(out)) as lines:
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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_gets_one_rewritten_line_for_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr(progress, "monotonic", lambda: now)
    out = Terminal()
    with closing(Progress(out)) as shown:
        shown.update(counts())  # before any phase
        shown.phase("connect", "connecting", 1_000)
        now = 51.0
        shown.update(counts(connect=400, failed=3))
        shown.phase("close", "closing", 1_000)
    assert out.getvalue() == (
        "\rconnecting: 1,000\x1b[K"
        "\rconnecting: 400 of 1,000 (400/s), 3 failed\x1b[K\n"
        "\rclosing: 1,000\x1b[K\n"
    )
