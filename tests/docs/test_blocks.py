"""Every code block of the pages for application developers runs, and prints what its page says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.docs.blocks import Block, PageError, Reader, blocks_of, change, pattern_of, problem_of, read_in
from tests.docs.messages import ROOT
from tests.docs.test_cookbook import ARGUMENTS
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

COOKBOOK = DOCS / "client-cookbook.md"


def pages_of(section: str) -> list[Path]:
    """Return the pages of a section of the site, in its order."""
    found = re.search(rf"^  - {section}:\n((?:      .*\n)+)", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert found is not None
    return [DOCS / name for name in re.findall(r": (.*\.md)$", found[1], re.MULTILINE)]


TUTORIAL, HOW_TO, IN_DEPTH = pages_of("Tutorial"), pages_of("How-to"), pages_of("In depth")
IN_ORDER = [DOCS / "README.md", *TUTORIAL, *(page for page in HOW_TO if page != COOKBOOK), *IN_DEPTH]
PAGES = sorted(
    page for page in DOCS.glob("*.md") if page.stem not in OTHER_PAGES and page not in {*HOW_TO, *IN_DEPTH}
)

CLIENT = ROOT / "clients" / "typescript" / "dist" / "src" / "index.js"

PROGRAMS = ("valkey-server",)
"""Programs that a page may run only where they are installed."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs_as_printed(page: Path, tmp_path: Path, certs: Path) -> None:
    with Reader(tmp_path, certs) as reader:
        reader.add_user("ada")  # as the README does
        reader.follow(page)
        reader.check_that_all_files_ran()


@pytest.mark.timeout(900)  # thirty pages, on a busy machine
@pytest.mark.parametrize("has_node", [CLIENT.exists()], ids=["for_node" if CLIENT.exists() else "for_python"])
def test_readme_then_tutorial_then_guides_run_in_one_home(
    has_node: bool, tmp_path: Path, certs: Path
) -> None:
    readme = tmp_path / "README.md"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    readme.write_text(text[text.index("## A server and a client") : text.index("## 10,000 connections")])
    cookbook = tmp_path / COOKBOOK.name
    language = "TypeScript" if has_node else "Python"
    cookbook.write_text(read_in(language, COOKBOOK.read_text(encoding="utf-8"), ARGUMENTS), encoding="utf-8")
    with Reader(tmp_path / "reader", certs, has_node=has_node) as reader:
        if has_node:
            reader.use_npm()
        reader.follow_in_clone(readme)
        for page in [*IN_ORDER, cookbook]:
            needed = [name for name in PROGRAMS if f"\n{name} " in page.read_text(encoding="utf-8")]
            if all(map(shutil.which, needed)):
                if page not in TUTORIAL[1:]:
                    reader.begin_next_page()
                reader.follow(page)
        reader.check_that_all_files_ran()
    assert len(reader.files["gateway.py"].splitlines()) < 120, "the tutorial promises less"


def test_programs_of_the_pages_have_strict_types(tmp_path: Path) -> None:
    cookbook = tmp_path / COOKBOOK.name
    cookbook.write_text(read_in("Python", COOKBOOK.read_text(encoding="utf-8"), {}), encoding="utf-8")
    files: dict[str, str] = {}
    for page in [*IN_ORDER, *PAGES, cookbook]:
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
