"""docs/troubleshooting.md explains every message that users can see, and no message that does not exist.

A row of its tables begins with the messages in code marks; `…` stands for anything.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from tests.docs.messages import (
    MAKERS,
    RETURNERS,
    ROOT,
    Message,
    all_messages,
    sources,
    text_of,
)
from zcproto.errors import CallError
from zcproto.observe.events import EVENTS
from zcproto.tls.failure import TlsFailure

GUIDE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
LEAST = 5
"""Minimum characters of a pattern without its wildcards: one that matches anything explains nothing."""

OTHERS = re.compile(r"[…:;,. '\"()=\[\]{}?-]*|zcproto: …+|no connection: …|…, by …")
"""Templates that only wrap another message."""


def tables(text: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yield the section, the first cell and the other cells of each row."""
    section = ""
    for line in text.splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ")
        elif line.startswith("| `"):
            first, *others = [cell.strip() for cell in line.strip().strip("|").split("|")]
            yield section, first, others


ROWS = list(tables(GUIDE))
PATTERNS = [pattern for _, first, _ in ROWS for pattern in re.findall(r"`([^`]+)`", first)]
EVENTS_SECTION = "Log events"
CAUSES_SECTION = "Causes of tls.failed"


def named_in(section: str) -> set[str]:
    return {name for each, first, _ in ROWS if each == section for name in re.findall(r"`([^`]+)`", first)}


@cache
def matcher(pattern: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, pattern.split("…"))), re.DOTALL)


MESSAGES_PATTERNS = [
    pattern
    for section, first, _ in ROWS
    if section not in (EVENTS_SECTION, CAUSES_SECTION)
    for pattern in re.findall(r"`([^`]+)`", first)
]


def explained(message: Message) -> bool:
    return any(matcher(pattern).fullmatch(message.text) for pattern in MESSAGES_PATTERNS)


def test_every_message_is_explained() -> None:
    messages = [each for each in all_messages() if not OTHERS.fullmatch(each.text)]
    assert len(messages) > 300, "messages are found"
    missing = [f"{each.place}: {each.text}" for each in messages if not explained(each)]
    assert not missing, "add a row to docs/troubleshooting.md for:\n" + "\n".join(sorted(missing))


def test_every_row_matches_an_existing_message() -> None:
    messages = [
        *all_messages(),
        *(Message(f"{kind.code.name}: a", "") for kind in CallError.by_code.values()),
    ]
    stale = [
        pattern
        for pattern in MESSAGES_PATTERNS
        if not any(matcher(pattern).fullmatch(message.text) for message in messages)
    ]
    assert not stale, "no source has such a message; remove or correct the row:\n" + "\n".join(stale)


def test_every_row_has_cause_and_cure_and_a_specific_pattern() -> None:
    for _, first, others in ROWS:
        assert len(others) >= 2, first
        assert all(others), first
    for pattern in PATTERNS:
        assert len(pattern.replace("…", "").strip()) >= min(LEAST, len(pattern)), pattern
    assert len(set(PATTERNS)) == len(PATTERNS), "one row for one message"


def test_every_warning_and_error_event_is_explained() -> None:
    wanted = {event.name for event in EVENTS.values() if event.level in ("warning", "error")}
    assert wanted - named_in(EVENTS_SECTION) == set()
    assert named_in(EVENTS_SECTION) - set(EVENTS) == set()


def test_every_cause_of_a_tls_failure_is_explained() -> None:
    assert named_in(CAUSES_SECTION) == {failure.value for failure in TlsFailure}


def test_every_error_code_is_explained() -> None:
    codes = {f"{kind.code.name}: …" for kind in CallError.by_code.values()}
    assert codes - set(PATTERNS) == set()


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("'a b'", "a b"),
        ("f'a {b} c'", "a … c"),
        ("f'{a}: ' + b", "…: …"),
        ("'a ' + f'{b} c'", "a … c"),
        ("a", None),
        ("1", None),
    ],
)
def test_text_of_an_expression_is_read_from_the_source(source: str, text: str | None) -> None:
    assert text_of(ast.parse(source, mode="eval").body) == text


def test_functions_that_make_messages_exist() -> None:
    trees = sources().trees
    defined = {
        path: {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for path, tree in trees.items()
    }
    assert {path: names - defined.get(path, set()) for path, names in RETURNERS.items()} == {
        path: set() for path in RETURNERS
    }
    assert set().union(*defined.values()) >= MAKERS


def test_messages_of_every_kind_are_found() -> None:
    found = {message.text for message in all_messages()}
    assert {
        "…: others can read this key; run: …",
        "UNAUTHENTICATED: this method needs a session; connect with a user and a key, or another login",
        "pin_malformed: more than … pins",
        "--key-file goes with --user.",
        "…: does not belong to …; configure a matching certificate and key",
    } <= found
