"""The vectors of streams and calls are valid, and cover the cases that bytes can show."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from tests.helpers import FATAL_CODES
from tests.spec.test_specification import rows_of
from tests.wire.vectors import FOLDER, document
from zcproto.errors import Code

FILES = ("items", "calls", "durable", "conversation", "tables")
OF_FRAMES = ("items", "calls", "durable")
CASES = {
    "server without streams receives one of their kinds": ["open-without-streams", "item-without-streams"],
    "OPEN without a session": ["open-without-a-token"],
    "malformed credit": [
        "open-credit-one-number",
        "open-credit-negative",
        "open-credit-2-53",
        "open-credit-nil",
    ],
    "OPEN with an idempotency key": ["open-with-an-idempotency-key"],
    "number in flight": ["open-on-a-request", "open-on-a-stream", "request-on-a-stream"],
    "one item overdraws the bytes": ["item-credit-10-1", "client-item-credit-10-1"],
    "lowered totals": ["credit-fewer-items", "credit-fewer-bytes"],
    "undecodable CREDIT": ["credit-undecodable", "credit-one-number", "credit-str", "credit-ext"],
    "ITEM of the largest length and longer": ["item-of-max-item", "item-longer-than-max-item"],
    "undecodable ITEM": ["item-ext", "item-int-key", "item-depth-33"],
    "frames after END": ["item-after-end", "end-twice"],
    "OPEN whose deadline has passed": ["open-deadline-0"],
    "stale ITEM": ["item-stale", "item-stale-uses-its-counter"],
    "stale CREDIT": ["credit-stale"],
    "replayed ITEM": ["item-counter-equal", "item-of-another-connection"],
    "wrong side": ["end-from-the-server", "open-from-the-server", "call-from-the-client"],
    "body on a kind without one": ["end-with-a-body", "withdraw-with-a-body"],
    "stream 0": [f"{kind}-on-stream-0" for kind in ("open", "item", "end", "credit", "call")],
    "flags": [
        f"{kind}-with-flags" for kind in ("open", "item", "end", "credit", "call", "result", "failure")
    ],
    "resume of a wrong form": ["resume-id-empty", "resume-id-65", "resume-from-2-53", "resume-in-a-request"],
    "params that are nil and an empty map": ["resume-attach", "resume-start"],
    "ACCEPTED that does not fit": ["accepted-of-another-run", "accepted-from-elsewhere", "accepted-twice"],
    "taken out of bounds": ["taken-lower", "taken-beyond-what-was-sent", "taken-before-accepted"],
    "errors that end the attachment": ["end-detaches", "client-detached-error"],
    "unused kinds": [f"kind-{kind:02x}-to-the-server" for kind in (*range(0x14, 0x18), *range(0x1C, 0x20))],
}


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / "streaming" / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def vectors() -> dict[str, dict[str, Any]]:
    return {vector["name"]: vector for name in OF_FRAMES for vector in load(name)["vectors"]}


def test_every_file_is_listed_in_the_readme() -> None:
    assert {path.stem for path in (FOLDER / "streaming").iterdir()} == set(FILES)
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in FILES if f"`streaming/{name}.json`" not in readme] == []


@pytest.mark.parametrize("name", FILES)
def test_file_matches_the_schema(name: str) -> None:
    jsonschema.Draft202012Validator(document("schema")).validate(load(name))


@pytest.mark.parametrize("name", OF_FRAMES)
def test_file_has_the_number_of_vectors_and_explains_flags(name: str) -> None:
    file = load(name)
    assert file["count"] == len(file["vectors"])
    assert {flag for vector in file["vectors"] for flag in vector["flags"]} == set(file["notes"])


def test_vector_names_are_unique() -> None:
    assert len(vectors()) == sum(load(name)["count"] for name in OF_FRAMES)


@pytest.mark.parametrize("case", CASES)
def test_case_has_vectors(case: str) -> None:
    assert [name for name in CASES[case] if name not in vectors()] == []


def test_codes_of_vectors_are_fatal_as_the_specification_demands() -> None:
    for name, vector in vectors().items():
        for outcome in vector["expect"]:
            if outcome["result"] == "error":
                code = Code[outcome["name"]]
                assert outcome["code"] == code, name
                assert outcome["fatal"] is (code in FATAL_CODES), name


def test_specification_lists_every_kind_of_streams_and_calls() -> None:
    kinds = {row[1]: int(row[0], 16) for row in rows_of("### 18.2 Kinds")}
    assert kinds == load("tables")["kinds"]


def test_only_announced_limits_are_used() -> None:
    for name, vector in vectors().items():
        context = vector["context"]
        announced = context["announced"]
        assert announced["streams"] is not None or not context["open"], name
        assert announced["calls"] is not None or not context.get("calls"), name
