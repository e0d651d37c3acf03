"""The programs of the client cookbook run in each language, against its server, and print what the page says."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Final

import pytest

from tests.docs.blocks import TAB, Reader, read_in
from tests.docs.messages import ROOT

PAGE: Final = ROOT / "docs" / "client-cookbook.md"
RUST: Final = ROOT / "clients" / "rust"

BUILT: Final = {
    "Python": ROOT / "zcproto",
    "TypeScript": ROOT / "clients" / "typescript" / "dist" / "src" / "index.js",
    "Rust": RUST / "target" / "debug" / "zcproto-conform",
    "Go": ROOT / "clients" / "go" / "dist" / "conform",
    "C": RUST / "target" / "debug" / "libzcproto.a",
}
"""What exists where the client of a language has been built."""

ARGUMENTS: Final = {"device": '"$(zcproto pair --user ada 2>/dev/null)"', "pin": "2>/dev/null"}
"""Of programs. The one with pins warns that the server has no next pin."""

TASKS: Final = 11
DURABLE: Final = ["Python", "TypeScript"]
"""Languages whose clients have durable streams."""

CLONE: Final = re.compile(r"(?:~|\$HOME|\.\.)/zcproto\b")
"""The clone of the repository on the page. Compilers use what they have built for this one."""


@pytest.mark.timeout(600)  # a busy machine compiles
@pytest.mark.parametrize("language", BUILT)
def test_programs_run_as_printed(
    language: str, tmp_path: Path, certs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not BUILT[language].exists():
        pytest.skip(f"the client for {language} is not built: {BUILT[language]} is missing")
    keep_caches(language, monkeypatch)
    page = tmp_path / PAGE.name
    text = read_in(language, PAGE.read_text(encoding="utf-8"), ARGUMENTS)
    page.write_text(CLONE.sub(str(clone_in(tmp_path)), text), encoding="utf-8")
    with Reader(tmp_path, certs, has_node=language == "TypeScript") as reader:
        reader.add_user("ada")  # as the README does
        reader.follow(page)
        reader.check_that_all_files_ran()


def clone_in(folder: Path) -> Path:
    """Return a path of this clone that needs no quotes: its own one, or a link in `folder`.

    The link is not used always, because cargo compiles the client again behind it.
    """
    if shlex.quote(str(ROOT)) == str(ROOT):
        return ROOT
    link = folder / "clone"
    link.symlink_to(ROOT)
    return link


def keep_caches(language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the compiler of a language use what it has built before, although the home folder is another one."""
    if language == "Go":
        names = ("GOCACHE", "GOMODCACHE")
        found = subprocess.run(["go", "env", *names], capture_output=True, text=True, check=True).stdout
        for name, value in zip(names, found.splitlines(), strict=True):
            monkeypatch.setenv(name, value)
    if language in {"Rust", "C"}:
        home = RUST / ".cargo-home"  # with the source of the crates
        for name, value in {
            "CARGO_HOME": home if home.exists() else Path("~/.cargo").expanduser(),
            "RUSTUP_HOME": Path("~/.rustup").expanduser(),
            "CARGO_TARGET_DIR": RUST / "target",
        }.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("CARGO_PROFILE_DEV_DEBUG", "line-tables-only")  # as in clients/rust/Cargo.toml


def test_every_task_is_shown_in_every_language() -> None:
    sections = PAGE.read_text(encoding="utf-8").split("\n## ")
    shown = [tabs for section in sections if (tabs := [tab[1] for tab in TAB.finditer(section)])]
    assert shown == [*[list(BUILT)] * (1 + TASKS), DURABLE]
