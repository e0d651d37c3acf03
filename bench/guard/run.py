"""Run the script in a process of its own, and print what each function costs, by step, as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from bench.guard.counting import Cost, Recorder
from bench.guard.script import STEPS, run


def main() -> None:
    recorders: dict[str, Recorder] = {}

    def recorder(name: str) -> Recorder:
        return recorders.setdefault(name, Recorder())

    with tempfile.TemporaryDirectory(prefix="zcproto-guard-") as folder:
        run(Path(folder), recorder)
    costs: dict[str, dict[str, Cost]] = {
        name: recorder.costs(STEPS[name].n) for name, recorder in recorders.items()
    }
    json.dump(costs, sys.stdout)


if __name__ == "__main__":
    main()
