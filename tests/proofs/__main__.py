"""Prove the accelerator: `python -m tests.proofs [--all] [NAME ...]`. Exit with 1 if a proof fails.

With --faults, plant each fault of faults.py, and exit with 1 if a proof does not find it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tests.proofs.faults import FAULTS, find_fault
from tests.proofs.proofs import PROOFS, Proof, prove


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.proofs", description=__doc__)
    parser.add_argument("--all", action="store_true", help="also the proofs that take a minute or more")
    parser.add_argument("--faults", action="store_true", help="find the planted faults instead")
    parser.add_argument("names", nargs="*", metavar="NAME", help="functions of zcproto/_accelerator.c")
    chosen = parser.parse_args(arguments)
    names = {proof.of for proof in PROOFS}
    if unknown := set(chosen.names) - names:
        print(f"unknown function {min(unknown)}; choose from {', '.join(sorted(names))}")
        return 2
    if shutil.which("cbmc") is None:
        print("cbmc is not installed; on Debian: apt-get install cbmc")
        return 2
    proofs = [
        proof
        for proof in PROOFS
        if (proof.of in chosen.names if chosen.names else chosen.all or proof.is_quick)
    ]
    if chosen.faults:
        return find_faults(proofs)
    failed = 0
    print(f"{'function':16} {'proved for':50} {'checks':>6} {'seconds':>8}  result")
    with (
        tempfile.TemporaryDirectory(prefix="zcproto-proofs-") as folder,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        running = {pool.submit(prove, proof, Path(folder)): proof for proof in proofs}
        for ended in as_completed(running):
            proof, (checks, failures, seconds) = running[ended], ended.result()
            failed += bool(failures)
            result = f"{len(failures)} FAILED" if failures else "proved"
            print(f"{proof.of:16} {proof.inputs:50} {checks:6} {seconds:8.1f}  {result}", flush=True)
            for failure in failures:
                print(f"    {failure}")
    print(f"{len(proofs) - failed} of {len(proofs)} functions proved")
    return 1 if failed else 0


def find_faults(proofs: list[Proof]) -> int:
    """Plant the faults that these proofs must find. Return 1 if one is not found."""
    missed = 0
    faults = [(proof, fault) for proof in proofs for fault in FAULTS if fault.proof == proof.of]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = {pool.submit(find_fault, proof, fault): fault for proof, fault in faults}
        for ended in as_completed(running):
            fault, failures = running[ended], ended.result()
            missed += not failures
            found = f"{len(failures)} checks fail" if failures else "MISSED"
            print(f"{fault.function:16} {fault.old:40} -> {fault.new:40} {found}", flush=True)
    print(f"{len(faults) - missed} of {len(faults)} faults found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
