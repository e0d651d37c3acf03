from __future__ import annotations

from pathlib import Path

import pytest

from tests.load.helpers import latencies, plan, verified_result
from zcproto.load.plot import curve, draw_run
from zcproto.load.record import Latencies
from zcproto.load.result import Result, Verdict


def test_curve_has_the_points_of_the_distribution() -> None:
    xs, ys = curve(latencies(100, 200, 200, 400))
    assert xs == pytest.approx([1.0, 4 / 3, 4.0, 4.0])  # from 0 %, 25 %, 75 % on; the last is the maximum
    assert ys == pytest.approx([0.1, 0.2, 0.4, 0.4])
    assert curve(Latencies()) == ([], [])


@pytest.mark.parametrize(
    "result",
    [
        pytest.param(verified_result(), id="verified"),
        pytest.param(verified_result(interrupted=True), id=Verdict.INTERRUPTED.value),
        pytest.param(Result(plan()), id="nothing"),
    ],
)
def test_every_result_can_be_plotted(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "run.png"
    draw_run(result).savefig(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000
    draw_run(result).savefig(tmp_path / "run.svg")
    assert "<svg" in (tmp_path / "run.svg").read_text()
