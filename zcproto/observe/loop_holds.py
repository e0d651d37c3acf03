"""Finds the method that holds the event loop, from a thread that looks at the stack of the loop's thread.

    the timer of LoopLag is overdue -> the stack, every SAMPLE s -> the timer runs: which method was seen?

Decides: which code a method is recognised by, and when it has held the loop.

Rules:
- Calls cost nothing: the thread only reads, and looks at a stack only while the loop's timer is overdue.
- The thread sleeps while the timer is rare, so that an idle server sleeps.
- One call must have been seen several times in a row. Many short ones in one turn of the loop are its load.
- A frame is not kept longer than the hold.
"""

from __future__ import annotations

import functools
import gc
import inspect
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from types import CodeType, FrameType
from typing import Any, Final, NamedTuple

HELD: Final = 0.1
"""Seconds from which on a hold is reported."""

CHECK: Final = 0.05
"""Seconds between looks at the timer: each makes the loop give the interpreter away for a moment."""

SAMPLE: Final = 0.015
LEAST_SEEN: Final = 3
"""Samples of one call in a row, which the shortest hold has."""

MAX_NAMES: Final = 3

_taking_stacks = threading.Lock()


def current_stacks() -> Mapping[int, FrameType]:
    """Return the newest frame of each thread, by its id.

    On Python 3.11 a garbage collection meanwhile may run code while it holds a lock of the interpreter. A thread
    that is started then waits for the lock, and all others for that thread, for ever (CPython issue 106883).
    """
    with _taking_stacks:
        is_enabled = gc.isenabled()
        gc.disable()
        try:
            return sys._current_frames()
        finally:
            if is_enabled:
                gc.enable()


class Hold(NamedTuple):
    """A method that held the loop. `at` is the line that it ran: file, line and function."""

    method: str
    at: str
    seconds: float


class SeenCall:
    """The call that the last samples have seen."""

    __slots__ = ("at", "frame", "method", "times")

    def __init__(self, method: str, frame: FrameType) -> None:
        self.method = method
        self.frame = frame
        self.times = 0
        self.at = ""


class LoopHolds:
    """Watches the loop of the thread that creates it. `overdue` returns for how many seconds its timer is overdue.

    `counts` are holds by method. `on_hold` is called in the loop after each.
    """

    def __init__(
        self,
        overdue: Callable[[], float],
        functions: Iterable[tuple[str, Callable[..., Any]]],
        on_hold: Callable[[Hold], None],
        stacks: Callable[[], Mapping[int, FrameType]] = current_stacks,
    ) -> None:
        self._overdue = overdue
        self._names = names_by_code(functions)
        self._on_hold = on_hold
        self._stacks = stacks
        self._loop_thread = threading.get_ident()
        self._seen: SeenCall | None = None
        self._held: SeenCall | None = None  # it has ended, and the timer has not run since
        self._is_awake = threading.Event()
        self._is_stopped = False
        self.counts: Counter[str] = Counter()

    def start(self) -> None:
        self._is_awake.set()
        threading.Thread(target=self._watch, name="zcproto-watch", daemon=True).start()

    def stop(self) -> None:
        self._is_stopped = True
        self._is_awake.set()

    def wake(self) -> None:
        """Watch from now on: the timer is frequent."""
        self._is_awake.set()

    def sleep(self) -> None:
        """Stop watching until `wake`."""
        self._is_awake.clear()

    def timer_ran(self, late: float) -> None:
        """Report a hold if the loop's timer ran late because of one. Called in the loop."""
        seen, self._seen, self._held = self._held or self._seen, None, None
        if late >= HELD and seen is not None and seen.times >= LEAST_SEEN:
            self.counts[seen.method] += 1
            self._on_hold(Hold(seen.method, seen.at, late))

    def sample(self) -> None:
        """Look at the stack if the timer is overdue."""
        overdue = self._overdue()
        if overdue <= 0:
            self._seen = self._held = None
            return
        frame = self._stacks().get(self._loop_thread)
        while frame is not None and frame.f_code not in self._names:
            frame = frame.f_back
        seen = self._seen
        if seen is not None and seen.frame is not frame and seen.times >= LEAST_SEEN and overdue >= HELD:
            self._held = seen
        if frame is None:
            self._seen = None
            return
        if seen is None or seen.frame is not frame:
            seen = SeenCall(self._names[frame.f_code], frame)
        seen.times += 1
        path = PurePath(frame.f_code.co_filename)
        seen.at = f"{'/'.join(path.parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
        self._seen = seen

    def _watch(self) -> None:
        while self._is_awake.wait() and not self._is_stopped:
            time.sleep(CHECK if self._seen is None else SAMPLE)
            self.sample()
            if not self._is_awake.is_set():
                self._seen = self._held = None


def names_by_code(functions: Iterable[tuple[str, Callable[..., Any]]]) -> dict[CodeType, str]:
    """Return the names of functions by their code; functions that share their code share a name."""
    names: dict[CodeType, dict[str, None]] = {}
    for name, function in functions:
        code = _code_of(function)
        if code is not None:
            names.setdefault(code, {})[name] = None
    return {
        code: ", ".join([*found][:MAX_NAMES]) + (" and others" if len(found) > MAX_NAMES else "")
        for code, found in names.items()
    }


def _code_of(function: Any) -> CodeType | None:
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    if not inspect.isroutine(function):
        function = getattr(function, "__call__", None)  # noqa: B004 - its code
    code = getattr(function, "__code__", None)
    return code if isinstance(code, CodeType) else None
