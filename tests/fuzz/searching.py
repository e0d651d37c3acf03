"""Searches with atheris, in a process of its own: libFuzzer ends it.

    python -m tests.fuzz.searching RUNS SECONDS SEED TARGET FOLDER [TARGET FOLDER ...]

The targets are imported once, noting their coverage, and each is searched in a child of this process, one after
the other. New inputs come into its folder, and what is wrong with one into FOLDER/wrong.
"""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
from pathlib import Path

import atheris

from tests.fuzz.corpus import KEPT
from tests.fuzz.target import Target, judge
from tests.fuzz.targets import target_named

INSTRUMENTED = ["zcproto", "h11"]
"""Packages whose coverage leads the search. atheris takes no smaller parts."""

SLOWED = 8.0
"""How many times slower code is that notes its coverage, at most."""

HANGS_S = 20
"""Seconds after which an input is one that hangs."""

MOST_MEMORY_MIB = 2_048


def search(target: Target, folder: Path, runs: int, seconds: int, seed: int) -> None:
    """Search until the runs or the seconds are over, or something is wrong; does not come back."""
    wrong = folder / "wrong"
    wrong.mkdir(parents=True, exist_ok=True)
    kept = KEPT / target.name
    arguments = [
        sys.argv[0],
        str(folder),
        *([str(kept)] if kept.is_dir() else []),
        f"-runs={runs}",
        f"-max_total_time={seconds}",
        f"-seed={seed}",
        f"-max_len={target.longest}",
        f"-timeout={HANGS_S}",
        f"-rss_limit_mb={MOST_MEMORY_MIB}",
        f"-artifact_prefix={wrong}/",
        "-print_final_stats=1",
        "-verbosity=1",
    ]

    def take(data: bytes) -> None:
        try:
            judge(target, data, SLOWED)
        except BaseException:
            # libFuzzer writes down what hangs or takes all memory, and not what raises.
            (wrong / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
            raise

    atheris.Setup(arguments, take)
    atheris.Fuzz()


def main(arguments: list[str]) -> int:
    runs, seconds, seed = map(int, arguments[:3])
    pairs = list(zip(arguments[3::2], arguments[4::2], strict=True))
    with atheris.instrument_imports(include=INSTRUMENTED):
        targets = [(target_named(name), Path(folder)) for name, folder in pairs]
    failed = 0
    for target, folder in targets:
        print(f"== {target.name}", flush=True)
        child = os.fork()
        if not child:
            try:
                search(target, folder, runs, seconds, seed)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        print(f"== {target.name}: ended with {code}", flush=True)
        failed += code != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
