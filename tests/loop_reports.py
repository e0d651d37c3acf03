"""Fail a test while which an event loop reports an exception that no code has caught.

Such a report ("Exception in callback", "Task exception was never retrieved") only goes to a log, so that the test
would pass. All loops are watched, those of servers in other threads too. A test that provokes a report examines it:

    async def test_failing_callback_is_reported(loop_reports: LoopReports) -> None:
        ...
        (report,) = loop_reports.take()
        assert isinstance(report["exception"], ValueError)

A report that no test has taken fails the test that ends next. It names the test during which it came.
"""

from __future__ import annotations

import asyncio
import os
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest


class LoopReports:
    """Collected reports, as passed to the handler of the loop. Thread-safe."""

    def __init__(self) -> None:
        self._reports: list[tuple[str, dict[str, Any]]] = []

    def add(self, context: dict[str, Any]) -> None:
        test = os.environ.get("PYTEST_CURRENT_TEST", "outside of a test")
        self._reports.append((test, context))

    def take(self) -> list[dict[str, Any]]:
        """Return the reports since the last call."""
        reports, self._reports = self._reports, []
        return [context for _, context in reports]

    def describe(self) -> str:
        """Take the reports. Return them as text, which is empty without any."""
        reports, self._reports = self._reports, []
        return "\n".join(f"{test}: {_described(context)}" for test, context in reports)


def _described(context: dict[str, Any]) -> str:
    lines = [f"{name}: {value!r}" for name, value in context.items() if name not in ("message", "exception")]
    error = context.get("exception")
    if error is not None:
        lines += "".join(traceback.format_exception(error)).splitlines()
    return "\n    ".join([str(context.get("message")), *lines])


reports = LoopReports()


def _watch(kind: Any) -> None:
    """Report the exceptions of all loops of a class before their own handlers do."""
    handle: Callable[[Any, dict[str, Any]], None] = kind.call_exception_handler

    def call_exception_handler(loop: Any, context: dict[str, Any]) -> None:
        reports.add(context)
        handle(loop, context)

    kind.call_exception_handler = call_exception_handler


def pytest_configure() -> None:
    import uvloop

    _watch(asyncio.BaseEventLoop)
    _watch(uvloop.Loop)


@pytest.fixture
def loop_reports() -> LoopReports:
    """Return the reports of event loops, which the test has to take."""
    return reports


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_teardown() -> Iterator[None]:
    try:
        yield
    finally:
        found = reports.describe()
    if found:
        pytest.fail(f"an event loop reported\n{found}", pytrace=False)
