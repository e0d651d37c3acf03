"""Reports of a run: a line for each check that did not pass, a table, and a JSON file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from zcproto.common.text import escape_text
from zcproto_conformance.check import PARTS, Check
from zcproto_conformance.run import EXCEPTED, FAILED, PASSED, SKIPPED, Result

WHY_SHOWN = 2_000


def lines_of(result: Result) -> Iterator[str]:
    """Yield a check, what it proves, and why it failed."""
    yield f"{result.result:8} {result.check.name}   {result.check.proves}"
    if result.why:
        for line in result.why[:WHY_SHOWN].splitlines():
            yield f"         {escape_text(line, WHY_SHOWN)}"


def table(results: Sequence[Result]) -> Iterator[str]:
    """Yield a table of the number of results by part."""
    yield f"{'part':10}{'checks':>8}{'passed':>8}{'skipped':>9}{'excepted':>10}{'failed':>8}{'seconds':>9}"
    for part in PARTS:
        of_part = [result for result in results if part_of(result.check) == part]
        if of_part:
            yield _row(part, of_part)
    yield _row("all", results)


def _row(name: str, results: Sequence[Result]) -> str:
    count = Counter(result.result for result in results)
    seconds = sum(result.seconds for result in results)
    cells = f"{count[PASSED]:>8}{count[SKIPPED]:>9}{count[EXCEPTED]:>10}{count[FAILED]:>8}{seconds:>9.1f}"
    return f"{name:10}{len(results):>8}{cells}"


def part_of(check: Check) -> str:
    return check.name.partition("/")[0]


def listing(checks: Iterable[Check]) -> Iterator[str]:
    """Yield each check with what it proves."""
    for check in checks:
        yield f"{check.name}   {check.proves}"


def write_json(path: Path, command: Sequence[str], results: Sequence[Result], faults: Sequence[str]) -> None:
    """Write the results to a file. Raises OSError."""
    document = {
        "kit": 1,
        "command": list(command),
        "passed": not faults and all(result.result != FAILED for result in results),
        "exceptions_wrong": list(faults),
        "checks": [result.as_json() for result in results],
    }
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
