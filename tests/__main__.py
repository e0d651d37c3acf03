"""All checks, in the order in which they fail fastest: `python -m tests`.

    --quick           the tests alone: no style, no types, no coverage
    --another-python  as --quick, and without what a run on one version has shown for all
    --all             the slow ones, too: whole measurements in small
    --fix             let ruff mend what it can first

Further arguments go to pytest.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
COVERED = ("wire", "connection", "http", "tls", "sessions", "auth", "certs")
"""Rooms of which every line and every branch is run by a test."""


SECRETS = 10_000
"""Tokens, keys and the like that all tests together make; none of them may show up (tests/secrets_watch.py)."""

SHOWN_FOR_ALL = (
    *("bench", "costs", "interop", "spec", "http/test_browser.py", "http/test_prometheus.py"),
    *("stores/test_kill.py", "test_layers.py", "test_secrets_watch.py"),
)
"""Tests of other programs, of documents and of measurements, which no version of Python makes different."""

LIMIT = 840
"""Seconds for one tool: one that hangs must fail."""


OPTIONS = ("--quick", "--another-python", "--all", "--fix")


def main(arguments: list[str]) -> int:
    another = "--another-python" in arguments
    quick = another or "--quick" in arguments
    if "--fix" in arguments:
        run("ruff", "check", "--fix", "-q", ".")
        run("ruff", "format", "-q", ".")
    chosen = [] if "--all" in arguments else ["-m", "not slow"]
    for_pytest = [argument for argument in arguments if argument not in OPTIONS]
    if not quick and not all((run("ruff", "check", "."), run("ruff", "format", "--check", "."), run("mypy"))):
        return 1
    if for_pytest:
        return 0 if run("pytest", *for_pytest) else 1
    secrets = f"--secrets-at-least={SECRETS}"
    if another:
        return 0 if run("pytest", *chosen, *(f"--ignore=tests/{each}" for each in SHOWN_FOR_ALL)) else 1
    if quick:
        return 0 if run("pytest", *chosen, secrets) else 1
    coverage = [f"--cov=zcproto.{room}" for room in COVERED]
    strict = ("--cov-branch", "--cov-report=term-missing:skip-covered", "--cov-fail-under=100")
    return 0 if run("pytest", *chosen, secrets, *coverage, *strict) else 1


def run(module: str, *arguments: str) -> bool:
    """Run a tool of this environment; tell what it is and how long it took."""
    print(f"-- {module} {' '.join(arguments)}", flush=True)
    began = time.monotonic()
    try:
        code = subprocess.run(
            [sys.executable, "-m", module, *arguments], cwd=ROOT, check=False, timeout=LIMIT
        ).returncode
    except subprocess.TimeoutExpired:
        print(f"-- {module}: did not end within {LIMIT} s", flush=True)
        return False
    print(
        f"-- {module}: {'passed' if code == 0 else 'FAILED'} in {time.monotonic() - began:.1f} s", flush=True
    )
    return code == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
