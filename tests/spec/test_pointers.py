"""Files that comments, docstrings and pages name exist in the repository.

zcproto/tls/pins.py, tls/pins.py, pins.py     a file whose path ends so
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("zcproto", "bench", "docs", "spec", "clients", "tests")
NOT_OURS = {"node_modules", "target", "__pycache__", "build"}

NAME = re.compile(r"(?<![\w./{}*-])((?:[\w-]+/)*[\w-]+\.(?:py|md|lua|pml|go|rs|ts))(?![\w/*{-]|\.\w)")
NAMED_BY_PAGES = re.compile(r"(?<![\w./{}*-])((?:zcproto|tests|bench|docs|spec)/(?:[\w-]+/)*[\w-]+\.py)\b")
"""In a page, names without a folder may be those of a reader's own files."""

EXAMPLES = {"coverage.py", "gateway.py", "wire.md"}
"""Names in comments and docstrings that are files elsewhere: of a library, of a reader, of an old reference."""


@cache
def files() -> list[Path]:
    found = [path for room in ROOMS for path in (ROOT / room).rglob("*.*")]
    return [*ROOT.glob("*.*"), *(path for path in found if not NOT_OURS & set(path.parts))]


@cache
def endings() -> set[str]:
    """The paths of all files, and each part of a path up to its end."""
    relative = [path.relative_to(ROOT).parts for path in files()]
    return {"/".join(parts[start:]) for parts in relative for start in range(len(parts))}


def prose(source: str) -> Iterator[str]:
    """Yield the comments of a module, and the texts that stand alone in it."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield text


def missing(path: Path) -> set[str]:
    """Return the names in a file that are no files."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return set(NAMED_BY_PAGES.findall(text)) - endings()
    return {name for each in prose(text) for name in NAME.findall(each)} - endings() - EXAMPLES


@pytest.mark.parametrize("room", [*ROOMS, ""])
def test_named_files_exist(room: str) -> None:
    inside = [path for path in files() if path.suffix in {".py", ".md"}]
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in inside
        if path.relative_to(ROOT).parts[0] == (room or path.name)
        for name in missing(path)
    }
    assert not found, "correct these names, or those of the files"


def test_missing_file_is_found_in_comments_docstrings_and_pages(tmp_path: Path) -> None:
    module, page = tmp_path / "a.py", tmp_path / "a.md"
    module.write_text('"""See wire/frame.py and wire/gone.py."""\n# not lost.py\nTEXT = "other.py"\n')
    page.write_text("`zcproto/wire/frame.py`, `zcproto/wire/gone.py`, and yours.py")
    assert missing(module) == {"wire/gone.py", "lost.py"}
    assert missing(page) == {"zcproto/wire/gone.py"}
