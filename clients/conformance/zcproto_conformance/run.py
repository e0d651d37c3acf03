"""Running checks: one program for all, a stage for each, a result for each."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from zcproto_conformance.check import VECTORS, Check
from zcproto_conformance.errors import CheckFailed, KitError
from zcproto_conformance.program import STOP_SECONDS, Program, Refused
from zcproto_conformance.stage import NO_ANSWER, Fixtures, Stage

MAX_EXCEPTIONS_FILE: Final = 1 << 20
CHECK_LIMIT: Final = 10
"""A check may take so many times the patience for one step; no usual one comes near it."""

START_SECONDS: Final = 60.0
"""For a program to start: some languages compile first, and several may start at once."""

PASSED: Final = "passed"
FAILED: Final = "failed"
EXCEPTED: Final = "excepted"


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a check."""

    check: Check
    result: str
    seconds: float
    why: str = ""

    def as_json(self) -> dict[str, Any]:
        said = {"name": self.check.name, "proves": self.check.proves, "result": self.result}
        return {**said, "seconds": round(self.seconds, 3), **({"why": self.why} if self.why else {})}


async def run_check(check: Check, program: Program, fixtures: Fixtures, *, patience: float) -> Result:
    """Run one check. A program that hangs or put out a secret is stopped, and the next check gets a new one."""
    loop = asyncio.get_running_loop()
    begin = loop.time()
    program.leaked = False
    stage = Stage(program, fixtures, patience=patience)
    why, hangs = "", False
    try:
        async with asyncio.timeout(patience * CHECK_LIMIT):
            if check.name.startswith(VECTORS):
                await check.run(stage)
            else:
                async with stage:
                    await check.run(stage)
    except CheckFailed as broken:
        why = str(broken)
    except Refused as refused:
        why = f"a step failed: {refused}"
    except TimeoutError:
        why = f"it was not over within {patience * CHECK_LIMIT:g} s"
        hangs = True
    hangs = hangs or stage.answered_at_end is False
    hangs = hangs or (stage.answered_at_end is None and why.startswith(NO_ANSWER))
    if program.leaked:
        why = f"a token or a key was put out{'; ' if why else ''}{why}"
    if program.leaked or program.is_gone or hangs:
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
    tell: Callable[[str], None] | None = None,
    prepare: Callable[[Program, Check], Awaitable[None]] | None = None,
    on_result: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Run checks, `jobs` of them at a time with a program each. The results are in the order of the checks.

    `prepare` is called before each check. Raises KitError if the command cannot be run.
    """
    results: dict[int, Result] = {}
    left = iter(enumerate(checks))

    async def work() -> None:
        program = Program(command, stop_seconds=min(patience, STOP_SECONDS), tell=tell)
        try:
            await _greet(program, patience)
            for number, check in left:
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


async def _greet(program: Program, patience: float) -> None:
    """The program must be one that was made for this kit. It has time to start, however short patience is."""
    try:
        async with asyncio.timeout(max(patience, START_SECONDS)):
            hello = await (await program.begin("hello", {}))
    except (CheckFailed, Refused, TimeoutError) as error:
        shown = f"\n{program.stderr.strip()}" if program.stderr else ""
        raise KitError(f"the program does not answer hello: {error or 'in time'}{shown}") from error
    if not isinstance(hello, dict) or hello.get("kit") != 1:
        raise KitError(f"the program was made for another kit: {str(hello)[:200]}")


# --- exceptions -------------------------------------------------------------------------------------


def load_exceptions(path: Path) -> dict[str, str]:
    """The reasons by the names of checks. Raises KitError for a file that is not as it must be."""
    try:
        with path.open(encoding="utf-8") as file:
            entries = json.loads(file.read(MAX_EXCEPTIONS_FILE))
    except (OSError, ValueError) as error:
        raise KitError(f"{path}: cannot be read: {type(error).__name__}") from error
    exceptions: dict[str, str] = {}
    if not isinstance(entries, list):
        raise KitError(f"{path}: it must be an array")
    for entry in entries:
        name, reason = (entry.get(key) if isinstance(entry, dict) else None for key in ("check", "reason"))
        if not isinstance(name, str) or not isinstance(reason, str) or not reason.strip():
            raise KitError(f"{path}: each entry must have a check and a reason: {str(entry)[:200]}")
        if name in exceptions:
            raise KitError(f"{path}: {name} is there twice")
        exceptions[name] = reason
    return exceptions


def apply_exceptions(
    results: Iterable[Result], exceptions: dict[str, str], known: set[str]
) -> tuple[list[Result], list[str]]:
    """The results with exceptions in them, and what is wrong with the exceptions: the list may only shrink."""
    judged = []
    faults = [f"{name} is an exception, and no check" for name in exceptions if name not in known]
    for result in results:
        reason = exceptions.get(result.check.name)
        if reason is None:
            judged.append(result)
        elif result.result == PASSED:
            judged.append(result)
            faults.append(f"{result.check.name} passes: take it out of the exceptions")
        else:
            judged.append(Result(result.check, EXCEPTED, result.seconds, f"{reason}\n{result.why}"))
    return judged, faults
