"""The files of the specification agree with each other, with their generator and with the code."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from types import ModuleType

import jsonschema
import pytest

from tests.helpers import FATAL_CODES
from tests.wire.vectors import (
    FOLDER,
    FRAME_FILES,
    SPEC,
    document,
    fields_of,
    frame_vectors,
    message_of,
    typed,
)
from zcproto.errors import Code
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import Kind, Side
from zcproto.wire.message import METHOD_MAX_LENGTH

FILES = [*FRAME_FILES, "arrival", "text", "signatures", "retry", "conversation", "tables"]
WITH_VECTORS = [name for name in FILES if name != "tables"]
SPECIFICATION = SPEC / "zcp1.md"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        import generate
    finally:
        sys.path.remove(str(FOLDER))
    module: ModuleType = generate
    return module


def test_generated_files_are_up_to_date(generator: ModuleType) -> None:
    assert generator.outdated() == [], "run: python spec/vectors/generate.py"


def test_check_reports_outdated_files(
    generator: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert generator.main(["--check"]) == 0
    assert generator.main(["--nonsense"]) == 2
    monkeypatch.setattr(
        generator, "files", lambda: {FOLDER / "frames.json": "other", FOLDER / "none.json": ""}
    )
    capsys.readouterr()
    assert generator.main(["--check"]) == 1
    assert "vectors/frames.json" in capsys.readouterr().err


def test_generator_does_not_import_the_package() -> None:
    for path in [FOLDER / "generate.py", *(FOLDER / "makers").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] in {"zcproto", "msgpack"}], path.name


def test_every_vector_file_is_listed_in_the_readme() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == {*FILES, "schema"}
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in FILES if f"`{name}.json`" not in readme] == []


def test_schema_is_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(document("schema"))


@pytest.mark.parametrize("name", FILES)
def test_file_matches_the_schema(name: str) -> None:
    jsonschema.Draft202012Validator(document("schema")).validate(document(name))


@pytest.mark.parametrize("name", WITH_VECTORS)
def test_file_has_the_number_of_vectors_and_explains_flags(name: str) -> None:
    vectors = document(name)["vectors"]
    assert document(name)["count"] == len(vectors)
    assert {flag for vector in vectors for flag in vector.get("flags", [])} == set(document(name)["notes"])


def test_vector_names_are_unique() -> None:
    names = Counter(
        vector["name"] for file in WITH_VECTORS for vector in document(file)["vectors"] if "name" in vector
    )
    assert [name for name, count in names.items() if count > 1] == []
    assert len(names) >= 400


def test_expected_codes_of_vectors_exist_in_the_code() -> None:
    for name, vector in frame_vectors().items():
        for outcome in vector["expect"]:
            if outcome["result"] == "error":
                code = Code[outcome["name"]]
                assert outcome["code"] == code, name
                assert outcome["fatal"] is (code in FATAL_CODES or outcome["stream"] == 0), name


def test_example_conversation_is_valid() -> None:
    decoders = {"server": FrameDecoder(Side.CLIENT, 2**20), "client": FrameDecoder(Side.SERVER, 2**20)}
    last = {"server": -1, "client": 0}
    salts = set()
    for step in document("conversation")["vectors"]:
        sender = step["from"]
        decoder = decoders[sender]
        decoder.feed(bytes.fromhex(step["bytes"]))
        frame = decoder.next_frame()
        assert frame is not None
        fields = fields_of(frame)
        assert fields["kind"] == step["kind"]
        assert int(fields["counter"]) == last[sender] + 1
        assert fields["timestamp"] == step["now"]
        last[sender] += 1
        salts.add(fields["salt"])
        message_of(frame, 32)
    assert len(salts) == 1


def rows_of(heading: str) -> list[list[str]]:
    """Return the cells of the first table under a heading of the specification, without its head."""
    text = SPECIFICATION.read_text(encoding="utf-8")
    section = text.split(f"\n{heading}\n", 1)[1]
    table = re.search(r"(?:^\|.*\|\n)+", section, re.MULTILINE)
    assert table is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()[2:]]


def test_specification_lists_every_kind() -> None:
    rows = [*rows_of("### 6.1 Kinds"), *rows_of("### 18.2 Kinds")]
    assert {row[1]: int(row[0], 16) for row in rows if row[1] != "reserved"} == {
        kind.name: kind.value for kind in Kind
    }


def test_specification_lists_every_code() -> None:
    rows = rows_of("### 10.1 Codes of calls") + rows_of("### 10.2 Codes of the protocol")
    assert {row[1]: int(row[0]) for row in rows} == {code.name: code.value for code in Code}


def test_specification_lists_header_fields_at_their_offsets() -> None:
    rows = rows_of("### 5.2 Fields")
    offsets = [int(row[0]) for row in rows]
    sizes = [int(row[1]) for row in rows[:-1]]
    assert [start + size for start, size in zip(offsets, sizes, strict=False)] == offsets[1:]
    assert offsets[-1] == 68


def test_referenced_sections_exist() -> None:
    text = SPECIFICATION.read_text(encoding="utf-8")
    headings = set(re.findall(r"^#{2,3} ([0-9]+(?:\.[0-9]+)?)\.? ", text, re.MULTILINE))
    mentioned = set(
        re.findall(
            r"(?<!RFC \d{4} )[Ss]ections? ([0-9]+(?:\.[0-9]+)?)",
            re.sub(r"RFC \d+,? section [0-9.]+", "", text),
        )
    )
    assert mentioned - headings == set()


def test_conversation_values_are_typed_json() -> None:
    assert typed([METHOD_MAX_LENGTH, b"\x00", None]) == [128, {"bin": "00"}, None]
