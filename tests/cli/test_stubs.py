"""`zcproto stubs` and `zcproto call --list`: typed clients that refuse wrong arguments."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import json
import re
import subprocess
import sys
import textwrap
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import zcproto
from tests.cli import stub_app
from tests.docs.blocks import blocks_of, change
from tests.docs.messages import ROOT
from tests.helpers import run_mypy
from tests.server.conftest import Serve
from tests.server.helpers import KEY, PATIENT_CLIENT
from zcproto.cli import main
from zcproto.cli.stub_python import Python, signatures
from zcproto.cli.stub_types import Stubs, clean_text, identifier
from zcproto.cli.stub_typescript import TypeScript

Capture = pytest.CaptureFixture[str]
SOURCE = "tests.cli.stub_app:app"
NODE = ROOT / "clients" / "typescript"
TUTORIAL = sorted((ROOT / "docs" / "tutorial").glob("[0-9]*.md"))
TSC = NODE / "node_modules" / ".bin" / "tsc"


def write(language: str, path: Path, *options: str) -> Path:
    assert main(["stubs", SOURCE, "--language", language, "--out", str(path), *options]) == 0
    return path


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


# --- Python --------------------------------------------------------------------------------------------------

RIGHT = """
import datetime
from decimal import Decimal
from uuid import UUID

from stub_client import Api, LineInput, OrderInput


async def main(api: Api) -> str:
    run: str | None = api.count_lines(item="tea", durable=True).id
    line = LineInput(item="tea")
    order = OrderInput(id=UUID(int=1), lines=[line, {"item": "cup", "count": 2}], placed=datetime.datetime.now())
    found = await api.order_place(order=order, urgent=True, timeout=2.0, call_timeout=5)
    price: Decimal = found["lines"][0]["price"]
    await api.order_place(order=found)
    pets = await api.pet(pet={"kind": "dog", "name": "Rex"}, level="high")
    await api.list2()
    await api.further(a=1, b=2)
    size: int = await api.upload(name="a", items=[b"x"])
    async with api.count_lines(item="tea") as stream:
        async for sent in stream:
            return sent["item"]
    async for each in api.orders(items=[line, *found["lines"]]):
        print(each["id"].hex, size, price)
    return f"{pets} {run}"
"""

WRONG = """
from stub_client import Api


async def main(api: Api) -> None:
    await api.order_place(order={"id": 5, "lines": []})
    await api.order_place(order={"lines": []})
    await api.pet(pet={"kind": "cow"})
    await api.pet(pet={"kind": "cat"}, level="middle")
    await api.further(a="1")
    await api.upload(name=b"a", items=[b"x"])
    await api.upload(name="a", items=["x"])
    api.count_lines()
"""


TUTORIAL_RIGHT = """
from typing import assert_type

from stub_client import Api


async def main(api: Api) -> None:
    turn = await api.ask(prompt="hi")
    print(turn["prompt"], [each["model"] for each in await api.history(limit=3)])
    stream = api.chat(prompt="hi", model="owl")
    async for word in stream:
        print(word.upper())
    assert_type(stream.result, None)
    await api.job_cancel(number=await api.job_start(prompt="hi", idempotency_key="1"))
"""

TUTORIAL_WRONG = """
from stub_client import Api


async def main(api: Api) -> None:
    await api.ask(prompt=7)
    await api.ask()
    await api.history(limit="3")
    api.chat(prompt="hi", modell="owl")
    await api.job_cancel(number="1")
"""


def write_for(application: str, language: str, path: Path, *options: str) -> None:
    """Write the stubs of the tutorial's application, or of stub_app."""
    if application == "stub_app":
        write(language, path, *options)
        return
    files: dict[str, str] = {}
    for page in TUTORIAL:
        for block in blocks_of(page):
            if block.language == "python" and block.file is not None:
                files[block.file] = change(files[block.file], block.text) if block.is_change else block.text
    for name in ("gateway.py", "model.py"):
        (path.parent / name).write_text(files[name])
    command = ["zcproto", "stubs", "gateway:app", "--language", language, "--out", str(path), *options]
    subprocess.run([sys.executable, "-m", *command], cwd=path.parent, check=True)


def lines_of_main(text: str) -> range:
    """Return the numbers of the lines of the function main."""
    lines = text.rstrip("}\n").splitlines()
    head = next(number for number, line in enumerate(lines, 1) if line.endswith((":", "{")))
    return range(head + 1, len(lines) + 1)


def without_await(program: str) -> str:
    return re.sub(r"\b(async|await) ", "", program)


@pytest.mark.parametrize("blocking", [False, True], ids=["async", "blocking"])
@pytest.mark.parametrize(
    ("application", "right", "wrong"),
    [("stub_app", RIGHT, WRONG), ("tutorial", TUTORIAL_RIGHT, TUTORIAL_WRONG)],
    ids=["stub_app", "tutorial"],
)
def test_python_client_has_strict_types(
    application: str, right: str, wrong: str, blocking: bool, tmp_path: Path
) -> None:
    write_for(application, "python", tmp_path / "stub_client.py", *["--blocking"] * blocking)
    (tmp_path / "right.py").write_text(without_await(right) if blocking else right)
    (tmp_path / "wrong.py").write_text(without_await(wrong) if blocking else wrong)
    checked = run_mypy(tmp_path, "--no-error-summary", "right.py", "wrong.py")
    lines = [line for line in checked.stdout.splitlines() if " error: " in line]
    # Another run's cache can repeat what it found in the package with other options.
    found = {tuple(line.split(":")[:2]) for line in lines if line.startswith(("right.py", "wrong.py"))}
    assert found == {("wrong.py", str(number)) for number in lines_of_main(wrong)}, checked.stdout
    if application == "tutorial":  # which annotates everything
        checked = run_mypy(tmp_path, "--disallow-any-expr", "right.py")
        assert "right.py" not in checked.stdout


def test_python_client_works(serve: Serve, tmp_path: Path) -> None:
    shop = load(write("python", tmp_path / "stub_client.py"))
    server = serve(stub_app.app)

    async def use() -> None:
        async with zcproto.connect(
            f"127.0.0.1:{server.port}",
            user="ada",
            key=KEY,
            ca_file=server.home / "certs" / "ca.crt",
            **PATIENT_CLIENT,
        ) as client:
            api = shop.Api(client)
            order = {
                "id": UUID(int=7),
                "lines": [{"item": "tea", "price": Decimal("2.50")}],
                "label": b"\x00",
            }
            assert await api.order_place(order=order) == {
                **{"id": UUID(int=7), "color": "red", "placed": None, "parts": [], "tags": []},
                **{"place": (1, "shelf"), "label": b"\x00"},
                "lines": [{"item": "tea", "count": 1, "price": Decimal("2.50")}],
            }
            assert await api.pet(pet={"kind": "cat"}) == {"low": {"kind": "cat"}}
            assert await api.list2() is None
            assert await api.further(a=1) == {"a": 1}
            assert await api.upload(name="a", items=[b"abc", b"d"]) == 4
            async with api.count_lines(item="tea", n=3) as stream:
                assert [line["count"] async for line in stream] == [1, 2, 3]
                assert stream.result is None
            async with api.count_lines(item="tea", n=3, durable=True) as stream:
                async for _ in stream:
                    break
            assert stream.position == 1
            assert [line["count"] async for line in client.resume(stream.id, after=1)] == [2, 3]
            assert not await stream.cancel()
            assert [each["id"] async for each in api.orders(items=[{"item": "tea"}])] == [UUID(int=1)]
            stream = api.count_lines(item="tea")
            stream.close()
            with pytest.raises(
                zcproto.InvalidArgument, match=r"order\.lines\[0\]\.count must be greater than 0"
            ):
                await api.order_place(order={**order, "lines": [{"item": "tea", "count": 0}]})

    asyncio.run(use())


def test_blocking_python_client_works(serve: Serve, tmp_path: Path) -> None:
    shop = load(write("python", tmp_path / "stub_blocking.py", "--blocking"))
    server = serve(stub_app.app)
    with zcproto.connect_blocking(
        f"127.0.0.1:{server.port}", user="ada", key=KEY, ca_file=server.ca_file, **PATIENT_CLIENT
    ) as client:
        api = shop.Api(client)
        assert api.pet(pet={"kind": "cat"}) == {"low": {"kind": "cat"}}
        assert api.upload(name="a", items=[b"abc", b"d"]) == 4
        with api.count_lines(item="tea", n=3) as stream:
            assert [line["count"] for line in stream] == [1, 2, 3]
            assert stream.result is None
        with api.count_lines(item="tea", n=3, durable=True) as stream:
            assert next(iter(stream))["count"] == 1
        assert [line["count"] for line in client.resume(stream.id, after=stream.position)] == [2, 3]
        assert not stream.cancel()
        stream = api.orders(items=[{"item": "tea"}])
        stream.close()
    assert main(["stubs", SOURCE, "--language", "typescript", "--blocking"]) == 2


# --- TypeScript ----------------------------------------------------------------------------------------------

RIGHT_TS = """
import { Api, type LineInput, type OrderInput } from "./stub_client.js";

export async function main(api: Api): Promise<string> {
  const line: LineInput = { item: "tea" };
  const order: OrderInput = { id: "7", lines: [line], label: new Uint8Array(1), place: [1, "shelf"] };
  const found = await api.orderPlace({ order, urgent: true, timeout: 2 }, { timeoutMs: 5 });
  const pets = await api.pet({ pet: { kind: "dog", name: "Rex" }, level: "high" });
  await api.orderPlace({ order: found });
  await api.list();
  await api.further({ a: 1 });
  const size: number = await api.upload([new Uint8Array(1)], { name: "a" });
  for await (const each of api.countLines({ item: "tea" }, { durable: true })) {
    const count: number = each.count;
    return `${count} ${size} ${found.lines[0]?.item} ${Object.keys(pets)}`;
  }
  for await (const each of api.orders([line])) {
    return each.id;
  }
  return "";
}
"""

WRONG_TS = """
import type { Api } from "./stub_client.js";

export async function main(api: Api): Promise<void> {
  await api.orderPlace({ order: { id: 5, lines: [] } });
  await api.orderPlace({ order: { lines: [] } });
  await api.pet({ pet: { kind: "cow" } });
  await api.pet({ pet: { kind: "cat" }, level: "middle" });
  await api.further({ a: "1" });
  await api.upload([new Uint8Array(1)], { name: 7 });
  await api.upload(["x"], { name: "a" });
  api.countLines({});
}
"""


TUTORIAL_RIGHT_TS = """
import type { Api } from "./stub_client.js";

export async function main(api: Api): Promise<void> {
  const turn = await api.ask({ prompt: "hi" });
  console.log(turn.prompt, (await api.history({ limit: 3 })).map((each) => each.model));
  for await (const word of api.chat({ prompt: "hi", model: "owl" })) {
    console.log(word.toUpperCase());
  }
  await api.jobCancel({ number: await api.jobStart({ prompt: "hi" }, { idempotencyKey: "1" }) });
}
"""

TUTORIAL_WRONG_TS = """
import type { Api } from "./stub_client.js";

export async function main(api: Api): Promise<void> {
  await api.ask({ prompt: 7 });
  await api.ask({});
  await api.history({ limit: "3" });
  api.chat({ prompt: "hi", modell: "owl" });
  await api.jobCancel({ number: "1" });
}
"""


@pytest.mark.parametrize(
    ("application", "right", "wrong"),
    [("stub_app", RIGHT_TS, WRONG_TS), ("tutorial", TUTORIAL_RIGHT_TS, TUTORIAL_WRONG_TS)],
    ids=["stub_app", "tutorial"],
)
@pytest.mark.skipif(
    not (TSC.exists() and (NODE / "dist").exists()),
    reason="the client for Node is not built; run npm ci in clients/typescript",
)
def test_typescript_client_has_strict_types(application: str, right: str, wrong: str, tmp_path: Path) -> None:
    write_for(application, "typescript", tmp_path / "stub_client.ts")
    (tmp_path / "right.ts").write_text(right)
    (tmp_path / "wrong.ts").write_text(wrong)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    scope = tmp_path / "node_modules" / "@zcproto"
    scope.mkdir(parents=True)
    (scope / "client").symlink_to(NODE)
    options = {
        "noEmit": True,
        "rootDir": "/",
        "types": ["node"],
        "typeRoots": [f"{NODE}/node_modules/@types"],
    }
    config = {"extends": f"{NODE}/tsconfig.json", "compilerOptions": options, "include": ["*.ts"]}
    (tmp_path / "tsconfig.json").write_text(json.dumps(config))
    checked = subprocess.run([TSC, "-p", tmp_path], capture_output=True, text=True, check=False)
    found = {
        line.partition(",")[0].rpartition("/")[2] for line in checked.stdout.splitlines() if line[:1] != " "
    }
    assert found == {f"wrong.ts({number}" for number in lines_of_main(wrong)}, checked.stdout


# --- where the methods are found -----------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["python", "typescript"])
def test_server_gives_the_same_client_as_its_application(
    language: str, serve: Serve, tmp_path: Path, home: Path, capsys: Capture
) -> None:
    server = serve(stub_app.app)
    key_file = tmp_path / "key"
    key_file.touch(0o600)
    key_file.write_text(KEY)
    address, ca = f"127.0.0.1:{server.port}", str(server.home / "certs" / "ca.crt")
    arguments = ["--ca", ca, "--user", "ada", "--key-file", str(key_file)]
    assert main(["stubs", address, "--language", language, *arguments]) == 0
    of_server = capsys.readouterr().out
    listed = sorted(
        ({**each.listing, "schema": each.schema} for each in stub_app.app), key=lambda each: each["name"]
    )
    writer = Python() if language == "python" else TypeScript()
    assert of_server == writer.write(Stubs(listed, writer), address)
    assert main(["call", address, "--list", *arguments]) == 0
    assert capsys.readouterr().out == signatures(listed) + "\n"


def test_signatures_have_types_and_defaults() -> None:
    text = signatures({**each.listing, "schema": each.schema} for each in stub_app.app)
    assert (
        textwrap.dedent(
            """\
        order.place(order: OrderInput, urgent: bool = false, timeout: float = 1.0) -> Order
            Place an order.
        pet(pet: Cat | Dog, level: Literal["low", "high"] = "low") -> dict[str, Cat | Dog]
        list() -> None
        further(**others: int) -> dict[str, Any]
        count.lines(item: str, n: int = 2) -> stream of Line
        upload(name: str, items: stream of bytes) -> int
        orders(items: stream of LineInput) -> stream of Order

        OrderInput:
            id: UUID
            lines: list[LineInput]
            color: Color = "red"
        """
        )
        in text
    )
    assert '\nColor = Literal["red", "green"]' in text


def test_call_needs_a_method_or_list(capsys: Capture) -> None:
    assert main(["call", "localhost:1"]) == 2
    assert main(["call", "localhost:1", "echo", "--list"]) == 2
    assert capsys.readouterr().err.count("Give either METHOD or --list.") == 2


def test_method_without_schema_is_left_out(
    monkeypatch: pytest.MonkeyPatch, home: Path, capsys: Capture
) -> None:
    answer = {"methods": [{"name": "old", "params": []}, {"name": 7}]}
    monkeypatch.setattr("zcproto.cli.stubs.call_once", lambda *_, **__: answer)
    assert main(["stubs", "localhost:1", "--language", "python"]) == 0
    out, err = capsys.readouterr()
    assert "class Api" in out
    assert err == "zcproto: without a schema in server.info, and left out: old\n"
    assert signatures(answer["methods"]) == "old(...)"


@pytest.mark.parametrize("answer", [None, {}, {"methods": 7}, {"methods": ["x"]}])
def test_answer_without_methods_is_refused(
    answer: Any, monkeypatch: pytest.MonkeyPatch, home: Path, capsys: Capture
) -> None:
    monkeypatch.setattr("zcproto.cli.stubs.call_once", lambda *_, **__: answer)
    assert main(["stubs", "localhost:1", "--language", "python"]) == 1
    assert "the answer of server.info has no list of methods" in capsys.readouterr().err


# --- hostile servers -----------------------------------------------------------------------------------------

EVIL = '"""\n*/ import os; os.system("x") //\x1b[31m \\'


def hostile() -> list[dict[str, Any]]:
    reference = {"$ref": f"#/$defs/{EVIL}"}
    params = {
        "type": "object",
        "properties": {EVIL: {"enum": [EVIL, 1.5]}, "class": {"const": EVIL}, "x": reference},
        "required": [EVIL],
    }
    definitions: dict[str, Any] = {
        EVIL: {"type": "object", "properties": {EVIL: reference, "import": {"type": EVIL}}},
        "loop": {"anyOf": [{"$ref": "#/$defs/loop"}, {"type": "string", "format": EVIL}]},
        "any": {"anyOf": [{"$ref": "#/$defs/missing"}, {"type": "integer"}]},
        **{
            f"d{number}": {"type": "object", "properties": {"d": {"$ref": f"#/$defs/d{number + 1}"}}}
            for number in range(200)
        },
    }
    schema = {
        "params": params,
        "result": {"$ref": "#/$defs/loop"},
        "sends": {"$ref": "#/$defs/d0"},
        "$defs": definitions,
    }
    bare = {
        "params": {"properties": {"a": 7}, "additionalProperties": {"type": "object"}},
        "takes": {"$ref": "#/$defs/any"},
        "$defs": definitions,
    }
    return [
        {"name": EVIL, "doc": EVIL, "schema": schema},
        {"name": "9.class", "doc": 'quoted "', "schema": bare},
        {
            "name": "9_class",
            "schema": {"params": 7, "$defs": 7, "result": {"prefixItems": [], "type": "array"}},
        },
        {"name": "_call", "schema": {"result": {"enum": []}, "sends": {"enum": [{}]}}},
    ]


def test_hostile_texts_stay_literals_in_python(tmp_path: Path) -> None:
    writer = Python()
    text = writer.write(Stubs(hostile(), writer), clean_text(EVIL))
    tree = ast.parse(text)
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert "os" not in imported
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert called == {"TypeAdapter", "TypedDict"}
    assert "\x1b" not in text
    (tmp_path / "evil_client.py").write_text(text)
    load(tmp_path / "evil_client.py")


def written(*methods: dict[str, Any]) -> str:
    writer = Python()
    return writer.write(Stubs(methods, writer), "shop:app")


@given(text=st.text(alphabet="\"'\\ a\n{", max_size=12))
@example(text='closes """')
@example(text='a""')
@example(text='a \\"')
def test_documentation_keeps_its_quotes_and_backslashes_in_python(text: str) -> None:
    tree = ast.parse(written({"name": "echo", "doc": text, "schema": {}}))
    (method,) = (node for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef))
    expected = "\n".join(line.strip() for line in text.strip().splitlines())
    assert (ast.get_docstring(method, clean=True) or "") == expected


def test_parameters_with_the_names_of_options_are_kept_in_python() -> None:
    names = ["items", "timeout", "idempotency_key", "others", "call_items", "call_timeout", "call_others"]
    properties = {name: {"type": "integer"} for name in names}
    schema = {
        "params": {"properties": properties, "additionalProperties": True},
        "takes": {"type": "integer"},
    }
    tree = ast.parse(written({"name": "echo", "schema": schema}))
    (method,) = (node for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef))
    assert {each.arg for each in method.args.kwonlyargs} == {*names, "call_items2", "call_timeout2"}
    assert method.args.kwarg is not None
    assert method.args.kwarg.arg == "others2"


def test_module_that_is_not_python_is_not_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("zcproto.cli.stub_python._docstring", lambda text, indent: '"""')
    path = tmp_path / "client.py"
    assert main(["stubs", SOURCE, "--language", "python", "--out", str(path)]) == 1
    assert not path.exists()


def test_hostile_texts_stay_literals_in_typescript() -> None:
    writer = TypeScript()
    text = writer.write(Stubs(hostile(), writer), EVIL)
    outside = [
        line
        for line in text.splitlines()
        if "os.system" in line and '\\n*/ import os; os.system(\\"x\\")' not in line
    ]
    assert all(
        line.lstrip().startswith(("*", "/**")) and "*/" not in line.removesuffix(" */") for line in outside
    )


def test_names_become_identifiers() -> None:
    assert identifier("order.place") == "order_place"
    assert identifier("order.place", capital=True) == "OrderPlace"
    assert identifier("class") == "class_"
    assert identifier("9.x") == "_9_x"
    assert identifier("\u00e9") == "_"
    assert clean_text("a\x1b[0m\nb\u202e") == "a?[0m\nb?"
