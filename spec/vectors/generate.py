"""Write the test vectors, and the example conversation in the specification, from one source.

    python spec/vectors/generate.py           write the files
    python spec/vectors/generate.py --check   list outdated files, and exit with 1 if there are any

The same source always gives the same bytes. To add a vector, add it to the module of its subject in
`makers/` and run this.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from makers import (
    arrival,
    bodies,
    bodies_invalid,
    calls,
    conversation,
    durable,
    frames,
    freshness,
    headers,
    items,
    retry,
    segments,
    signatures,
    streams,
    text,
)
from makers.conversation import as_json, as_text, steps, streaming_steps
from makers.forms import CODES, KINDS, STREAM_KINDS

HERE = Path(__file__).resolve().parent
SPECIFICATION = HERE.parent / "zcp1.md"
EXAMPLES = {"conversation": steps, "streaming": streaming_steps}
"""The conversations in the specification, between comments with these names."""
SUBJECTS = {
    "frames": frames,
    "headers": headers,
    "freshness": freshness,
    "streams": streams,
    "bodies": bodies,
    "bodies-invalid": bodies_invalid,
    "segments": segments,
}
TEXTS = {"text": text, "signatures": signatures, "retry": retry}


def documents() -> dict[str, dict[str, Any]]:
    """Every vector file by its name without ending."""
    made: dict[str, dict[str, Any]] = {}
    for name, module in SUBJECTS.items():
        made[name] = _document("frames", module.SUBJECT, module.NOTES, module.vectors())
    for name, module in TEXTS.items():
        made[name] = _document(name, module.SUBJECT, module.NOTES, module.vectors())
    made["arrival"] = _document("arrival", arrival.SUBJECT, arrival.NOTES, arrival.vectors())
    made["conversation"] = _document("conversation", conversation.SUBJECT, {}, as_json(steps()))
    made["tables"] = {
        "$schema": "schema.json",
        "type": "tables",
        "protocol": "zcp/1",
        "kinds": KINDS,
        "codes": CODES,
    }
    return made


def streaming_documents() -> dict[str, dict[str, Any]]:
    """Return the vector files of streams and calls, which an implementation without them does not need."""
    above = "../schema.json"
    return {
        "streaming/items": _document("frames", items.SUBJECT, items.NOTES, items.vectors(), above),
        "streaming/calls": _document("frames", calls.SUBJECT, calls.NOTES, calls.vectors(), above),
        "streaming/durable": _document("frames", durable.SUBJECT, durable.NOTES, durable.vectors(), above),
        "streaming/conversation": _document(
            "conversation", conversation.STREAMING_SUBJECT, {}, as_json(streaming_steps()), above
        ),
        "streaming/tables": {
            "$schema": above,
            "type": "tables",
            "protocol": "zcp/1",
            "kinds": STREAM_KINDS,
            "codes": CODES,
        },
    }


def _document(
    kind: str,
    subject: str,
    notes: dict[str, str],
    vectors: list[dict[str, Any]],
    schema: str = "schema.json",
) -> dict[str, Any]:
    return {
        "$schema": schema,
        "type": kind,
        "protocol": "zcp/1",
        "subject": subject,
        "notes": notes,
        "count": len(vectors),
        "vectors": vectors,
    }


def files() -> dict[Path, str]:
    """Every file that is generated, with what it must hold."""
    all_documents = documents() | streaming_documents()
    made = {HERE / f"{name}.json": json.dumps(what, indent=1) + "\n" for name, what in all_documents.items()}
    specification = SPECIFICATION.read_text(encoding="utf-8")
    for name, conversation_steps in EXAMPLES.items():
        begin, end = f"<!-- {name}: begin (generated) -->\n", f"<!-- {name}: end -->\n"
        before, _, rest = specification.partition(begin)
        _, _, after = rest.partition(end)
        specification = f"{before}{begin}\n{as_text(conversation_steps())}\n{end}{after}"
    made[SPECIFICATION] = specification
    return made


def outdated() -> list[Path]:
    """The files whose content is not what this makes."""
    return [
        path
        for path, text in files().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        stale = outdated()
        for path in stale:
            sys.stderr.write(f"out of date: {path.relative_to(HERE.parent)}; run {Path(__file__).name}\n")
        return 1 if stale else 0
    if arguments:
        sys.stderr.write(f"{__doc__}")
        return 2
    for path, content in files().items():
        path.write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
