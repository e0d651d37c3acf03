"""The application of the scenario `failover_clients`: a method that leaves a trace of each run."""

from __future__ import annotations

import asyncio
import os
from functools import cache
from typing import Final

from zcproto.app.app import default_app

RUNS_VARIABLE: Final = "ZCPROTO_BENCH_RUNS"
"""The file to which all servers append the name of each call that they run."""

WORK_S: Final = 0.002

app = default_app()


@cache
def _runs() -> int:
    return os.open(os.environ[RUNS_VARIABLE], os.O_WRONLY | os.O_APPEND)


@app.method("book")
async def book(name: str) -> str:
    """Leave a trace, work for a moment, and return the name."""
    os.write(_runs(), f"{name}\n".encode())  # one write is appended whole, and outlives this process
    await asyncio.sleep(WORK_S)
    return name
