"""The pytest plugin: a fixture with a real server, and the tracebacks of methods in the reports of failed tests.

pytest loads it by its entry point. Nothing else of zcproto is loaded until a test uses it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from zcproto.testing.incidents import incidents

if TYPE_CHECKING:
    from zcproto.app.app import App
    from zcproto.config import Config
    from zcproto.testing import LocalServer


class Serve(Protocol):
    """Start a server for an application. The arguments are those of LocalServer."""

    def __call__(self, app: App[Any], config: Config | None = None, **options: Any) -> LocalServer: ...


@pytest.fixture
def zcproto_serve() -> Iterator[Serve]:
    """Return a function that starts a real server on a free port, which ends with the test."""
    from zcproto.testing import LocalServer  # noqa: PLC0415 - loads the server

    with ExitStack() as stack:
        yield lambda app, config=None, **options: stack.enter_context(LocalServer(app, config, **options))


def pytest_runtest_setup() -> None:
    """Forget the exceptions of the test before."""
    incidents.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what methods have raised, of which callers get the incident id only."""
    report = yield
    if report.failed:
        report.sections.extend(incidents)
    return report
