"""The accelerator under the sanitizers: no undefined behaviour, no byte out of bounds, the same results as Python.

Compiles the accelerator with AddressSanitizer and UndefinedBehaviorSanitizer, and with warnings as errors. Then it
compares the functions with their Python references: for random calls, usual and not, and for mutated inputs of the
fuzz targets of frames and bodies. Python allocates with malloc, so that every object has its bounds checked.

It needs gcc and Python's headers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Final

import click

from bench.command import COUNT, SECONDS, measurement
from bench.report import Report, Row
from bench.stage import bench_environment
from zcproto.errors import ZcprotoError

ROOT: Final = Path(__file__).parents[2]
SOURCE: Final = ROOT / "zcproto" / "_accelerator.c"
WARNINGS: Final = ("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror")
SANITIZERS: Final = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
START_S: Final = 120.0
"""Seconds for a start under the sanitizers on a busy machine; beyond it, and the time asked for, it hangs."""

SHOWN: Final = 4_000
"""Characters of a sanitizer's report that are shown."""


def compile_module(source: Path, folder: Path) -> Path:
    """Return the accelerator, compiled with sanitizers. Raises ZcprotoError."""
    module = folder / "_accelerator.so"
    include = f"-I{sysconfig.get_path('include')}"
    options = ("-O1", "-g", "-std=c99", "-shared", "-fPIC", "-DPy_LIMITED_API=0x030b0000", include)
    command = ["gcc", *options, *WARNINGS, *SANITIZERS, str(source), "-o", str(module)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ZcprotoError("gcc is not installed; on Debian: apt-get install gcc libc6-dev") from error
    if done.returncode:
        raise ZcprotoError(
            f"{source.name} cannot be compiled; it needs Python's headers: {done.stderr[:SHOWN]}"
        )
    return module


def compare(module: Path, seconds: float, seed: int) -> tuple[int, str]:
    """Return the number of cases, and what went wrong."""
    question = ["gcc", "-print-file-name=libasan.so"]
    runtime = subprocess.check_output(question, text=True).strip()
    environment = {
        **bench_environment(),
        "LD_PRELOAD": os.path.realpath(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # an interpreter that ends frees little
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }
    words = [sys.executable, "-m", "tests.fuzz.accelerator", str(module), str(seconds), str(seed)]
    try:
        done = subprocess.run(
            words,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds + START_S,
        )
    except subprocess.TimeoutExpired:
        return 0, f"it did not end within {seconds + START_S:.0f} s"
    if done.returncode:
        return 0, f"exit code {done.returncode}: {done.stderr[-SHOWN:]}"
    return int(done.stdout), ""


def fuzz(source: Path, seconds: float, seed: int) -> Report:
    """Compare the functions of this source with Python."""
    with tempfile.TemporaryDirectory(prefix="zcproto-accelerator-") as folder:
        cases, fault = compare(compile_module(source, Path(folder)), seconds, seed)
    row = Row("accelerator_cases", "cases with the same result under the sanitizers", cases, at_least=1)
    return Report({"figure": [row]}, [fault] if fault else [])


@measurement
@click.option("--seconds", type=SECONDS, default=60.0, show_default=True, help="How long to compare.")
@click.option("--seed", type=COUNT, default=1, show_default=True, help="Of the random calls and mutations.")
def command(seconds: float, seed: int) -> Report:
    return fuzz(SOURCE, seconds, seed)
