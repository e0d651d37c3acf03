"""Check that no text of the project has a word that its language rules exclude.

    python -m tests.spec.test_language [PATH...]

lists every occurrence as `file:line: word: text`, in the given files and folders or in all that are checked, and
exits with 1 if there are any.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

ROOT: Final = Path(__file__).parents[2]

CHECKED: Final = (
    *("zcproto", "docs", "spec", "bench", "clients", "examples", "tests", ".github"),
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "pyproject.toml", ".ci"),
    *("GOVERNANCE.md", "CODE_OF_CONDUCT.md"),
)
SUFFIXES: Final = {
    *(
        ".c",
        ".css",
        ".go",
        ".html",
        ".java",
        ".js",
        ".json",
        ".lua",
        ".md",
        ".mjs",
        ".py",
        ".rs",
        ".service",
        ".socket",
    ),
    *(".sysusers", ".toml", ".ts", ".yml"),
}
SKIPPED: Final = {"node_modules", "target", "dist", "build", "corpus", "__pycache__", "package-lock.json"}
"""Names of folders and files that hold built, installed or binary content."""

_GAP: Final = r"[\s#*/]+"
"""What separates the words of a phrase: it may continue on the next line of a comment."""

PHRASES: Final = (
    *(
        "whoever",
        "somebody",
        "nobody",
        "anew",
        "told",
        "tells",
        "to tell",
        "sees to",
        "are none",
        "to be had",
    ),
    *("to be said", "so it is", "who is in", "upon which", "makes up for", "made up for", "are to be"),
)
PATTERNS: Final[dict[str, re.Pattern[str]]] = {
    **{each: re.compile(rf"\b{each.replace(' ', _GAP)}\b", re.IGNORECASE) for each in PHRASES},
    # Case matters: `x is None` is code.
    "is none": re.compile(rf"\bis{_GAP}none\b"),
    # "This is no number" for "this is not a number". "There is no" and comparisons are plain English.
    "is no X": re.compile(
        rf"\b(?!there\b|There\b)\w+\W+is{_GAP}no{_GAP}(?!(?:longer|more|less|fewer|later|earlier|larger|shorter|higher)\b)[a-z]"
    ),
}

ALLOWED: Final[dict[str, set[str]]] = {
    "tests/spec/test_language.py": set(PATTERNS),  # names them
    # the schema of sessions.db, which SQLite stores with its comments
    "zcproto/stores/sqlite/file.py": {"is no X"},
    # a field of the control API
    "docs/control.md": {"told"},
    "zcproto/admin/operations.py": {"told"},
    "zcproto/cli/cert.py": {"told"},
    "tests/admin/test_operations.py": {"told"},
    "tests/cli/test_running_server.py": {"told"},
}
"""Banned words that may stand in a file, with the reason."""


class Hit(NamedTuple):
    """A banned word, and where it is."""

    file: str
    line: int
    word: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.word}: {self.text}"


def split_identifiers(text: str) -> str:
    """Separate the words of identifiers, so that `_nobody` and `isTold` are found. Lines stay where they are.

    `is_none` is a method of Rust's Option.
    """
    text = re.sub(r"\bis_none(_or)?\b", "isNone", text)
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text).replace("_", " ")


def hits_in(text: str, file: str) -> Iterator[Hit]:
    """Yield the banned words of a text that its file is not allowed to have."""
    lines = text.splitlines()
    searched = split_identifiers(text)
    lower = searched.lower()
    for word, pattern in PATTERNS.items():
        # Most texts lack a part of the phrase. Looking for the parts is much faster than the pattern.
        if word in ALLOWED.get(file, ()) or not all(part in lower for part in word.removesuffix("X").split()):
            continue
        for match in pattern.finditer(searched):
            line = searched.count("\n", 0, match.start())
            yield Hit(file, line + 1, word, lines[line].strip())


def files_below(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the text files among `paths` and in their folders, sorted."""
    for path in paths:
        if path.is_dir():
            yield from files_below(sorted(each for each in path.iterdir() if each.name not in SKIPPED))
        elif path.suffix in SUFFIXES or path.parent.name == ".ci":
            yield path


def find(paths: Iterable[Path]) -> list[Hit]:
    """Return every hit in the given files and folders, by file and line."""
    found: list[Hit] = []
    for path in files_below(paths):
        file = path.resolve().relative_to(ROOT).as_posix()
        found += sorted(hits_in(path.read_text(encoding="utf-8"), file), key=lambda hit: hit.line)
    return found


def test_no_text_has_a_banned_word() -> None:
    checked = [ROOT / name for name in CHECKED if (ROOT / name).exists()]
    hits = find(checked)
    assert not hits, "reword these:\n" + "\n".join(map(str, hits))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Nobody is told.", ["told", "nobody"]),
        ("def _nobody(): ...", ["nobody"]),
        ("const isTold = hasANewValue", ["told"]),
        ("# whatever sees\n    # to it", ["sees to"]),
        ("this is no number", ["is no X"]),
        ("There is no number, and it is no longer than there\n    # is no other", []),
        ("if value is None:", []),
        ("if value.is_none()", []),
        ("of these there is none", ["is none"]),
        ("intolerable, janewman", []),
    ],
)
def test_banned_word_is_found_in_prose_and_identifiers(text: str, words: list[str]) -> None:
    assert sorted(hit.word for hit in hits_in(text, "any.py")) == sorted(words)


def test_hit_names_the_line_of_the_word() -> None:
    assert list(hits_in("first\nis told\n", "a.py")) == [Hit("a.py", 2, "told", "is told")]


def main(arguments: list[str]) -> int:
    """List the hits in the given paths, or in all that are checked. Return the exit code."""
    hits = find(
        map(Path, arguments) if arguments else (ROOT / name for name in CHECKED if (ROOT / name).exists())
    )
    for hit in hits:
        sys.stdout.write(f"{hit}\n")
    sys.stdout.write(f"{len(hits)} occurrences\n")
    return 1 if hits else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
