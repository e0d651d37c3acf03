"""Count what Python executes in a block: bytecode instructions and calls, by function.

These counts depend on the code and on the version of Python alone. Machine, load, hash seed and the interpreter's
build do not change them: Debian's 3.11.2 and pyenv's 3.11.7 count the same, while their native instructions differ
by 4 %. They do not include what a function in C does, only its call.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType, FunctionType, MethodType, TracebackType
from typing import Any, Final, NamedTuple

HARNESS: Final = str(Path(__file__).parent)
LOOP: Final = tuple(f"asyncio/{name}.py" for name in ("base_events", "events", "selector_events"))
"""The pure event loop, which uvloop replaces in servers."""

ROOT: Final = Path(__file__).parents[2]
TOOL: Final = 3
"""One that sys.monitoring leaves to its users."""


class Cost(NamedTuple):
    bytecodes: float
    calls: float


class Recorder:
    """Counts while its block runs; may be entered again."""

    def __init__(self) -> None:
        self.bytecodes: Counter[CodeType] = Counter()
        self.entered: Counter[CodeType] = Counter()
        self.called: Counter[Any] = Counter()
        """Functions and classes in C."""
        self._skipped: dict[CodeType, bool] = {}

    def __enter__(self) -> None:
        if sys.version_info >= (3, 12):
            self._monitor()
        else:
            sys.setprofile(self._profile)
            sys.settrace(self._trace)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if sys.version_info >= (3, 12):
            sys.monitoring.set_events(TOOL, 0)
            sys.monitoring.free_tool_id(TOOL)
        else:
            sys.settrace(None)
            sys.setprofile(None)

    def _skips(self, code: CodeType) -> bool:
        found = self._skipped.get(code)
        if found is None:
            name = code.co_filename
            found = self._skipped[code] = name.startswith(HARNESS) or name.endswith(LOOP)
        return found

    # --- Python 3.11: the trace function misses nothing, later ones do -----------------------------------

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if self._skips(frame.f_code):
            return None
        self.entered[frame.f_code] += 1
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._trace_inside

    def _trace_inside(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "opcode":
            self.bytecodes[frame.f_code] += 1
        return self._trace_inside

    def _profile(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and not self._skips(frame.f_code):
            self.called[_name_of(function)] += 1

    # --- Python 3.12 and later ------------------------------------------------------------------------

    if sys.version_info >= (3, 12):

        def _monitor(self) -> None:
            def instruction(code: CodeType, offset: int) -> object:
                if self._skips(code):
                    return sys.monitoring.DISABLE
                self.bytecodes[code] += 1
                return None

            def entered(code: CodeType, offset: int) -> None:
                if not self._skips(code):
                    self.entered[code] += 1

            def called(code: CodeType, offset: int, function: object, argument: object) -> None:
                if not isinstance(function, FunctionType | MethodType) and not self._skips(code):
                    self.called[_name_of(function)] += 1

            monitoring, events = sys.monitoring, sys.monitoring.events
            monitoring.use_tool_id(TOOL, "bench guard")
            for event, callback in (
                (events.INSTRUCTION, instruction),
                (events.PY_START, entered),
                (events.PY_RESUME, entered),
                (events.CALL, called),
            ):
                monitoring.register_callback(TOOL, event, callback)
            monitoring.set_events(TOOL, events.INSTRUCTION | events.PY_START | events.PY_RESUME | events.CALL)

    # --- what was counted ----------------------------------------------------------------------------------

    def costs(self, units: int) -> dict[str, Cost]:
        """Return what each function costs per unit."""
        bytecodes: Counter[str] = Counter()
        calls: Counter[str] = Counter(self.called)
        for code, count in self.bytecodes.items():
            bytecodes[_place_of(code)] += count
        for code, count in self.entered.items():
            calls[_place_of(code)] += count
        names = sorted(bytecodes.keys() | calls.keys())
        return {
            name: Cost(round(bytecodes[name] / units, 2), round(calls[name] / units, 2)) for name in names
        }


def _name_of(function: Any) -> str:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    owner = getattr(function, "__module__", None)
    return f"{owner}.{name}" if isinstance(owner, str) and owner != "builtins" else str(name)


def _place_of(code: CodeType) -> str:
    path = Path(code.co_filename)
    parts = path.relative_to(ROOT).parts if path.is_relative_to(ROOT) else path.parts[-2:]
    return f"{'/'.join(parts)} {code.co_qualname}"
