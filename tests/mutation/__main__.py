"""Measure what the tests detect: `python -m tests.mutation sessions auth --sample 100`.

Each mutant is a small fault in a copy of this tree (see mutants.py). One of the tests of its room that execute the
changed statement has to fail (see forks.py). A mutant that no test detects is a gap, unless `equivalent.toml`
states why it changes nothing that a test could detect.

The same seed chooses the same sample, and most of it again after a module has changed. Run a large sample in parts:
`--results FILE` appends what is found and does not repeat what is detected. It is not part of `python -m tests`.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Self

from tests.mutation import children
from tests.mutation.forks import OPTIONS, SOCKET, Result
from tests.mutation.mutants import Mutant, mutants_of

ROOT = Path(__file__).parent.parent.parent
EQUIVALENT = Path(__file__).parent / "equivalent.toml"

ROOMS = tuple(sorted(path.parent.name for path in (ROOT / "zcproto").glob("*/__init__.py")))
ALSO = {
    "wire": ("properties/test_wire.py",),
    "connection": (
        "properties/test_both_ends.py",
        "properties/test_server_conversation.py",
        "properties/test_client_conversation.py",
    ),
    "server": ("runtime/test_server_log.py", "sessions/test_binding.py"),
    "sessions": (
        "properties/test_session_registry.py",
        "properties/test_session_tables.py",
        "stores/service",
        "stores/sqlite/test_contract.py",
        "stores/test_memory_store.py",
    ),
}
"""Tests outside of a room that mirror it too."""

BAR = 98.0


class Equivalent(NamedTuple):
    """A mutant that changes nothing that a test could detect."""

    place: str
    change: str
    reason: str
    number: int = 1


def read_equivalent() -> list[Equivalent]:
    entries = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8"))["equivalent"]
    return [Equivalent(**entry) for entry in entries]


def find_equivalent() -> list[tuple[Equivalent, list[Mutant]]]:
    """Return each entry with its mutant. An entry with none or several is wrong."""
    found: list[tuple[Equivalent, list[Mutant]]] = [(entry, []) for entry in read_equivalent()]
    names = {entry.place.rpartition(".")[2].encode() for entry, _ in found}
    for module in modules_of(ROOMS):
        source = source_of(module)
        if any(name in source for name in names):
            mutants = {(each.place, each.change, each.number): each for each in mutants_of(module, source)}
            for entry, matching in found:
                mutant = mutants.get((entry.place, entry.change, entry.number))
                if mutant is not None:
                    matching.append(mutant)
    return found


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


class Room:
    """The tests of one room, in a copy of the tree whose modules are mutated one at a time.

    Python takes compiled code for current if the size and the time (in seconds) of its source are the same, and
    most mutants have the size of the module. Each version of a module therefore gets a time of its own. The copy
    has its own folder of compiled code: `tests/__init__.py` would choose one only if Python may not write any.
    """

    def __init__(self, name: str, folder: Path) -> None:
        files = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        for file in filter(None, files.stdout.decode().split("\0")):
            if (ROOT / file).is_file():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, folder / file)
        (folder / ".site").mkdir()
        (folder / ".site" / "sitecustomize.py").write_text(children.SITE, encoding="utf-8")
        self._version = int(time.time())
        ours, theirs = socket.socketpair()
        with theirs:
            tests = [f"tests/{path}" for path in (name, *ALSO.get(name, ()))]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *OPTIONS, f"--basetemp={folder}/.tmp", *tests],
                cwd=folder,
                env={
                    **{key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"},
                    "PYTHONPATH": os.pathsep.join(
                        str(folder / path) for path in (".site", "", "clients/conformance")
                    ),
                    "PYTHONPYCACHEPREFIX": str(folder / ".bytecode"),
                    SOCKET: str(theirs.fileno()),
                },
                pass_fds=[theirs.fileno()],
                stdout=subprocess.DEVNULL,
            )
        with ours:
            self._stream = ours.makefile("rw", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._process.wait()

    def _read(self) -> Result:
        line = self._stream.readline()
        if not line:
            raise SystemExit("the process of the tests ended; run them with pytest for the reason")
        return Result(*json.loads(line))

    def measure(self) -> None:
        result = self._read()
        if result.outcome != "passed":
            raise SystemExit(f"{result.test}: {result.outcome} without a mutant; mend it first")

    def examine(self, mutant: Mutant) -> Result:
        self._version += 4
        request = (mutant.module, mutant.start, mutant.end, mutant.replacement.decode(), self._version)
        print(json.dumps(request), file=self._stream, flush=True)
        return self._read()


@functools.cache
def source_of(module: str) -> bytes:
    return (ROOT / "zcproto" / module).read_bytes()


def key_of(mutant: Mutant) -> str:
    """Return a text that is the same as long as the module is."""
    return f"{hashlib.sha256(source_of(mutant.module)).hexdigest()[:16]} {mutant.start} {mutant}"


def choose(mutants: Iterable[Mutant], seed: int, size: int) -> list[Mutant]:
    """Return a sample that hardly changes while functions are edited and moved."""
    order: dict[Mutant, bytes] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for mutant in mutants:
        name = (mutant.place, mutant.change)
        order[mutant] = hashlib.sha256(f"{seed} {seen[name]} {' '.join(name)}".encode()).digest()
        seen[name] += 1
    compiling = (
        each for each in sorted(order, key=order.__getitem__) if each.compiles(source_of(each.module))
    )
    return sorted(itertools.islice(compiling, size or None))


def run(mutants: list[Mutant], workers: int, record: Callable[[Mutant, Result], object]) -> None:
    """Examine mutants, the rooms concurrently."""
    rooms: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in mutants:
        rooms[mutant.module.split("/")[0]].append(mutant)

    def examine(name: str) -> None:
        with tempfile.TemporaryDirectory(prefix="mutation-") as folder, Room(name, Path(folder)) as room:
            room.measure()
            for mutant in rooms[name]:
                record(mutant, room.examine(mutant))

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(examine, rooms))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.mutation", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("names", nargs="*", default=ROOMS, help="rooms or modules: auth, auth/throttle (all)")
    parser.add_argument("--seed", type=int, default=1, help="chooses the sample (1)")
    parser.add_argument("--sample", type=int, default=1_000, help="number of mutants, 0 for all (1000)")
    parser.add_argument(
        "--match", default="", help="only those of the sample whose description contains this"
    )
    parser.add_argument(
        "--results", type=Path, help="file to append results to; what it detects is not repeated"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="concurrent rooms (one per CPU)"
    )
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument(
        "--report", action="store_true", help="report the results of the file and run nothing"
    )
    chosen = parser.parse_args(arguments)

    equivalent = {mutant for _, found in find_equivalent() for mutant in found}
    mutants = choose(
        (
            mutant
            for module in modules_of(chosen.names)
            for mutant in mutants_of(module, source_of(module))
            if mutant not in equivalent
        ),
        chosen.seed,
        chosen.sample,
    )
    mutants = [each for each in mutants if chosen.match in str(each)]
    if chosen.list or not mutants:
        print(*mutants, f"{len(mutants)} mutants", sep="\n")
        return 0
    results: dict[str, Result] = {}
    if chosen.results and chosen.results.exists():
        for line in chosen.results.read_text(encoding="utf-8").splitlines():
            key, *result = json.loads(line)
            results[key] = Result(*result)

    def record(mutant: Mutant, result: Result) -> None:
        results[key_of(mutant)] = result
        print(f"{result.outcome:9}", mutant, flush=True)
        if chosen.results:
            with chosen.results.open("a", encoding="utf-8") as file:
                print(json.dumps((key_of(mutant), *result)), file=file)

    if not chosen.report:
        undetected = ("", "passed")
        run(
            [each for each in mutants if results.get(key_of(each), ("",))[0] in undetected],
            chosen.workers,
            record,
        )
    return report([(mutant, results[key_of(mutant)]) for mutant in mutants if key_of(mutant) in results])


def report(results: list[tuple[Mutant, Result]]) -> int:
    """Print mutants that no test detects and the numbers of each room. Return the exit status."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for mutant, result in results:
        for name in (mutant.module.split("/")[0], "all"):
            counts[name][result.outcome] += 1
        if result.outcome != "failed":
            print("UNDETECTED" if result.outcome == "passed" else "timed out ", mutant, result.test)
    for name, count in sorted(counts.items()):
        share = 100.0 * (1 - count["passed"] / count.total())
        numbers = (
            f"{count.total():5} mutants, {count['timed out']:3} timed out, {count['passed']:3} undetected"
        )
        print(f"{name:10} {numbers}: {share:5.1f}%")
    return 0 if 100.0 * (1 - counts["all"]["passed"] / max(1, len(results))) >= BAR else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
