"""Search with atheris, in a separate process because libFuzzer exits it.

    python -m tests.fuzz.searching RUNS SECONDS SEED TARGET FOLDER [TARGET FOLDER ...]

The targets are imported once with instrumentation, and each is searched in a forked child, one after the other. New
inputs are stored in FOLDER, and failing inputs in FOLDER/failed.
"""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
from pathlib import Path

import atheris

from tests.fuzz.corpus import CORPUS
from tests.fuzz.target import Target, check_input
from tests.fuzz.targets import target_named
from tests.limits import TIMEOUT

INSTRUMENTED = ["zcproto", "h11"]
"""Packages whose coverage guides the search; atheris instruments whole packages only."""

INSTRUMENTED_FACTOR = 8.0
"""Upper bound of how many times slower instrumented code is."""

HANG_TIMEOUT_S = round(TIMEOUT)
"""Time after which libFuzzer reports an input as hanging."""

MAX_MEMORY_MIB = 2_048


def search(target: Target, folder: Path, runs: int, seconds: int, seed: int) -> None:
    """Search until runs or seconds are used up or an input fails. Does not return."""
    failures = folder / "failed"
    failures.mkdir(parents=True, exist_ok=True)
    corpus = CORPUS / target.name
    arguments = [
        sys.argv[0],
        str(folder),
        *([str(corpus)] if corpus.is_dir() else []),
        f"-runs={runs}",
        f"-max_total_time={seconds}",
        f"-seed={seed}",
        f"-max_len={target.max_size}",
        f"-timeout={HANG_TIMEOUT_S}",
        f"-rss_limit_mb={MAX_MEMORY_MIB}",
        f"-artifact_prefix={failures}/",
        "-print_final_stats=1",
        "-verbosity=1",
    ]

    def run(data: bytes) -> None:
        try:
            check_input(target, data, INSTRUMENTED_FACTOR)
        except BaseException:
            # libFuzzer stores inputs that hang or exhaust memory, but not those that raise.
            (failures / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
            raise

    atheris.Setup(arguments, run)
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
        print(f"== {target.name}: exit code {code}", flush=True)
        failed += code != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
