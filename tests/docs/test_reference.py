"""The pages of docs/reference and the dashboard are what the generator writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs import generate
from tests.docs.messages import ROOT
from zcproto.alerts.alert import CATALOGUE
from zcproto.config.model import keys
from zcproto.errors import Code
from zcproto.observe.events import EVENTS
from zcproto.observe.metrics import METRICS

REFERENCE = ROOT / "docs" / "reference"


def test_generated_files_are_up_to_date() -> None:
    assert [str(path) for path in generate.outdated()] == [], "run: python -m docs.generate"


def test_reference_has_no_page_that_is_not_generated() -> None:
    assert {path.relative_to(ROOT).as_posix() for path in REFERENCE.iterdir()} <= set(generate.FILES)


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("configuration.md", keys()),
        ("metrics.md", METRICS),
        ("log-events.md", EVENTS),
        ("alerts.md", [kind.value for kind in CATALOGUE]),
    ],
)
def test_reference_page_lists_every_name_once(page: str, names: list[str]) -> None:
    text = (REFERENCE / page).read_text(encoding="utf-8")
    assert [name for name in names if text.count(f"\n| `{name}` |") != 1] == []


def test_error_page_lists_every_code_with_its_exception() -> None:
    text = (REFERENCE / "errors.md").read_text(encoding="utf-8")
    assert [code.name for code in Code if f"| {code.value} | `{code.name}` | `" not in text] == []


def test_check_reports_outdated_files_and_a_run_writes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--check"], tmp_path) == 1
    assert "docs/reference/metrics.md; run: python -m docs.generate" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert generate.main([], tmp_path) == 0
    assert generate.main(["--check"], tmp_path) == 0
    assert generate.main(["--nonsense"], tmp_path) == 2
