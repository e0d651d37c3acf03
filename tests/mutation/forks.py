"""A pytest plugin that imports the tests once and runs those that concern a mutant in a fork.

It first runs all collected tests and records the lines of `zcproto` that each executes, in its own process and in
the processes that it starts (see children.py). It then reads mutants from a socket and answers which test fails. In
the fork, the mutant replaces the code of a function. A fresh interpreter runs the tests if the import of a module
executes the changed code.
"""

from __future__ import annotations

import ast
import gc
import json
import os
import pickle
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import CodeType, FunctionType
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.limits import busyness
from tests.mutation import children

PACKAGE = children.PACKAGE
OPTIONS = (
    *("-x", "-q", "-p", "no:cacheprovider", "-p", "tests.mutation.forks", "-m", "not slow", "--no-header"),
    *("--hypothesis-profile=mutation", "--hypothesis-seed=0"),
)
SOCKET = "ZCPROTO_MUTATION_SOCKET"
LEAST_TIMEOUT_S = 10.0
TIMEOUT_FACTOR = 5.0
_MEMORY = 12 << 30  # address space; tables of sessions reserve much of it
_IS_FUNCTION = 0x2  # inspect.CO_NEWLOCALS

settings.register_profile(
    "mutation",
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),  # do not shrink: one failure is enough
    suppress_health_check=[HealthCheck.too_slow],
)
_recorder = children.new_recorder()
if SOCKET in os.environ:
    _recorder.start()  # for the lines that an import executes


class Result(NamedTuple):
    outcome: str
    """passed, failed or timed out"""

    test: str = ""
    """The test that failed or did not end."""


def changed_functions(old: CodeType, new: CodeType) -> list[tuple[CodeType, CodeType]] | None:
    """Return the outermost functions whose code differs, or None if code that runs during an import differs."""
    if old.co_flags & _IS_FUNCTION or old == new:
        return [] if old == new else [(old, new)]
    if (old.co_code, old.co_names, len(old.co_consts)) != (new.co_code, new.co_names, len(new.co_consts)):
        return None
    pairs: list[tuple[CodeType, CodeType]] = []
    for before, after in zip(old.co_consts, new.co_consts, strict=True):
        if isinstance(before, CodeType) and isinstance(after, CodeType):
            found = changed_functions(before, after)
            if found is None:
                return None
            pairs += found
        elif (type(before), before) != (type(after), after):
            return None
    return pairs


def statement_lines(source: bytes, line: int) -> range:
    """Return the lines of the innermost statement at this line, without the body of a compound statement."""
    statements = (each for each in ast.walk(ast.parse(source)) if isinstance(each, ast.stmt))
    found = [each for each in statements if each.lineno <= line <= (each.end_lineno or 0)]
    innermost = max(found, key=lambda each: each.lineno)
    body: list[ast.stmt] = getattr(innermost, "body", [])
    end = body[0].lineno - 1 if body else innermost.end_lineno or 0
    return range(innermost.lineno, max(innermost.lineno, end) + 1)


class Forks:
    """The collected tests, the lines that they execute, and forks that run some of them."""

    is_recording = False

    def __init__(self, session: pytest.Session) -> None:
        self.session = session
        self.items = {item.nodeid: item for item in session.items}
        self.lines: dict[str, dict[int, set[str]]] = {}
        _recorder.stop()
        data = _recorder.get_data()
        self.imported = {path: set(data.lines(path) or ()) for path in data.measured_files()}
        self.durations: dict[str, float] = {}
        self.functions: dict[tuple[str, CodeType], list[FunctionType]] = defaultdict(list)
        gc.unfreeze()  # the objects that tests/conftest.py has hidden from collections
        for each in gc.get_objects():
            if type(each) is FunctionType:
                self.functions[each.__code__.co_filename, each.__code__].append(each)
        gc.freeze()

    def measure(self) -> Result:
        """Run all tests and record what they execute. Those that fail while they are recorded run again."""
        with tempfile.TemporaryDirectory() as folder:
            result = self.fork(list(self.items), [], folder)
            if result.outcome != "passed":
                return result
            contexts = children.load(Path(folder))
            self.durations, failed = pickle.loads((Path(folder) / "tests").read_bytes())
        users: dict[str, set[str]] = defaultdict(set)
        for test, item in self.items.items():
            users[test].add(test)
            for name in getattr(item, "fixturenames", ()):
                users[name].add(test)
        for path, lines in contexts.items():
            self.lines[path] = {
                line: set().union(*(users.get(context, ()) for context in found))
                for line, found in lines.items()
            }
        return self.fork(failed, []) if failed else result

    def examine(self, module: str, start: int, end: int, replacement: str, version: int) -> Result:
        """Run the tests that execute the changed statement, the fastest first."""
        path = PACKAGE / module
        source = path.read_bytes()
        changed = source[:start] + replacement.encode() + source[end:]
        pairs = changed_functions(
            *(compile(each, path, "exec", dont_inherit=True) for each in (source, changed))
        )
        replaced = [
            (function, new) for old, new in pairs or () for function in self.functions[str(path), old]
        ]
        lines = self.lines.get(str(path), {})
        is_imported = not replaced
        if replaced:
            statement = statement_lines(source, source.count(b"\n", 0, start) + 1)
            chosen = set().union(*(lines.get(line, ()) for line in statement))
            is_imported = not self.imported[str(path)].isdisjoint(statement)
        else:
            chosen = set().union(*lines.values())
        tests = sorted(chosen or self.items, key=lambda test: (self.durations[test], test))
        try:
            path.write_bytes(changed)  # for subprocesses of the tests
            os.utime(path, (version, version))
            result = Result("passed")
            if replaced:
                result = self.judge(tests, lambda each: self.fork(each, replaced))
            if is_imported and result.outcome == "passed":
                result = self.judge(tests, self.run_fresh)
            return result
        finally:
            path.write_bytes(source)
            os.utime(path, (version + 1, version + 1))

    def judge(self, tests: list[str], run: Callable[[list[str]], Result]) -> Result:
        """Run tests until one fails that fails alone as well: a busy machine must not detect a mutant."""
        while tests and (result := run(tests)).test:
            if run([result.test]).test:
                return result
            tests = tests[tests.index(result.test) + 1 :]
        return Result("passed")

    def fork(
        self, tests: list[str], replaced: list[tuple[FunctionType, CodeType]], report: str = ""
    ) -> Result:
        """Run tests in a fork until one fails."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.setsid()  # so that servers that the tests started end with them
            try:
                for function, code in replaced:
                    function.__code__ = code
                self._run_tests(tests, writer, report)
            finally:
                os._exit(1)
        os.close(writer)
        current, timeout_s = tests[0], LEAST_TIMEOUT_S
        try:
            while select.select([reader], [], [], 3600.0 if report else timeout_s * busyness())[0]:
                word = os.read(reader, 8).strip().decode()
                if not word.isdecimal():  # empty if the process ended
                    return Result("passed") if word == "passed" else Result("failed", current)
                current = tests[int(word)]
                timeout_s = max(LEAST_TIMEOUT_S, TIMEOUT_FACTOR * self.durations.get(current, 0.0))
            return Result("timed out", current)
        finally:
            os.close(reader)
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)

    def _run_tests(self, tests: list[str], writer: int, report: str) -> None:
        Forks.is_recording = bool(report)
        if report:
            children.record(_recorder, Path(report))
        else:
            resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
        durations: dict[str, float] = {}
        failed: list[str] = []
        items = [self.items[test] for test in tests]
        for number, (item, following) in enumerate(zip(items, [*items[1:], None], strict=True)):
            os.write(writer, b"%8d" % number)
            began = time.monotonic()
            if report:
                children.switch_context(_recorder, item.nodeid)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            durations[item.nodeid] = time.monotonic() - began
            if self.session.testsfailed and not report:
                os.write(writer, b"failed  ")
                return
            if self.session.testsfailed:
                failed.append(item.nodeid)
                self.session.testsfailed = 0
        if report:
            children.save(_recorder, Path(report))
            (Path(report) / "tests").write_bytes(pickle.dumps((durations, failed)))
        os.write(writer, b"passed  ")

    def run_fresh(self, tests: list[str]) -> Result:
        """Run tests in a fresh interpreter until one fails."""
        timeout_s = LEAST_TIMEOUT_S + TIMEOUT_FACTOR * sum(
            10.0 / len(tests) + self.durations[test] for test in tests
        )
        with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file:
            print(*tests, sep="\n", file=file, flush=True)
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *OPTIONS, f"@{file.name}"],
                env={name: value for name, value in os.environ.items() if name != SOCKET},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                output, _ = process.communicate(timeout=timeout_s * busyness())
            except subprocess.TimeoutExpired:
                return Result("timed out", tests[-1])
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode == 0:
            return Result("passed")
        failed = re.search(rb"^(?:FAILED|ERROR) (.+?)(?: - |$)", output, re.MULTILINE)
        test = failed[1].decode() if failed else ""
        return Result("failed", test if test in self.items else tests[0])


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest
) -> Iterator[None]:
    """Attribute what a shared fixture executes to all tests that use it."""
    if Forks.is_recording and fixturedef.scope != "function":
        children.switch_context(_recorder, fixturedef.argname)
    try:
        return (yield)
    finally:
        if Forks.is_recording and fixturedef.scope != "function":
            children.switch_context(_recorder, os.environ["PYTEST_CURRENT_TEST"].rsplit(" ", 1)[0])


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    if SOCKET not in os.environ:
        return None
    forks = Forks(session)
    with socket.socket(fileno=int(os.environ[SOCKET])) as connection, connection.makefile("rw") as stream:
        print(json.dumps(forks.measure()), file=stream, flush=True)
        for line in stream:
            print(json.dumps(forks.examine(*json.loads(line))), file=stream, flush=True)
    return True
