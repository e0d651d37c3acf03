"""Record the lines that the processes of a test execute: its own, forked ones and other interpreters.

A forked child inherits the recorder. A new interpreter starts one when it imports `sitecustomize`, which `SITE`
is the text of. Each process writes its lines to a file of its own when it ends, by `os._exit` too. What a killed
process executed is lost.
"""

from __future__ import annotations

import atexit
import os
import pickle
from collections import defaultdict
from pathlib import Path
from typing import NoReturn

import coverage

PACKAGE = Path(__file__).parent.parent.parent / "zcproto"
FOLDER = "ZCPROTO_MUTATION_LINES"
CONTEXT = "ZCPROTO_MUTATION_CONTEXT"
SITE = f"""
import os

if "{FOLDER}" in os.environ:
    from tests.mutation import children

    children.record_interpreter()
"""


def new_recorder() -> coverage.Coverage:
    return coverage.Coverage(
        data_file=None,
        config_file=False,
        include=[f"{PACKAGE}/*"],
        context=os.environ.get(CONTEXT),
    )


def switch_context(recorder: coverage.Coverage, context: str) -> None:
    """Attribute the lines that this process and its future children execute to a test or a fixture."""
    recorder.switch_context(context)
    os.environ[CONTEXT] = context


def record(recorder: coverage.Coverage, folder: Path) -> None:
    """Start recording in this process and in all that it starts."""
    os.environ[FOLDER] = str(folder)
    recorded, leave = os.getpid(), os._exit

    def save_and_leave(code: int) -> NoReturn:
        if os.getpid() != recorded or FOLDER in _interpreters:
            save(recorder, folder)
        leave(code)

    os._exit = save_and_leave  # type: ignore[assignment]
    recorder.start()


_interpreters: set[str] = set()


def record_interpreter() -> None:
    """Record this interpreter up to its end."""
    _interpreters.add(FOLDER)
    recorder, folder = new_recorder(), Path(os.environ[FOLDER])
    atexit.register(save, recorder, folder)
    record(recorder, folder)


def save(recorder: coverage.Coverage, folder: Path) -> None:
    """Write the lines of this process, with the test or fixture of each."""
    recorder.stop()
    data = recorder.get_data()
    lines = {path: data.contexts_by_lineno(path) for path in data.measured_files()}
    (folder / f"{os.getpid()}.lines").write_bytes(pickle.dumps(lines))


def load(folder: Path) -> dict[str, dict[int, set[str]]]:
    """Return the tests and fixtures that execute each line of each file."""
    found: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for file in folder.glob("*.lines"):
        for path, lines in pickle.loads(file.read_bytes()).items():
            for line, contexts in lines.items():
                found[path][line].update(contexts)
    return found
