"""Typed clients in TypeScript, for the client for Node."""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar, Final

from zcproto.cli.stub_types import Class, Field, Language, StubMethod, Stubs, identifier, unique

_PROPERTY: Final = re.compile(r"[A-Za-z_$][A-Za-z0-9_$]*")


class TypeScript(Language):
    """Classes are interfaces. A large int is a bigint, which the types do not show."""

    anything = "unknown"
    simple: ClassVar = {
        **{"integer": "number", "number": "number", "string": "string", "boolean": "boolean", "null": "null"},
        "binary": "Uint8Array",
    }
    reserved = frozenset(
        {
            *(
                "Api",
                "CallOptions",
                "Stream",
                "StreamOptions",
                "UserClient",
                "Uint8Array",
                "Record",
                "Promise",
            ),
            *(
                "Array",
                "AsyncIterable",
                "Iterable",
                "Object",
                "String",
                "Number",
                "Boolean",
                "Symbol",
                "Omit",
            ),
        }
    )

    def literal(self, values: list[Any]) -> str:
        if not all(value is None or isinstance(value, str | int | float) for value in values):
            return "unknown"
        return self.union(map(json.dumps, values)) or "never"

    def array(self, item: str) -> str:
        return f"({item})[]" if " " in item else f"{item}[]"

    def tuple_of(self, items: list[str]) -> str:
        return f"[{', '.join(items)}]"

    def map_of(self, value: str) -> str:
        return f"Record<string, {value}>"

    def write(self, stubs: Stubs, source: str) -> str:
        parts = [_comment(f"Typed client of {source}, written by `zcproto stubs`: do not edit.", "")]
        kinds = [("Stream", any(each.sends for each in stubs.methods))]
        kinds.append(("StreamOptions", any(each.sends or each.takes for each in stubs.methods)))
        kinds.append(("CallOptions", any(not (each.sends or each.takes) for each in stubs.methods)))
        names = sorted([*(name for name, is_used in kinds if is_used), "UserClient"])
        parts.append(f'import type {{ {", ".join(names)} }} from "@zcproto/client";')
        for each in stubs.types:
            if isinstance(each, Class):
                parts.append(
                    "\n".join([f"export interface {each.name} {{", *_properties(each.fields, "  "), "}"])
                )
            else:
                parts.append(f"export type {each.name} = {each.type};")
        used = {"constructor"}
        methods = [_method(each, unique(_camel(each.name), used)) for each in stubs.methods]
        head = (
            "  readonly #client: UserClient;\n\n"
            "  constructor(client: UserClient) {\n    this.#client = client;\n  }"
        )
        about = _comment("The methods of an application, called by a client.", "")
        parts.append(f"{about}\nexport class Api {{\n" + "\n\n".join([head, *methods]) + "\n}")
        return "\n\n".join(parts) + "\n"


def _camel(name: str) -> str:
    text = identifier(name, capital=True)
    return text[0].lower() + text[1:]


def _comment(text: str, indent: str) -> str:
    lines = text.replace("*/", "* /").splitlines()
    if len(lines) <= 1:
        return f"{indent}/** {text.replace('*/', '* /')} */"
    return "\n".join(
        [f"{indent}/**", *(f"{indent} * {line.strip()}".rstrip() for line in lines), f"{indent} */"]
    )


def _properties(fields: list[Field], indent: str) -> list[str]:
    return [
        f"{indent}{each.name if _PROPERTY.fullmatch(each.name) else json.dumps(each.name)}"
        f"{'' if each.is_required else '?'}: {each.type};"
        for each in fields
    ]


def _method(method: StubMethod, name: str) -> str:
    fields = " ".join(_properties(method.params, "")).removesuffix(";")
    kind = f"{{ {fields} }}" if fields else ""
    if method.others:
        kind = f"{kind} & Record<string, unknown>" if kind else f"Record<string, {method.others}>"
    default = "" if any(each.is_required for each in method.params) else " = {}"
    arguments = [f"params: {kind}{default}"] if kind else []
    params = "{ ...params }" if kind else "{}"
    target = json.dumps(method.name)
    if method.takes:
        arguments.insert(0, f"items: AsyncIterable<{method.takes}> | Iterable<{method.takes}>")
    if method.sends or method.takes:
        item = method.sends or "never"
        left_out = '"items" | "reopen"' if method.takes else '"items"'
        arguments.append(f"options: Omit<StreamOptions<{item}>, {left_out}> = {{}}")
        sent = "{ ...options, items }" if method.takes else "options"
        call = f"this.#client.stream<{item}, {method.result}>({target}, {params}, {sent})"
        result = f"Stream<{item}, {method.result}>"
        if not method.sends:
            call, result = f"{call}.result", f"Promise<{method.result}>"
    else:
        arguments.append("options: CallOptions = {}")
        call = f"this.#client.call<{method.result}>({target}, {params}, options)"
        result = f"Promise<{method.result}>"
    head = f"  {name}({', '.join(arguments)}): {result} {{"
    lines = [_comment(method.doc, "  ")] if method.doc else []
    return "\n".join([*lines, head, f"    return {call};", "  }"])
