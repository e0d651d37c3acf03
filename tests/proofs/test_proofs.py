"""The accelerator is proved safe for all inputs, and the proofs find planted faults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.interop.support import needs
from tests.proofs.faults import FAULTS, Fault, find_fault, planted
from tests.proofs.proofs import FOLDER, PROOFS, SOURCE, Proof, prove

BY_NAME = {proof.of: proof for proof in PROOFS}
NOT_PROVED = {"wall_ms", "PyInit__accelerator", "is_out_of_memory", "unpack_tuple"}
"""They read no bytes of a peer, or are proved as parts of their callers."""

QUICK_FAULTS = (
    "is_uint",
    "is_bytes",
    "read_rules",
    "fitting_size",
    "read_body",
    "scan_body",
    "decode",
    "request_in",
)
"""Functions of which one fault is planted each time; `python -m tests.proofs --all --faults` plants all."""

with_cbmc = needs("cbmc", "goto-cc", "goto-instrument")


def quick_or_slow(proof: Proof) -> object:
    return pytest.param(proof, id=proof.of, marks=[] if proof.is_quick else [pytest.mark.slow])


@with_cbmc
@pytest.mark.parametrize("proof", [quick_or_slow(proof) for proof in PROOFS])
def test_function_is_safe_for_all_inputs(proof: Proof, tmp_path: Path) -> None:
    outcome = prove(proof, tmp_path)
    assert outcome.failures == []
    assert outcome.checks > 0


@with_cbmc
@pytest.mark.parametrize("name", QUICK_FAULTS)
def test_planted_fault_is_found(name: str) -> None:
    fault = next(fault for fault in FAULTS if fault.proof == name)
    assert find_fault(BY_NAME[name], fault)


@with_cbmc
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.function}-{fault.new}")
def test_every_planted_fault_is_found(fault: Fault) -> None:
    assert find_fault(BY_NAME[fault.proof], fault)


def test_each_proof_has_a_fault_that_can_be_planted() -> None:
    assert {fault.proof for fault in FAULTS} == BY_NAME.keys()
    for fault in FAULTS:
        assert planted(fault) != SOURCE.read_text(encoding="utf-8")


def test_every_function_is_proved() -> None:
    """Contracts, too: a function that is replaced by one has a proof of its own."""
    functions = set(re.findall(r"^(\w+)\([^;]*$", SOURCE.read_text(encoding="utf-8"), re.MULTILINE))
    numbers = {"get32", "get64", "put32", "put64"}
    assert functions - NOT_PROVED == (BY_NAME.keys() - {"numbers"}) | numbers
    contracts = {name for proof in PROOFS for name in proof.contracts}
    assert contracts - numbers <= BY_NAME.keys()
    harness = (FOLDER / "harness.c").read_text(encoding="utf-8")
    assert set(re.findall(r"^proof_(\w+)\(", harness, re.MULTILINE)) == BY_NAME.keys()
