"""The Python client's program with one more step, which applies one fault to the client or removes it.

{"id": 1, "step": "fault", "check": "scripted/wrong-salt"}
{"id": 2, "step": "fault", "check": null}
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from tests.conformance.faults import fault_of
from zcproto_conformance.python_client import Conform, Step


class FaultyConform(Conform):
    """The program, with at most one fault in the client's code at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._fault = ExitStack()

    def step(self, name: str) -> Step | None:
        return self.fault if name == "fault" else super().step(name)

    async def fault(self, step: Mapping[str, Any]) -> Any:
        self._fault.close()
        if step["check"] is not None:
            self._fault.enter_context(fault_of(step["check"]).applied())


if __name__ == "__main__":
    asyncio.run(FaultyConform().run())
