"""Limits that end what hangs. None of them says how fast a machine has to be.

A test has one limit: `timeout` in `pyproject.toml`, or `@pytest.mark.timeout`. It is in seconds of an idle machine:
while many programs run, a second counts less. `TIMEOUT` is for waits inside a test (a socket, a program, a
condition). It is longer, because on an idle machine the limit of the test comes first and shows all stacks.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
from typing import Any

import pytest
import pytest_timeout

TIMEOUT = 900.0
"""Seconds after which a wait has failed on any machine."""

TICK_S = 15.0
"""Interval at which the time of a test is counted: longer than nearly all tests, which are not interrupted."""

SWALLOWED_S = 60.0
"""Seconds after its limit at which a test that has caught the exception is ended together with its process."""


def busyness() -> float:
    """Return by how much other processes slow this one down: running processes per processor, at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def end_process(item: Any) -> None:
    """Print the stacks of all threads, and end this process."""
    capture = item.config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)
    print(f"\n{item.nodeid}: goes on after its timeout", file=sys.__stderr__)
    faulthandler.dump_traceback(sys.__stderr__)
    os._exit(1)


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: Any, settings: Any) -> bool | None:
    """Start the limit of a test. Implements a hook of pytest-timeout."""
    if settings.method != "signal" or threading.current_thread() is not threading.main_thread():
        return None
    left, is_over = settings.timeout, False

    def tick(number: int, frame: object) -> None:
        nonlocal left, is_over
        left -= interval / busyness()
        if left > 0:
            return
        if is_over:
            end_process(item)
        else:
            left, is_over = SWALLOWED_S, True
            pytest_timeout.timeout_sigalrm(item, settings)

    def cancel() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    interval = min(TICK_S, settings.timeout)
    item.cancel_timeout = cancel
    signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, interval, interval)
    return True
