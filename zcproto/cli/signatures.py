"""The methods of a server as text: their signatures, what they do, and the types in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import click

from zcproto.cli.stub_python import Python
from zcproto.cli.stub_types import Alias, Stubs


def listed_methods(info: Any) -> list[Mapping[str, Any]]:
    """Return the methods in an answer of `server.info`. Raises click.ClickException for another answer."""
    methods = info.get("methods") if isinstance(info, dict) else None
    if not isinstance(methods, list) or not all(isinstance(each, dict) for each in methods):
        raise click.ClickException("the answer of server.info has no list of methods")
    return methods


def signatures(methods: Iterable[Mapping[str, Any]]) -> str:
    """Return the methods of an application as text: their signatures, what they do, and the types in them."""
    language = Python()
    found = Stubs(methods, language)
    lines = []
    for method in found.methods:
        lines.append(language.signature(method))
        lines += [f"    {line}" for line in method.doc.splitlines()[:1]]
    lines += [f"{name}(...)" for name in found.without_schema]
    for each in found.types:
        if isinstance(each, Alias):
            lines += ["", f"{each.name} = {each.type}"]
            continue
        fields = [f"{one.name}: {one.type}{one.default and f' = {one.default}'}" for one in each.fields]
        lines += ["", f"{each.name}:", *(f"    {one}" for one in fields)]
    return "\n".join(lines)
