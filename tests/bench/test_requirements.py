"""Requirements: what fills their rows, the verdicts, and how a run is shown and written."""

from __future__ import annotations

import ast
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bench import stage
from bench.__main__ import main
from bench.curves import sizes as curve_sizes
from bench.requirements import measures, table
from bench.requirements.finding import Finding, Scale, Verdict
from bench.requirements.marked_tests import finding_of, run_marked_tests
from bench.requirements.requirement import KEYS, REQUIREMENTS
from bench.requirements.run import TESTED, Fill, RequirementRow, Run, steps_of
from bench.requirements.sizes import FULL, QUICK
from bench.stage import Stages
from zcproto.certs import authority
from zcproto.errors import ZcprotoError

GOOD = Finding("as it should be", True)
TINY = replace(
    QUICK,
    handshakes=5,
    connections=20,
    load_s=0.5,
    tokens=300,
    checks=300,
    loads=3,
    responses=200,
    rotations=2,
    rotation_rest_s=0.5,
    rotation_connections=5,
    payload_requests=20,
)
TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make own certificates of the default configuration once, with a small authority, and copy them later."""
    folder = tmp_path_factory.mktemp("own") / "certs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authority, "KEY_TYPE", "rsa-2048")
        stage.make_own_certificates(folder)
        patch.setattr(stage, "make_own_certificates", lambda copy: shutil.copytree(folder, copy))
        yield folder


def run_with(**findings: Finding | None) -> Run:
    """A good run but for these findings."""
    rows = [RequirementRow(each, findings.get(each.key, GOOD), "it broke") for each in REQUIREMENTS]
    return Run(FULL, rows)


def shown(run: Run) -> str:
    out = io.StringIO()
    table.show(run, Console(file=out, width=200))
    return out.getvalue()


# --- rows --------------------------------------------------------------------------------------------------


def test_every_requirement_is_filled_by_one_step(tmp_path: Path) -> None:
    steps = steps_of(Stages(tmp_path), Run(QUICK))
    assert Counter(key for step in steps for key in step.keys) == Counter(KEYS)
    assert len(KEYS) == len(REQUIREMENTS)


@pytest.mark.parametrize(
    ("finding", "passes", "is_proof", "words"),
    [
        (GOOD, True, True, f"all of {len(REQUIREMENTS)} requirements hold"),
        (None, False, False, "not measured: it broke"),
        (Finding("too slow", False), False, False, "requirements do not hold: HSTS max-age"),
        (Finding("too slow", False, small=True), False, False, "requirements do not hold: HSTS max-age"),
        (Finding("good", True, small=True), True, False, "1 were measured at a smaller size"),
    ],
    ids=["good", "not measured", "failed", "small and failed", "small"],
)
def test_one_row_decides_whether_a_run_passes(
    finding: Finding | None, passes: bool, is_proof: bool, words: str
) -> None:
    run = run_with(hsts=finding)
    assert run.passes is passes
    assert words in shown(run)
    written = json.loads(json.dumps(table.as_json(run)))
    assert written["passed"] is is_proof
    assert [each["key"] for each in written["requirements"]] == [each.key for each in REQUIREMENTS]
    assert not Run(FULL).passes


def test_failure_is_the_reason_of_the_rows_that_it_leaves_unfilled() -> None:
    def broken() -> Finding:
        raise ZcprotoError("the server is gone")

    out = io.StringIO()
    fill = Fill(Console(file=out, width=200))
    with fill.failing_for(("two", "three")):
        fill("one", broken)
        fill("two", lambda: GOOD)
        raise ConnectionRefusedError(111, "Connection refused")
    assert fill.found == {"two": GOOD}
    assert fill.reasons == {
        "one": "ZcprotoError: the server is gone",
        "three": "ConnectionRefusedError: [Errno 111] Connection refused",
    }
    assert "two: pass, as it should be" in out.getvalue()
    with pytest.raises(KeyError):  # a bug of the bench
        fill("four", lambda: Finding(**{}["p99"]))


STEPS = [step.name for step in steps_of(Stages(Path()), Run(TINY)) if step.name != "tests"]


@pytest.mark.parametrize("name", STEPS)
def test_small_step_measures_all_its_rows(name: str, tmp_path: Path, certificates: Path) -> None:
    """On a busy machine figures may miss their targets."""
    step = next(each for each in steps_of(Stages(tmp_path, certificates), Run(TINY)) if each.name == name)
    fill = Fill(Console(file=io.StringIO(), width=200))
    with fill.failing_for(step.keys):
        step.act(fill)
    assert fill.reasons == {}
    assert set(fill.found) == set(step.keys)
    assert all(finding is not None and finding.small and finding.values for finding in fill.found.values())


# --- slower machines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slice_ms", "slower", "verdict"), [(5.18, 1.0, "FAIL"), (5.18, 1.25, "PASS"), (50.0, 2.0, "FAIL")]
)
def test_long_slice_is_scaled_on_slower_machine(slice_ms: float, slower: float, verdict: str) -> None:
    figures = {"lapsing_rate": 200_000.0, "ending_rate": 150_000.0, "lapsing_slice_longest_ms": 1.0}
    figures["ending_slice_longest_ms"] = slice_ms
    finding = measures.cleanup_row(figures, FULL, Scale(slower))
    assert finding.verdict is Verdict[verdict]
    assert ("slower than the reference, so it counts as" in finding.figure) is (slower > 1)
    assert finding.values["longest_slice_ms"] == slice_ms
    assert Scale(slower).offered(450.0) == 450.0 / slower


# --- rows that tests show ----------------------------------------------------------------------------------


def marked_keys() -> Iterator[str]:
    texts = [path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py")]
    for text in texts:
        for node in ast.walk(ast.parse(text)) if ".requirement(" in text else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.requirement":
                yield from (str(ast.literal_eval(argument)) for argument in node.args)


def test_every_tested_requirement_has_marked_tests_and_no_other_key_is_marked() -> None:
    assert set(marked_keys()) == set(TESTED)


def test_results_of_tests_fill_a_row_unless_all_were_skipped() -> None:
    finding = finding_of({"a": "passed", "b": "failed", "c": "skipped"})
    assert finding is not None
    assert (finding.verdict, finding.figure) == (Verdict.FAIL, "1 of 2 tests passed; failed: b")
    assert finding_of({"a": "skipped"}) is finding_of({}) is None


def test_failing_marked_test_fails_its_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text(
        "import pytest\n"
        "@pytest.mark.requirement('hsts', 'logs')\ndef test_good(): pass\n"
        "@pytest.mark.requirement('logs')\ndef test_bad(): assert False\n"
        "@pytest.mark.requirement('refresh')\ndef test_other(): pass\n"
        "def test_unmarked(): assert False\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = requirement\n")
    monkeypatch.setattr("bench.requirements.marked_tests.ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(TESTS.parent))
    results = run_marked_tests(["hsts", "logs"], tmp_path)
    found = {key: finding_of(outcomes) for key, outcomes in results.items()}
    assert {key: finding and finding.holds for key, finding in found.items()} == {"hsts": True, "logs": False}
    (tmp_path / "tests" / "test_x.py").write_text("import no_such_module")
    with pytest.raises(ZcprotoError, match="pytest failed with exit code"):
        run_marked_tests(["hsts"], tmp_path)


# --- the commands ------------------------------------------------------------------------------------------


def test_one_step_is_shown_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZCPROTO_LIMITS__NONSENSE", "1")  # no server would start with it
    json_file, page = tmp_path / "out.json", tmp_path / "out.md"
    words = ["--quick", "--step", "handshakes", "--json", str(json_file), "--markdown", str(page)]
    code = main(["requirements", *words])
    output = capsys.readouterr()
    written = json.loads(json_file.read_text())
    assert code == (0 if written["requirements"][0]["holds"] else 1)
    assert "TLS handshake" in output.out
    assert "[1 of 1] handshakes" in output.err
    assert written["passed"] is False  # it was a small run
    assert written["machine"]["cpus"] >= 1
    text = page.read_text()
    assert text.startswith("# Benchmarks\n")
    assert "![Handshakes by key type](images/bench-handshakes-by-key-type.svg)" in text
    assert "<svg" in (tmp_path / "images" / "bench-handshakes-by-key-type.svg").read_text()


@pytest.mark.slow
def test_curves_are_measured_fitted_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(curve_sizes.QUICK, connections=(3, 6, 9), sessions=(1, 20, 300), requests=40, load_s=0.3)
    monkeypatch.setattr(curve_sizes, "QUICK", small)
    json_file, page = tmp_path / "out.json", tmp_path / "out.md"
    assert main(["curves", "--quick", "--json", str(json_file), "--markdown", str(page)]) == 0
    out = capsys.readouterr().out
    written = json.loads(json_file.read_text())["curves"]
    assert written["failed"] == {}
    curves = {each["key"]: each for each in written["curves"]}
    assert set(curves) == {"sessions", "payload", "depth", "connections"}
    for key, curve in curves.items():
        assert curve["title"] in out
        assert "<svg" in (tmp_path / "images" / f"bench-curve-{key}.svg").read_text()
        for series in curve["series"]:
            assert len(series["values"]) == len(curve["sizes"])
            assert series["growth"] in page.read_text()
    assert curves["connections"]["sizes"] == [3, 6, 9]
    for name in ("payload", "depth"):
        assert all(value > 0 for series in curves[name]["series"] for value in series["values"])
