"""Prove functions of `_accelerator.c` with CBMC (harness.c, and a model of CPython's API in `model`).

A proof covers every input that its harness allows. Functions that a proof replaces by their contract are proved
themselves: `test_contracts_are_proved` checks that.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

ROOT: Final = Path(__file__).parents[2]
SOURCE: Final = ROOT / "zcproto" / "_accelerator.c"
FOLDER: Final = Path(__file__).parent
CHECKS: Final = ("--pointer-overflow-check", "--no-malloc-may-fail", "--object-bits", "12")
"""Added to CBMC's usual checks: bounds, pointers, signed overflow, shifts, division, and loops that go on."""


class Loop(NamedTuple):
    """What holds before each iteration of a loop, which makes a proof independent of their number."""

    number: int
    invariant: str
    assigns: str
    decreases: str
    """A number that decreases with each iteration: the loop ends."""


class Proof(NamedTuple):
    """A proof of one function."""

    of: str
    inputs: str
    """What is proved for all of them."""

    contracts: tuple[str, ...] = ()
    """Functions that are replaced by their contracts."""

    unwind: int = 9
    bounds: tuple[str, ...] = ()
    """Iterations of single loops, which CBMC asserts to be enough, as for `unwind`."""

    loops: tuple[Loop, ...] = ()
    symbols: tuple[str, ...] = ()
    """The variables in the contracts of loops, as CBMC names them."""

    is_quick: bool = True


class Outcome(NamedTuple):
    """The result of a proof."""

    checks: int
    failures: list[str]
    seconds: float


_IN_BODY: Final = "__CPROVER_same_object(p, end) && (unsigned long)p <= (unsigned long)end"

PROOFS: Final = (
    Proof("call_reference", "any objects, up to 10", unwind=11),
    Proof("numbers", "any value (get32, get64, put32, put64)"),
    Proof("is_uint", "any object; equal to the model"),
    Proof("is_bytes", "any object of any size; equal to the model"),
    Proof("tuple_of", "up to 6 references, each possibly missing"),
    Proof("read_rules", "any objects"),
    Proof("fitting_size", "any number of bytes; equal to the specification", unwind=41),
    Proof("read_body", "any object of any size; equal to the model"),
    Proof("read_frame", "any object"),
    Proof("write_frame", "a body of any size; each byte as specified"),
    Proof("encode_frame", "any objects", ("call_reference", "write_frame")),
    Proof(
        "encode_frames",
        "up to 3 frames, each of any size",
        ("call_reference", "read_frame", "write_frame"),
        bounds=("encode_frames.0:4", "encode_frames.1:4"),
        is_quick=False,
    ),
    Proof(
        "is_plain",
        "any number of bytes; it ends",
        loops=(
            Loop(0, "depth <= 64", "depth", "depth"),
            Loop(
                1,
                f"follows <= 4 && size <= 0xffffffffULL >> 8 * follows && {_IN_BODY} && "
                "(unsigned long)end - (unsigned long)p >= follows && "
                "(unsigned long)p >= (unsigned long)__CPROVER_loop_entry(p)",
                "follows, size, p",
                "follows",
            ),
            Loop(
                2,
                f"depth <= 64 && {_IN_BODY}",
                "depth, p, __CPROVER_object_whole(left), __CPROVER_object_whole(is_map)",
                "(unsigned long)end - (unsigned long)p",
            ),
        ),
        symbols=(
            *(
                "is_plain::p",
                "is_plain::end",
                "is_plain::1::depth",
                "is_plain::1::left",
                "is_plain::1::is_map",
            ),
            *("is_plain::1::1::1::size", "is_plain::1::1::1::2::follows"),
        ),
        is_quick=False,
    ),
    Proof("scan_body", "any objects of any size", ("call_reference", "is_plain")),
    Proof("decode", "any number of bytes", ("is_plain",)),
    Proof(
        "cut_values",
        "up to 3 frames and 16 bytes",
        ("read_rules", "fitting_size", "decode", "tuple_of", "get32", "get64"),
        unwind=12,
        bounds=("cut_values.0:5",),
    ),
    Proof("fits", "any objects with up to 3 items", ("call_reference",), bounds=("fits.0:4",)),
    Proof("read_meta", "any object"),
    Proof("request_message", "any number of bytes, any decoded value", ("decode", "read_meta")),
    Proof("request_in", "a frame of any size", ("request_message",)),
    Proof(
        "read_requests",
        "up to 3 frames and 16 bytes",
        ("read_rules", "fitting_size", "request_in", "get64"),
        bounds=("read_requests.0:5",),
    ),
)


class CannotProveError(Exception):
    """A program of CBMC failed."""


def prove(proof: Proof, folder: Path, source: Path = SOURCE) -> Outcome:
    """Prove a function of this source. `folder` is for the intermediate programs."""
    begun = time.monotonic()
    program, entry = folder / f"{proof.of}.goto", f"proof_{proof.of}"
    files = (str(FOLDER / "harness.c"), str(FOLDER / "model" / "model.c"))
    include = (f"-I{FOLDER / 'model'}", f"-I{source.parent}")
    _run("goto-cc", *include, f'-DSOURCE="{source}"', *files, "--function", entry, "-o", str(program))
    for name in proof.contracts:
        _run("goto-instrument", "--replace-calls", f"{name}:contract_{name}", str(program), str(program))
    if proof.loops:
        rules = folder / f"{proof.of}.json"
        rules.write_text(json.dumps(_loop_contracts(proof)))
        options = ("--loop-contracts-file", str(rules), "--dfcc", entry, "--apply-loop-contracts")
        _run("goto-instrument", "--no-malloc-may-fail", *options, str(program), str(program))
    unwind = ["--unwind", str(proof.unwind)]
    unwind += ["--unwindset", ",".join(proof.bounds)] if proof.bounds else []
    output = _run("cbmc", *unwind, *CHECKS, "--drop-unused-functions", str(program), may_fail=True)
    found = re.search(r"\*\* (\d+) of (\d+) failed", output)
    if found is None:
        raise CannotProveError(f"cbmc gave no result for {proof.of}: {output[-2_000:]}")
    failures = [line for line in output.splitlines() if line.endswith(": FAILURE")]
    assert len(failures) == int(found[1])
    return Outcome(int(found[2]), failures, time.monotonic() - begun)


def _loop_contracts(proof: Proof) -> Any:
    """Return the file of `goto-instrument --loop-contracts-file`."""
    contracts = []
    for number, invariant, assigns, decreases in proof.loops:
        words = set(re.findall(r"\w+", f"{invariant} {assigns} {decreases}"))
        names = ((symbol.rpartition("::")[2], symbol) for symbol in proof.symbols)
        contracts.append(
            {
                "loop_id": str(number),
                "invariants": invariant,
                "assigns": assigns,
                "decreases": decreases,
                "symbol_map": ";".join(f"{name},{symbol}" for name, symbol in names if name in words),
            }
        )
    return {"functions": [{proof.of: contracts}]}


def _run(*command: str, may_fail: bool = False) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and not may_fail:
        raise CannotProveError(f"{command[0]} failed: {done.stdout[-1_000:]}{done.stderr[-1_000:]}")
    return done.stdout
