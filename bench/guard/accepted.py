"""The accepted counts: a file for each version of Python, with and without the accelerator.

Each file has the totals of every step and the costs of its functions, so that growth can be located without the
code that was measured, and the reason for which the counts were accepted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from bench.guard.counting import Cost
from zcproto import accelerator
from zcproto.errors import ConfigError

FOLDER: Final = Path(__file__).parent / "accepted"

Counts = Mapping[str, Mapping[str, Cost]]
"""Costs of functions, by step."""


def file_of(folder: Path = FOLDER) -> Path:
    """Return the file for this Python."""
    variant = "" if accelerator.compiled is None else "-accelerated"
    return folder / f"python-{sys.version_info[0]}.{sys.version_info[1]}{variant}.json"


def read(path: Path) -> Counts:
    """Return accepted counts. Raises ConfigError without any."""
    try:
        functions = json.loads(path.read_text(encoding="utf-8"))["functions"]
    except FileNotFoundError:
        raise ConfigError(
            [f"no counts are accepted for this Python: {path.name} is missing; write it with --accept REASON"]
        ) from None
    steps: dict[str, dict[str, Cost]] = {}
    for name, costs in functions.items():
        for step, cost in costs.items():
            steps.setdefault(step, {})[name] = Cost(*cost)
    return steps


def write(path: Path, counts: Counts, reason: str) -> None:
    """Write counts, one function in a line, so that a diff shows what changed."""
    functions: dict[str, dict[str, Cost]] = {}
    for step, costs in counts.items():
        for name, cost in costs.items():
            functions.setdefault(name, {})[step] = cost
    lines = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(each)}" for name, each in sorted(functions.items())
    )
    totals = ",\n".join(f"  {json.dumps(step)}: {json.dumps(total(costs))}" for step, costs in counts.items())
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        f'{{\n"reason": {json.dumps(reason)},\n"totals": {{\n{totals}\n}},\n"functions": {{\n{lines}\n}}\n}}\n',
        encoding="utf-8",
    )


def total(costs: Mapping[str, Cost]) -> Cost:
    return Cost(*(round(sum(each), 2) for each in zip(*costs.values(), strict=True)))
