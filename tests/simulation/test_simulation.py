"""The same seed gives the same log, no invariant fails, and each planted fault is found."""

from __future__ import annotations

import subprocess
import sys
from os import environ

import pytest

from tests.simulation.faults import FAULTS

SAYS = {"claims_are_not_asked": "and again on"}
"""What a simulation says that finds a fault."""

SEEDS = range(1, 7)
"""Those of which one must find a fault. Which does so differs between versions of Python."""


def simulate(
    seed: int, *options: str, hours: float = 0.05, hash_seed: str = "1"
) -> subprocess.CompletedProcess[str]:
    """Run three servers and twelve clients."""
    size = ["--seed", str(seed), "--hours", str(hours), "--servers", "3", "--clients", "12"]
    return subprocess.run(
        [sys.executable, "-m", "tests.simulation", *size, *options],
        env={**environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("seed", range(1, 4))
def test_a_seed_repeats_its_log(seed: int) -> None:
    first, second = (simulate(seed, hash_seed=each) for each in "12")
    assert first.returncode == 0, first.stderr
    digest, ended = first.stdout.splitlines()[-1].rpartition("}")[0].split(" ", 1)
    assert "'keyed'" in ended, "idempotent calls have ended"
    assert second.stdout.splitlines()[-1].startswith(f"{digest} {ended}")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str) -> None:
    for seed in SEEDS:
        ended = simulate(seed, "--fault", fault, hours=0.3)
        if ended.returncode:
            break
    violations = [line for line in ended.stderr.splitlines() if "truth.Violation: " in line]
    assert any(SAYS[fault] in line for line in violations), ended.stderr
