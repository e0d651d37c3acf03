"""The Python client passes the kit. Some of the checks run here; this runs all of them:

zcproto-conformance python -m zcproto_conformance.python_client
"""

from __future__ import annotations

import json
import sys
from collections import Counter

from tests.conformance.helpers import SCRIPTED, failures, results_of
from tests.wire.vectors import FOLDER
from zcproto_conformance import scenarios, vectors
from zcproto_conformance.check import Check

EVERY = 8
SLOW = {
    f"scripted/{name}"
    for name in (
        *("reconnect-backoff", "revoked-token", "replaced-session", "retry-after"),
        *("keepalive", "reconnect-backoff-after-answers"),
    )
}
"""Scenarios that wait for half a second or more."""


def file_of(check: str) -> str:
    """Return the file of a check of vectors, `vectors/FILE/NAME` or `vectors/FILE`."""
    name = check.removeprefix("vectors/")
    return max((file for file in vectors.FILES if f"{name}/".startswith(f"{file}/")), key=len)


def some_vectors() -> list[Check]:
    """Return every eighth vector of each file, including the first."""
    counted: Counter[str] = Counter()
    chosen = []
    for check in vectors.checks(FOLDER):
        file = file_of(check.name)
        if counted[file] % EVERY == 0:
            chosen.append(check)
        counted[file] += 1
    return chosen


def test_every_vector_is_a_check() -> None:
    checks = vectors.checks(FOLDER)
    names = {check.name for check in checks}
    assert len(names) == len(checks)
    for file in vectors.FILES:
        count = json.loads((FOLDER / f"{file}.json").read_text()).get("count", 1)
        assert len([name for name in names if file_of(name) == file]) == count, file
    files = {path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.json")}
    assert files == {*vectors.FILES, "schema", "retry"}  # clients read those of retries


async def test_python_client_passes_vectors_of_each_file() -> None:
    assert failures(await results_of(some_vectors())) == []


async def test_python_client_passes_scripted_scenarios() -> None:
    chosen = [check for name, check in SCRIPTED.items() if name not in SLOW]
    assert failures(await results_of(chosen, jobs=6)) == []


async def test_python_client_passes_scenarios_with_the_real_server() -> None:
    wanted = {"server/echo", "server/revoked-by-another"}
    chosen = [check for check in scenarios.with_real_server() if check.name in wanted]
    assert len(chosen) == len(wanted)
    assert failures(await results_of(chosen)) == []


async def test_blocking_client_passes_scenarios_with_the_real_server() -> None:
    wanted = {"server/echo", "server/concurrent-calls"}
    chosen = [check for check in scenarios.with_real_server() if check.name in wanted]
    command = (sys.executable, "-m", "zcproto_conformance.blocking_client")
    assert failures(await results_of(chosen, command)) == []
