"""Read an audit trail by its published schema."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

SCHEMA = Path(__file__).parents[1] / "docs" / "reference" / "audit.schema.json"


@cache
def validator() -> Draft202012Validator:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a trail, each of which must validate."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        validator().validate(line)
    return lines
