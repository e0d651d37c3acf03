"""Compare the accelerator with Python: with the corpus, then for a time with random calls and mutated inputs.

    python -m tests.fuzz.accelerator MODULE SECONDS SEED

MODULE is the compiled accelerator, for instance one with sanitizers. Print the number of cases.
"""

from __future__ import annotations

import random
import sys
import time
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader

NAME = "zcproto._accelerator"
TARGETS = ("frames", "messages")
BATCH = 50


def use(path: str) -> None:
    """Make the package use this module. Call it before the first import of the package."""
    loader = ExtensionFileLoader(NAME, path)
    spec = spec_from_loader(NAME, loader)
    assert spec is not None
    sys.modules[NAME] = module_from_spec(spec)
    loader.exec_module(sys.modules[NAME])


def main(path: str, seconds: float, seed: int) -> None:
    use(path)
    from tests.fuzz.corpus import CORPUS, inputs
    from tests.fuzz.mutate import mutations
    from tests.fuzz.targets import target_named
    from tests.wire.accelerators import check_random, compiled

    assert compiled is sys.modules[NAME]
    source, cases, searches = random.Random(seed), 0, []
    for target in map(target_named, TARGETS):
        corpus = list(inputs(CORPUS / target.name).values())
        for data in corpus:
            target.check(data)
        cases += len(corpus)
        searches.append((target, mutations(corpus, target.max_size, seed=seed)))
    end, replayed = time.monotonic() + seconds, cases
    while cases == replayed or time.monotonic() < end:
        for _ in range(BATCH):
            check_random(source)
            for target, made in searches:
                target.check(next(made))
        cases += BATCH * (1 + len(searches))
    print(cases)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
