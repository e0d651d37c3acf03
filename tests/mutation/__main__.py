"""Measure what the tests detect: `python -m tests.mutation sessions auth --sample 100`.

Each mutant is a small fault in a copy of this tree (see mutants.py). The tests that mirror its module have to fail:
first `tests/ROOM/test_*MODULE*.py`, then all tests of the room. A mutant that no test detects is a gap, unless
`equivalent.toml` states why it changes nothing that a test could detect.

The result is the same for the same seed and the same tree. It is not part of `python -m tests`: a mutant takes
seconds, and a sample of 1,000 some hours.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from tests.mutation.mutants import Mutant, mutants_of

ROOT = Path(__file__).parent.parent.parent
EQUIVALENT = Path(__file__).parent / "equivalent.toml"

ROOMS = ("wire", "connection", "http", "tls", "sessions", "auth", "certs", "server", "stores", "client")
ALSO = {
    "wire": ("properties/test_wire.py",),
    "connection": (
        "properties/test_both_ends.py",
        "properties/test_server_conversation.py",
        "properties/test_client_conversation.py",
    ),
    "sessions": (
        "properties/test_session_registry.py",
        "properties/test_session_tables.py",
        "stores/service",
        "stores/test_memory_store.py",
    ),
}
"""Tests outside of a room that mirror it too."""

BAR = 98.0
_TIMEOUT_FACTOR = 4.0
_LEAST_TIMEOUT_S = 30.0
_BROKEN = b'raise SystemExit("a module that the tests have to import")\n'


class Equivalent(NamedTuple):
    """A mutant that changes nothing that a test could detect."""

    module: str
    line: str
    change: str
    reason: str


def read_equivalent() -> list[Equivalent]:
    entries = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8"))["equivalent"]
    return [Equivalent(**entry) for entry in entries]


def modules_of(names: Iterable[str]) -> list[str]:
    """Return the modules of rooms (`auth`) and modules (`auth/throttle`), relative to `zcproto`, sorted."""
    found: set[Path] = set()
    for name in names:
        path = ROOT / "zcproto" / name
        chosen = set(path.rglob("*.py")) if path.is_dir() else {path.with_suffix(".py")}
        missing = [each for each in chosen if not each.is_file()]
        if missing or not chosen:
            raise SystemExit(f"zcproto/{name} does not exist; name a room or a module, such as auth/throttle")
        found |= {each for each in chosen if each.name != "__init__.py"}
    return sorted(path.relative_to(ROOT / "zcproto").as_posix() for path in found)


def mirrored(module: str) -> tuple[list[str], list[str]]:
    """Return the tests of this module, which may not exist, and all tests of its room."""
    room, name = module.split("/", maxsplit=1)[0], Path(module).stem
    folder = ROOT / "tests" / room
    own = sorted(folder.rglob(f"test_*{name}*.py"))
    wide = [f"tests/{room}", *(f"tests/{path}" for path in ALSO.get(room, ()))]
    return [path.relative_to(ROOT).as_posix() for path in own], wide


class Workplace:
    """A copy of the tree whose modules are mutated, one at a time.

    Python takes compiled code for current if the size and the time (in seconds) of its source are the same, and
    most mutants have the size of the module. Each version of a module therefore gets a time of its own. The copy
    has its own folder of compiled code: `tests/__init__.py` would choose one only if Python may not write any.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        for name in filter(None, files.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        self._version = int(time.time())
        self._durations: dict[tuple[str, ...], float] = {}
        self._imported: set[tuple[str, tuple[str, ...]]] = set()
        self._environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
            "PYTHONPATH": f"{folder}{os.pathsep}{folder / 'clients' / 'conformance'}",
            "PYTHONPYCACHEPREFIX": str(folder / ".bytecode"),
            "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / ".hypothesis"),
        }

    def _write(self, module: str, source: bytes) -> None:
        path = self.folder / "zcproto" / module
        path.write_bytes(source)
        self._version += 2
        os.utime(path, (self._version, self._version))

    def passes(self, tests: list[str], timeout_s: float) -> tuple[bool, str]:
        """Run tests. Return whether they passed in time, and their output."""
        options = [
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-m",
            "not slow",
            "--hypothesis-seed=0",
            "--no-header",
        ]
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that servers that the tests started end with them
        )
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return False, f"no result within {timeout_s:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return process.returncode == 0, output.decode(errors="replace")

    def prepare(self, module: str, tests: list[str]) -> None:
        """Check that the tests pass as they are, and fail if the module cannot be imported."""
        key = tuple(tests)
        if key not in self._durations:
            began = time.monotonic()
            passed, output = self.passes(tests, 3600.0)
            if not passed:
                raise SystemExit(
                    f"{' '.join(tests)}: fail without a mutant; mend them first\n{output[-3000:]}"
                )
            self._durations[key] = time.monotonic() - began
        if (module, key) not in self._imported:
            source = (self.folder / "zcproto" / module).read_bytes()
            self._write(module, _BROKEN)
            passed, _ = self.passes(tests, 3600.0)
            self._write(module, source)
            if passed:
                raise SystemExit(f"{' '.join(tests)}: do not import zcproto/{module}; see ALSO")
            self._imported.add((module, key))

    def detects(self, mutant: Mutant) -> bool:
        """Return whether a test that mirrors the module fails with this mutant."""
        source = (self.folder / "zcproto" / mutant.module).read_bytes()
        for tests in filter(None, mirrored(mutant.module)):
            self.prepare(mutant.module, tests)
            timeout_s = max(_LEAST_TIMEOUT_S, _TIMEOUT_FACTOR * self._durations[tuple(tests)])
            self._write(mutant.module, mutant.apply(source))
            try:
                if not self.passes(tests, timeout_s)[0]:
                    return True
            finally:
                self._write(mutant.module, source)
        return False


def run(mutants: list[Mutant], workers: int, report: bool = True) -> list[Mutant]:
    """Return the mutants that no test detects."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder, ThreadPoolExecutor(workers) as pool:
        workplaces: SimpleQueue[Workplace] = SimpleQueue()
        for number in range(workers):
            workplaces.put(Workplace(Path(folder) / str(number)))

        def is_detected(mutant: Mutant) -> bool:
            workplace = workplaces.get()
            try:
                detected = workplace.detects(mutant)
            finally:
                workplaces.put(workplace)
            if report:
                print("detected  " if detected else "UNDETECTED", mutant, flush=True)
            return detected

        results = list(pool.map(is_detected, mutants))
    return [mutant for mutant, detected in zip(mutants, results, strict=True) if not detected]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.mutation", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("names", nargs="*", default=ROOMS, help="rooms or modules: auth, auth/throttle (all)")
    parser.add_argument("--seed", type=int, default=1, help="chooses the sample (1)")
    parser.add_argument("--sample", type=int, default=1_000, help="number of mutants, 0 for all (1000)")
    parser.add_argument("--match", default="", help="only mutants whose description contains this text")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="concurrent runs (one per CPU)"
    )
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    chosen = parser.parse_args(arguments)

    equivalent = {each[:3] for each in read_equivalent()}
    mutants = [
        mutant
        for module in modules_of(chosen.names)
        for mutant in mutants_of(module, (ROOT / "zcproto" / module).read_bytes())
        if (module, mutant.text, mutant.change) not in equivalent and chosen.match in str(mutant)
    ]
    if 0 < chosen.sample < len(mutants):
        mutants = sorted(random.Random(chosen.seed).sample(mutants, chosen.sample))
    if chosen.list or not mutants:
        print(*mutants, f"{len(mutants)} mutants", sep="\n")
        return 0
    undetected = run(mutants, chosen.workers)
    share = 100.0 * (1 - len(undetected) / len(mutants))
    print(*(f"UNDETECTED {mutant}" for mutant in undetected), sep="\n")
    print(
        f"{len(mutants) - len(undetected)} of {len(mutants)} mutants detected: {share:.1f}%, bar {BAR:.0f}%"
    )
    return 0 if share >= BAR else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
