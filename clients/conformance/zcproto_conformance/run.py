"""Run checks: one program per job, and a harness and a result per check."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from zcproto_conformance.check import VECTORS, Check
from zcproto_conformance.errors import CheckFailed, KitError
from zcproto_conformance.harness import NO_ANSWER, Fixtures, Harness
from zcproto_conformance.program import STOP_SECONDS, Program, StepFailed

MAX_EXCEPTIONS_FILE: Final = 1 << 20
CHECK_LIMIT: Final = 10
"""Timeout of a check, as a multiple of the timeout of a step."""

START_SECONDS: Final = 60.0
"""Timeout for a program to start: some languages compile first, and several may start at once."""

PASSED: Final = "passed"
FAILED: Final = "failed"
EXCEPTED: Final = "excepted"
SKIPPED: Final = "skipped"


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a check."""

    check: Check
    result: str
    seconds: float
    why: str = ""

    def as_json(self) -> dict[str, Any]:
        document = {
            "name": self.check.name,
            "proves": self.check.proves,
            "result": self.result,
            "seconds": round(self.seconds, 3),
        }
        return {**document, "why": self.why} if self.why else document


async def run_check(check: Check, program: Program, fixtures: Fixtures, *, patience: float) -> Result:
    """Run one check. Stop a program that hangs or printed a secret; the next check starts a new one."""
    loop = asyncio.get_running_loop()
    begin = loop.time()
    program.leaked = False
    harness = Harness(program, fixtures, patience=patience)
    why, hangs = "", False
    try:
        async with asyncio.timeout(patience * CHECK_LIMIT):
            if check.name.startswith(VECTORS):
                await check.run(harness)
            else:
                async with harness:
                    await check.run(harness)
    except CheckFailed as failure:
        why = str(failure)
    except StepFailed as failure:
        why = f"a step failed: {failure}"
    except TimeoutError:
        why = f"the check did not end within {patience * CHECK_LIMIT:g} s"
        hangs = True
    hangs = hangs or harness.closed_in_time is False
    hangs = hangs or (harness.closed_in_time is None and why.startswith(NO_ANSWER))
    if program.leaked:
        why = f"the program printed a token or a key{'; ' if why else ''}{why}"
    if program.leaked or program.has_failed or hangs:
        await program.stop()
    if why and program.stderr:
        why += f"\n{program.stderr.strip()}"
    return Result(check, FAILED if why else PASSED, loop.time() - begin, why)


async def run_checks(
    checks: Sequence[Check],
    command: Sequence[str],
    fixtures: Fixtures,
    *,
    patience: float,
    jobs: int = 1,
    on_line: Callable[[str], None] | None = None,
    prepare: Callable[[Program, Check], Awaitable[None]] | None = None,
    on_result: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Run checks, `jobs` of them concurrently with a program each. Return the results in the order of the checks.

    `prepare` is called before each check. Raises KitError if the command cannot be run.
    """
    results: dict[int, Result] = {}
    left = iter(enumerate(checks))

    async def work() -> None:
        program = Program(command, stop_seconds=min(patience, STOP_SECONDS), on_line=on_line)
        try:
            features = await _hello(program, patience)
            for number, check in left:
                if check.needs and check.needs not in features:
                    why = f"the client has no {check.needs} streams"
                    results[number] = Result(check, SKIPPED, 0.0, why)
                    on_result(results[number])
                    continue
                if prepare is not None:
                    await prepare(program, check)
                results[number] = await run_check(check, program, fixtures, patience=patience)
                on_result(results[number])
        finally:
            await program.stop()

    workers = [asyncio.create_task(work()) for _ in range(min(jobs, len(checks)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await fixtures.close()
    return [results[number] for number in range(len(checks))]


async def _hello(program: Program, patience: float) -> list[Any]:
    """Check that the program implements this version of the kit. Return the features of its client."""
    try:
        async with asyncio.timeout(max(patience, START_SECONDS)):
            hello = await (await program.begin("hello", {}))
    except (CheckFailed, StepFailed, TimeoutError) as error:
        shown = f"\n{program.stderr.strip()}" if program.stderr else ""
        raise KitError(f"the program did not answer hello: {error or 'timeout'}{shown}") from error
    if not isinstance(hello, dict) or hello.get("kit") != 1:
        raise KitError(f"the program implements another version of the kit: {str(hello)[:200]}")
    features = hello.get("features", [])
    return features if isinstance(features, list) else []


# --- exceptions -------------------------------------------------------------------------------------


def load_exceptions(path: Path) -> dict[str, str]:
    """Return the reasons by the names of checks. Raises KitError if the file is invalid."""
    try:
        with path.open(encoding="utf-8") as file:
            entries = json.loads(file.read(MAX_EXCEPTIONS_FILE))
    except (OSError, ValueError) as error:
        raise KitError(f"{path}: cannot be read: {type(error).__name__}") from error
    exceptions: dict[str, str] = {}
    if not isinstance(entries, list):
        raise KitError(f"{path}: the file must hold an array")
    for entry in entries:
        name, reason = (entry.get(key) if isinstance(entry, dict) else None for key in ("check", "reason"))
        if not isinstance(name, str) or not isinstance(reason, str) or not reason.strip():
            raise KitError(f"{path}: each entry must have a check and a reason: {str(entry)[:200]}")
        if name in exceptions:
            raise KitError(f"{path}: {name} is listed twice")
        exceptions[name] = reason
    return exceptions


def apply_exceptions(
    results: Iterable[Result], exceptions: dict[str, str], known: set[str]
) -> tuple[list[Result], list[str]]:
    """Return the results with exceptions applied, and the faults of the exceptions: the list may only shrink."""
    judged = []
    faults = [
        f"{name} is listed as an exception but is not a check" for name in exceptions if name not in known
    ]
    for result in results:
        reason = exceptions.get(result.check.name)
        if reason is None:
            judged.append(result)
        elif result.result in (PASSED, SKIPPED):
            judged.append(result)
            how = "passes" if result.result == PASSED else "is skipped"
            faults.append(f"{result.check.name} {how}: remove it from the exceptions")
        else:
            judged.append(Result(result.check, EXCEPTED, result.seconds, f"{reason}\n{result.why}"))
    return judged, faults
