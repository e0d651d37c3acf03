"""Every code block of the pages for application developers runs, and prints what its page says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.docs.blocks import Block, PageError, Reader, blocks_of, change, pattern_of, problem_of, read_in
from tests.docs.messages import ROOT
from tests.helpers import run_mypy

DOCS = ROOT / "docs"

OTHER_PAGES = {
    *("README", "alerts", "attacks", "backup", "certificates", "control", "http", "installation", "security"),
    *(
        "troubleshooting",
        "upgrades",
        "commands",
        "scaling",
        "identity-providers",
        "client-cookbook",
        "containers",
    ),
}
"""Pages for operators and reviewers, whose commands test_guides.py checks, and the one of test_cookbook.py."""

PAGES = sorted(page for page in DOCS.glob("*.md") if page.stem not in OTHER_PAGES)
TUTORIAL = sorted((DOCS / "tutorial").glob("*.md"), key=lambda page: (page.stem != "README", page.stem))

COOKBOOK = DOCS / "client-cookbook.md"

NODE = [
    pages
    for pages in [TUTORIAL, *([page] for page in PAGES)]
    if any("```js" in page.read_text() for page in pages)
]
CLIENT = ROOT / "clients" / "typescript" / "dist" / "src" / "index.js"

PROGRAMS = ("valkey-server",)
"""Programs that a page may run only where they are installed."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs_as_printed(page: Path, tmp_path: Path, certs: Path) -> None:
    follow([page], tmp_path, certs)


def test_tutorial_runs_as_printed_and_its_gateway_is_short(tmp_path: Path, certs: Path) -> None:
    files = follow(TUTORIAL, tmp_path, certs)
    assert len(files["gateway.py"].splitlines()) < 120, "the tutorial promises less"


@pytest.mark.skipif(
    not CLIENT.exists(), reason="the client for Node is not built; run npm ci in clients/typescript"
)
@pytest.mark.parametrize("pages", NODE, ids=lambda pages: pages[0].stem)
def test_page_for_node_runs_as_printed(pages: list[Path], tmp_path: Path, certs: Path) -> None:
    follow(pages, tmp_path, certs, has_node=True)


def follow(pages: list[Path], folder: Path, certs: Path, *, has_node: bool = False) -> dict[str, str]:
    """Follow pages in one folder. Return the files that they have written."""
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    for program in PROGRAMS:
        if f"\n{program} " in text and shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    with Reader(folder, certs, has_node=has_node) as reader:
        if "zcproto user add ada" not in text:
            reader.add_user("ada")  # as the README does
        for page in pages:
            reader.follow(page)
        reader.check_that_all_files_ran()
    return reader.files


def test_programs_of_the_pages_have_strict_types(tmp_path: Path) -> None:
    cookbook = tmp_path / COOKBOOK.name
    cookbook.write_text(read_in("Python", COOKBOOK.read_text(encoding="utf-8"), {}), encoding="utf-8")
    files: dict[str, str] = {}
    for page in [*TUTORIAL, *PAGES, cookbook]:
        for block in blocks_of(page):
            if block.language == "python" and block.file is not None:
                if block.is_change:
                    files[block.file] = change(files[block.file], block.text)
                else:
                    assert files.get(block.file) in {None, block.text}, f"{block.place}: choose another name"
                    files[block.file] = block.text
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    ran = run_mypy(tmp_path, *files)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def block(language: str, text: str = "", file: str | None = None) -> Block:
    return Block("page.md:1", language, text, file, is_change=False)


def test_block_that_would_not_run_is_refused() -> None:
    assert problem_of(block("python", file="shop.py"), "") is None
    assert problem_of(block("sh"), "python") is None
    assert problem_of(block("text"), "sh") is None
    for language, before, problem in [
        ("python", "", "name its file"),
        ("typescript", "", "name its file"),
        ("text", "python", "output of commands"),
        ("bash", "", "blocks of bash are not run"),
        ("", "", "blocks of no language are not run"),
    ]:
        assert problem in (problem_of(block(language), before) or ""), language
    assert "indented" in (problem_of(block("sh"), "", is_indented=True) or "")


PAGE_WITH_TABS = """\
/// tab | Go

Run a program by `go run connect.go`.

///

/// tab | Rust

Run a program by `cargo run --bin connect`.

///

/// tab | Go

`call.go`:

///

/// tab | Rust

`src/bin/call.rs`:

///

Each prints:
"""


def test_page_with_tabs_is_read_in_one_language() -> None:
    read = read_in("Rust", PAGE_WITH_TABS, {"call": "x"})
    assert "connect.go" not in read
    assert "call.go" not in read
    assert "`src/bin/call.rs`:\n\n```sh\ncargo run --bin call x\n```\n\nEach prints:" in read


MODULE = '''\
"""A shop."""

import os

LIMIT = 1


# Prices.
def price() -> int:
    return LIMIT
'''
BLOCK = """\
from dataclasses import dataclass

@dataclass
class Tea:
    price: int

# In cents.
def price() -> int:
    return 2

LIMIT = 3

def last() -> None: ...
"""
CHANGED = '''\
"""A shop."""

import os
from dataclasses import dataclass

LIMIT = 3


@dataclass
class Tea:
    price: int


# In cents.
def price() -> int:
    return 2


def last() -> None: ...
'''


def test_block_changes_and_adds_definitions_where_a_reader_would() -> None:
    assert change(MODULE, BLOCK) == CHANGED


@pytest.mark.parametrize(
    ("shown", "printed", "is_same"),
    [
        ("1\n2\n", "1\n2\n", True),
        ("1\n", "1\n2\n", False),
        ("1\n...\n", "1\n2\n3\n", True),
        ("...\n2\n", "2\n", True),
        ("port …, user ada\n", "port 7443, user ada\n", True),
        ("port …, user ada\n", "port 7443, user\nada\n", False),
    ],
)
def test_dots_stand_for_lines_and_an_ellipsis_for_text(shown: str, printed: str, is_same: bool) -> None:
    assert bool(re.fullmatch(pattern_of(shown), printed)) is is_same


def test_failing_or_different_or_unused_block_fails_its_page(tmp_path: Path, certs: Path) -> None:
    page = tmp_path / "page.md"
    with Reader(tmp_path, certs) as reader:
        for text, problem in [
            ("```sh\nfalse\n```\n", "exit code 1"),
            ("```sh\necho 1\n```\n\n```text\n2\n```\n", "print\n1\n\ninstead of\n2\n"),
            ("In `none.py`:\n\n```python\na = 1\n```\n", "none.py does not exist yet"),
        ]:
            page.write_text(text)
            with pytest.raises(PageError, match=re.escape(problem)):
                reader.follow(page)
        page.write_text("`new.py`:\n\n```python\na = 1\n```\n")
        reader.follow(page)
        with pytest.raises(PageError, match=re.escape("no command runs new.py")):
            reader.check_that_all_files_ran()
