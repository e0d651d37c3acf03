"""Read the corpus, and minimize it by coverage."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fuzz.target import Target

CORPUS = Path(__file__).parent / "corpus"
ROOT = Path(__file__).parents[2]
PRODUCT = str(ROOT / "zcproto")

CAPTURED = "real-"
"""File name prefix of inputs captured from real programs; they are never removed."""

Coverage = set[tuple[str, int, int, int, int]]
"""Three consecutive lines of a file with a count class: 1 once, 2 up to three times, 3 up to seven, 4 more."""


def inputs(folder: Path) -> dict[str, bytes]:
    """Return the inputs of a folder by file name, sorted."""
    if not folder.is_dir():
        return {}
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def coverage_of(target: Target, data: bytes) -> Coverage:
    """Return the coverage of the product for an input."""
    found: Counter[tuple[str, int, int, int]] = Counter()
    last: dict[FrameType, tuple[int, int]] = {}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if event == "call" and not frame.f_code.co_filename.startswith(PRODUCT):
            return None
        line = frame.f_lineno
        first, second = last.get(frame, (0, 0))
        found[frame.f_code.co_filename, first, second, line] += 1
        last[frame] = second, line
        if event == "return":
            last.pop(frame, None)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        target.check(data)
    finally:
        sys.settrace(before)
    return {(*step, min(count.bit_length(), 4)) for step, count in found.items()}


def minimize(target: Target, found: Iterable[bytes], always: Iterable[bytes] = ()) -> list[bytes]:
    """Return few, small inputs with the same coverage as all given ones. Inputs in `always` are kept."""
    left = {
        data: coverage_of(target, data) for data in sorted(set(found), key=lambda data: (len(data), data))
    }
    chosen = list(always)
    taken = {step for data in chosen for step in left.pop(data)}
    left = {data: rest for data, steps in left.items() if (rest := steps - taken)}
    while left:
        # Most new coverage for its size; the smallest on a tie.
        best = max(left, key=lambda data: len(left[data]) / (len(data) + 64))
        gained = left.pop(best)
        if not gained:
            break
        chosen.append(best)
        left = {data: rest for data, steps in left.items() if (rest := steps - gained)}
    return chosen


def merge_into_corpus(target: Target, found: Iterable[bytes]) -> tuple[int, int]:
    """Minimize the corpus of a target together with new inputs. Return how many were added and removed."""
    folder = CORPUS / target.name
    folder.mkdir(parents=True, exist_ok=True)
    before = inputs(folder)
    names = {data: name for name, data in before.items()}
    real = [data for name, data in before.items() if name.startswith(CAPTURED)]
    chosen = minimize(target, [*before.values(), *found], real)
    for name, data in before.items():
        if data not in chosen:
            (folder / name).unlink()
    for data in chosen:
        if data not in names:
            (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    added = sum(data not in names for data in chosen)
    return added, len(before) + added - len(chosen)
