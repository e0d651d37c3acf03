"""The same seed gives the same log, no invariant fails, and each planted fault is found."""

from __future__ import annotations

import subprocess
import sys
from os import environ

import pytest

from tests.simulation.faults import FAULTS

FOUND_BY = {"claims_are_not_asked": (1, "ran on")}
"""The seed that finds a fault, and what it says."""


def simulate(seed: int, *options: str, hash_seed: str = "1") -> subprocess.CompletedProcess[str]:
    """Run three servers and twelve clients for three minutes."""
    size = ["--seed", str(seed), "--hours", "0.05", "--servers", "3", "--clients", "12"]
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
    seed, says = FOUND_BY[fault]
    found = simulate(seed, "--fault", fault)
    assert found.returncode == 1
    violations = [line for line in found.stderr.splitlines() if "truth.Violation: " in line]
    assert any(says in line for line in violations), found.stderr
