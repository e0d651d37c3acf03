"""The dissector's tables equal those of the protocol, and its guide lists all of its fields.

tests/interop tests the dissection of frames.
"""

from __future__ import annotations

import json
import re

from tests.docs.messages import ROOT

FOLDER = ROOT / "spec" / "wireshark"
DISSECTOR = (FOLDER / "zcp.lua").read_text(encoding="utf-8")
GUIDE = (FOLDER / "README.md").read_text(encoding="utf-8")
VECTORS = ROOT / "spec" / "vectors"
TABLES = json.loads((VECTORS / "tables.json").read_text(encoding="utf-8"))
STREAMING = json.loads((VECTORS / "streaming" / "tables.json").read_text(encoding="utf-8"))


def test_codes_and_kinds_equal_those_of_the_protocol() -> None:
    codes = re.findall(r'^    \[(\d+)\] = "([A-Z_]+)",$', DISSECTOR, re.MULTILINE)
    assert {name: int(code) for code, name in codes} == TABLES["codes"]
    kinds: dict[str, int] = {}
    for names, numbers in re.findall(r"^local ([A-Z]+(?:, [A-Z]+)+) = ([0-9, ]+)$", DISSECTOR, re.MULTILINE):
        kinds |= zip(names.split(", "), map(int, numbers.split(", ")), strict=True)
    assert kinds == TABLES["kinds"] | STREAMING["kinds"]


def test_guide_lists_every_field() -> None:
    fields = set(re.findall(r'ProtoField\.\w+\(\s*"([a-z_.]+)"', DISSECTOR))
    assert len(fields) > 40
    listed = GUIDE[GUIDE.index("## Fields") : GUIDE.index("## Masking")]
    assert set(re.findall(r"`(zcp\.[a-z_.]+)`", listed)) == fields


def test_guide_lists_every_expert_info() -> None:
    names = set(re.findall(r'= (?:fault|remark)\("([a-z_]+)"', DISSECTOR))
    assert len(names) > 15
    rows = GUIDE[GUIDE.index("| expert info ") : GUIDE.index("## Masking")].splitlines()[2:]
    cells = [row.split("|")[1] for row in rows if row.startswith("|")]
    assert {name for cell in cells for name in re.findall(r"`([a-z_]+)`", cell)} == names
