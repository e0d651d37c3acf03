"""Search for inputs that violate an invariant: `python -m tests.fuzz [TARGET ...]`.

With atheris the search is guided by coverage. Without it, corpus inputs are mutated at random.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.fuzz.corpus import CORPUS, ROOT, inputs, merge_into_corpus
from tests.fuzz.mutate import mutations
from tests.fuzz.target import Target, check_input
from tests.fuzz.targets import NAMES, target_named

UNLIMITED = -1
SEED = 1
"""Seed of a search; the same seed and inputs give the same mutations."""


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    names = options.target or list(NAMES)
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        print(f"unknown target {', '.join(unknown)}; choose from {', '.join(NAMES)}")
        return 2
    if options.replay:
        bad = [name for name in names if not replay(target_named(name), options.corpus)]
        return 1 if bad else 0
    with tempfile.TemporaryDirectory(prefix="zcproto-fuzz-") as folder:
        corpus = options.corpus or Path(folder)
        seconds = options.seconds if options.seconds is not None else (60 if options.runs == UNLIMITED else 0)
        passed = search(names, corpus, options.runs, seconds, options.seed)
        if options.keep:
            for name in names:
                added, gone = merge_into_corpus(target_named(name), inputs(corpus / name).values())
                print(f"{name}: {added} inputs added to {CORPUS / name}, {gone} removed")
        if not passed and options.corpus is None:
            print("use --corpus DIR to keep the input in DIR/TARGET/failed")
    return 0 if passed else 1


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", nargs="*", help=f"default: all of {', '.join(NAMES)}")
    parser.add_argument("--seconds", type=int, help="time per target; default 60 unless --runs is given")
    parser.add_argument("--runs", type=int, default=UNLIMITED, help="inputs per target")
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="store new inputs in DIR/TARGET")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--keep", action="store_true", help="add inputs that reach more code to the corpus")
    parser.add_argument(
        "--replay", action="store_true", help="check the corpus and the inputs in DIR instead of searching"
    )
    return parser


def has_atheris() -> bool:
    return importlib.util.find_spec("atheris") is not None


def search(names: list[str], corpus: Path, runs: int, seconds: int, seed: int) -> bool:
    """Return whether no input violated an invariant."""
    if has_atheris():
        pairs = [part for name in names for part in (name, str(corpus.resolve() / name))]
        command = [sys.executable, "-m", "tests.fuzz.searching", str(runs), str(seconds), str(seed), *pairs]
        return subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    print("atheris is not installed; mutating corpus inputs at random")
    targets = [target_named(name) for name in names]
    failed = [each for each in targets if not search_randomly(each, corpus / each.name, runs, seconds, seed)]
    return not failed


def search_randomly(target: Target, folder: Path, runs: int, seconds: float, seed: int) -> bool:
    known = [*inputs(CORPUS / target.name).values(), *inputs(folder).values()]
    ends = time.monotonic() + seconds if seconds else float("inf")
    for done, data in enumerate(mutations(known, target.max_size, seed)):
        if done == runs or time.monotonic() >= ends:
            print(f"{target.name}: {done} inputs")
            return True
        if not passes(target, data, folder / "failed"):
            return False
    raise AssertionError("mutations are endless")


def replay(target: Target, corpus: Path | None) -> bool:
    """Check all corpus inputs and return whether all passed."""
    found = inputs(CORPUS / target.name)
    if corpus is not None:
        found |= inputs(corpus / target.name) | inputs(corpus / target.name / "failed")
    results = [passes(target, data, None, name) for name, data in found.items()]
    print(f"{target.name}: {len(results)} inputs, {results.count(False)} failed")
    return all(results)


def passes(target: Target, data: bytes, failures: Path | None, name: str = "mutated") -> bool:
    """Return whether an input passes. If not, print why and store it in the folder `failed`."""
    try:
        check_input(target, data)
    except Exception as error:
        traceback.print_exception(error)
        print(f"{target.name}: {name}: {data[:2_000]!r}")
        if failures is not None:
            failures.mkdir(parents=True, exist_ok=True)
            (failures / name).write_bytes(data)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
