"""Search for inputs that break what must hold: `python -m tests.fuzz [TARGET ...]`.

With atheris the search is led by coverage; where it is not installed, the kept inputs are changed by chance.
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

from tests.fuzz.corpus import KEPT, ROOT, inputs, keep
from tests.fuzz.mutate import mutations
from tests.fuzz.target import Target, judge
from tests.fuzz.targets import NAMES, target_named

NO_END = -1
SEED = 1
"""Of a search; with the same one and the same inputs it tries the same."""


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    names = options.target or list(NAMES)
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        print(f"there is no target {', '.join(unknown)}; there are {', '.join(NAMES)}")
        return 2
    if options.replay:
        bad = [name for name in names if not replay(target_named(name), options.corpus)]
        return 1 if bad else 0
    with tempfile.TemporaryDirectory(prefix="zcproto-fuzz-") as folder:
        corpus = options.corpus or Path(folder)
        seconds = options.seconds if options.seconds is not None else (60 if options.runs == NO_END else 0)
        passed = search(names, corpus, options.runs, seconds, options.seed)
        if options.keep:
            for name in names:
                added, gone = keep(target_named(name), inputs(corpus / name).values())
                print(f"{name}: {added} inputs are new in {KEPT / name}, {gone} have gone")
        if not passed and options.corpus is None:
            print("with --corpus DIR the input stays there in TARGET/wrong")
    return 0 if passed else 1


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", nargs="*", help=f"all without one: {', '.join(NAMES)}")
    parser.add_argument("--seconds", type=int, help="for each target; 60 unless --runs is given")
    parser.add_argument("--runs", type=int, default=NO_END, help="inputs for each target")
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="where new inputs stay, in DIR/TARGET")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--keep", action="store_true", help="put what reaches more code into the kept corpus")
    parser.add_argument(
        "--replay", action="store_true", help="judge the inputs that are kept, and those in DIR"
    )
    return parser


def has_atheris() -> bool:
    return importlib.util.find_spec("atheris") is not None


def search(names: list[str], corpus: Path, runs: int, seconds: int, seed: int) -> bool:
    """Whether nothing wrong was found."""
    if has_atheris():
        pairs = [part for name in names for part in (name, str(corpus.resolve() / name))]
        command = [sys.executable, "-m", "tests.fuzz.searching", str(runs), str(seconds), str(seed), *pairs]
        return subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    print("atheris is not installed: by chance alone")
    targets = [target_named(name) for name in names]
    return not [
        each for each in targets if not search_by_chance(each, corpus / each.name, runs, seconds, seed)
    ]


def search_by_chance(target: Target, folder: Path, runs: int, seconds: float, seed: int) -> bool:
    known = [*inputs(KEPT / target.name).values(), *inputs(folder).values()]
    ends = time.monotonic() + seconds if seconds else float("inf")
    for done, data in enumerate(mutations(known, target.longest, seed)):
        if done == runs or time.monotonic() >= ends:
            print(f"{target.name}: {done} inputs")
            return True
        if not holds(target, data, folder / "wrong"):
            return False
    raise AssertionError("mutations have no end")


def replay(target: Target, corpus: Path | None) -> bool:
    """Judge all kept inputs; whether all are good."""
    found = inputs(KEPT / target.name)
    if corpus is not None:
        found |= inputs(corpus / target.name) | inputs(corpus / target.name / "wrong")
    good = [holds(target, data, None, name) for name, data in found.items()]
    print(f"{target.name}: {len(good)} inputs, {good.count(False)} of them bad")
    return all(good)


def holds(target: Target, data: bytes, wrong: Path | None, name: str = "by-chance") -> bool:
    """Whether an input is taken as it should be. If not, says why and leaves it in the folder `wrong`."""
    try:
        judge(target, data)
    except Exception as error:
        traceback.print_exception(error)
        print(f"{target.name}: {name}: {data[:2_000]!r}")
        if wrong is not None:
            wrong.mkdir(parents=True, exist_ok=True)
            (wrong / name).write_bytes(data)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
