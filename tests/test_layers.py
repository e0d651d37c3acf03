"""Which way imports point, and who may touch the world: read from the source, said in words when broken."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KIT = "clients/conformance"

BELOW_THE_EDGE = {
    *("tls", "connection", "wire", "sessions", "auth", "stores", "certs", "observe", "alerts", "http"),
    *("errors", "common", "config"),
}

MAY_IMPORT: dict[str, set[str]] = {
    # below all
    "errors": set(),
    "common": {"errors"},
    # the core, without I/O
    "wire": {"errors"},
    "http": set(),
    "sessions": {"errors", "common"},
    "connection": {"wire", "sessions", "errors"},
    "deploy": set(),
    # beside the core
    "tls": {"errors", "common"},
    "config": {"errors", "common", "tls"},
    "observe": {"errors", "common", "config"},
    "auth": {"errors", "common", "wire", "sessions", "observe"},
    "certs": {"errors", "common", "config", "tls", "observe"},
    "stores": {"errors", "common", "sessions", "observe"},
    "alerts": {"errors", "common", "config", "observe"},
    # the edge
    "app": {"errors", "wire", "connection", "sessions", "auth", "observe"},
    "server": {"app"} | BELOW_THE_EDGE,
    "admin": {"server", "app"} | BELOW_THE_EDGE,
    "runtime": {"admin", "server", "app"} | BELOW_THE_EDGE,
    "client": {"tls", "connection", "wire", "errors", "common"},
    # on top
    "load": {"client", "auth", "tls", "connection", "wire", "errors", "common"},
    "zcproto_conformance": {"client", "connection", "wire", "tls", "errors", "common"},
    "cli": {"load", "deploy", "client", "runtime", "admin", "server", "app"} | BELOW_THE_EDGE,
    "bench": {"load", "client", "runtime", "admin", "server", "app"} | BELOW_THE_EDGE,
    "__main__": {"cli"},
    "zcproto": {"runtime", "app", "client", "config", "errors"},
}
"""Each room with the rooms that it may import. What is not here may not be imported, and has to be added first."""

UPWARD = {
    (
        "zcproto/load/demo/child.py",
        "cli",
    ): "it is the program of a process of its own, which is `zcproto serve`",
    ("zcproto/app/context.py", "server"): "for types; goes with the composition in runtime/build.py",
    ("zcproto/cli/bench.py", "bench"): "goes with `python -m bench`",
}
"""Imports that point up for a reason. A reason that is no longer needed is a fault, too."""

REASONS = {
    ("wire", "*"): "wire knows the layout of bytes and zcproto.errors, and nothing else",
    ("sessions", "wire"): "sessions take tokens as values: they know no frames",
    ("sessions", "connection"): "sessions outlive connections and know none",
    ("tls", "*"): "tls moves records: it knows no sessions, connections, frames or certificates' making",
    ("certs", "*"): "certs makes and loads certificates: it knows nothing of who uses them",
    ("client", "server"): "client and server meet on the wire only",
    ("server", "client"): "client and server meet on the wire only",
    ("stores", "*"): "stores keep sessions: they know no connections, and nobody who asks",
    ("http", "*"): "http knows messages and routes: what they are about is above it",
    ("connection", "*"): "connection joins wire and sessions; all else is above it",
    ("*", "*"): "imports point down: cli, bench > server, client > tls > connection > wire; see MAY_IMPORT",
}

CORE = {"wire", "connection", "sessions", "http"}
NOT_IN_THE_CORE = {
    *("asyncio", "ssl", "socket", "os", "time", "pathlib", "random", "secrets", "logging", "structlog"),
    *("io", "threading", "select", "selectors", "subprocess", "tempfile", "shutil", "uuid", "datetime"),
}

READS_TIME_OR_CHANCE = {
    "time": {"*"} - {"sleep"},
    "secrets": {"*"},
    "random": {"*"},
    "uuid": {"uuid1", "uuid4"},
    "os": {"urandom", "getrandom"},
    "datetime": {"now", "utcnow", "today"},
}
"""What only zcproto/common/clock.py may use, by module; `*` is anything but `sleep`."""

ALLOWED = {
    "zcproto/common/clock.py": {
        "time": "this is the one reader of time",
        "os": "and of the system's randomness",
    },
    "zcproto/client/client.py": {
        "random": "jitter of retries, for whoever gives no other source; nothing secret"
    },
    "zcproto/cli/private_file.py": {"secrets": "the name of a temporary file"},
    "zcproto/certs/keeper.py": {"random": "jitter of retries; nothing secret"},
    "zcproto/observe/loop_lag.py": {"time": "measures how long the loop of this machine really stood still"},
    "zcproto/server/state.py": {"secrets": "an incident's id, which joins an answer to a line of the log"},
    "zcproto/tls/server.py": {"time": "ends a turn of the loop after so much real time"},
}
"""Files with a reason of their own. A reason that is no longer needed is a fault, too."""

MEASURES = {"bench", "load"}
"""These rooms exist to measure, so they read clocks where they like."""


@cache
def parsed(source: str) -> ast.Module:
    """Each file is parsed once for all rules."""
    return ast.parse(source)


@cache
def sources() -> dict[str, str]:
    """Every source file of the package, of bench and of the conformance kit by its path from the root."""
    paths = [path for folder in ("zcproto", "bench", KIT) for path in sorted((ROOT / folder).rglob("*.py"))]
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in paths
        if path.name != "setup.py"
    }


def room_of(dotted: str) -> str | None:
    """The room of a module of ours, or None for anybody else's."""
    first, *rest = dotted.split(".")
    if first in {"bench", "zcproto_conformance"}:
        return first
    if first != "zcproto":
        return None
    return rest[0] if rest else "zcproto"


def module_of(path: str) -> str:
    return path.removeprefix(f"{KIT}/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports_of(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports, at its top or anywhere inside."""
    package = module_of(path).split(".")
    if not path.endswith("/__init__.py"):
        package = package[:-1]
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module in {"zcproto", "bench"}:  # `from zcproto import wire` imports a room
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def broken_layers(path: str, source: str) -> list[str]:
    """What a file imports from a room that is not below its own."""
    room = room_of(module_of(path))
    assert room is not None
    if room not in MAY_IMPORT:
        return [
            f"{path}: the room {room!r} is new: say in MAY_IMPORT what it may import, and who may import it"
        ]
    faults = []
    for line, name in imports_of(path, source):
        target = room_of(name)
        if target in {None, room} or target in MAY_IMPORT[room] or (path, target) in UPWARD:
            continue
        wanted = [(room, target), (room, "*"), ("*", "*")]
        reason = next(REASONS[key] for key in wanted if key in REASONS)
        faults.append(f"{path}:{line} imports {name}: {reason}")
    return faults


def io_in_the_core(path: str, source: str) -> list[str]:
    """What a file of the core imports that touches the world."""
    if room_of(module_of(path)) not in CORE:
        return []
    return [
        f"{path}:{line} imports {name}: the core has no I/O, clock or chance; time and randomness are arguments"
        for line, name in imports_of(path, source)
        if name.split(".")[0] in NOT_IN_THE_CORE
    ]


def readers(path: str, source: str) -> Iterator[tuple[int, str, str]]:
    """Line, module and name of every use of time or chance."""
    tree = parsed(source)
    names: dict[str, str] = {}  # what a module is called in this file
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in READS_TIME_OR_CHANCE:
            if node.module == "datetime":  # classes, whose methods are looked for below
                names |= {alias.asname or alias.name: "datetime" for alias in node.names}
                continue
            for alias in node.names:
                if is_reader(node.module, alias.name):
                    yield node.lineno, node.module, alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = (
                node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            )
            module = names.get(owner, owner if owner == "datetime" else "")
            if module in READS_TIME_OR_CHANCE and is_reader(module, node.attr):
                yield node.lineno, module, node.attr


def is_reader(module: str, name: str) -> bool:
    wanted = READS_TIME_OR_CHANCE[module]
    return name in wanted or ("*" in wanted and name != "sleep" and not name.endswith("Error"))


def hidden_time(path: str, source: str) -> list[str]:
    """Uses of time or chance that have no reason in ALLOWED."""
    if room_of(module_of(path)) in MEASURES:
        return []
    return [
        f"{path}:{line} uses {module}.{name}: only zcproto/common/clock.py reads time and randomness"
        for line, module, name in readers(path, source)
        if module not in ALLOWED.get(path, {})
    ]


def lost_cancellation(path: str, source: str) -> list[str]:
    """Uses of wait_for: until Python 3.12 it swallows a cancellation that comes with what it waits for."""
    return [
        f"{path}:{node.lineno} uses asyncio.wait_for, which can lose a cancellation: use asyncio.timeout"
        for node in ast.walk(parsed(source))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "asyncio.wait_for"
    ]


CHECKS = [broken_layers, io_in_the_core, hidden_time, lost_cancellation]


@pytest.mark.parametrize("check", CHECKS, ids=[check.__name__ for check in CHECKS])
def test_no_file_breaks_the_rule(check: object) -> None:
    assert callable(check)
    faults = [fault for path, source in sources().items() for fault in check(path, source)]
    assert not faults, "\n" + "\n".join(faults)


def test_every_exception_is_still_needed() -> None:
    used = {(path, module) for path, source in sources().items() for _, module, _ in readers(path, source)}
    assert {(path, module) for path, modules in ALLOWED.items() for module in modules} - used == set()
    up = {(path, room_of(name)) for path, source in sources().items() for _, name in imports_of(path, source)}
    assert set(UPWARD) - up == set()


def test_every_room_is_there() -> None:
    found = {room_of(module_of(path)) for path in sources()}
    assert set(MAY_IMPORT) - found == set()


def test_the_table_has_no_circles() -> None:
    left = {room: set(below) for room, below in MAY_IMPORT.items()}
    while left:
        lowest = {room for room, below in left.items() if not below & set(left)}
        assert lowest, f"these import one another: {sorted(left)}"
        for room in lowest:
            del left[room]


# --- the checks themselves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "source", "said"),
    [
        ("zcproto/wire/x.py", "from zcproto.sessions import Session", "wire knows the layout"),
        ("zcproto/wire/x.py", "import zcproto.common.clock", "wire knows the layout"),
        ("zcproto/wire/x.py", "def f():\n    from zcproto import tls", "wire/x.py:2 imports zcproto.tls"),
        ("zcproto/wire/x.py", "from ..tls import server", "wire/x.py:1 imports zcproto.tls"),
        ("zcproto/wire/__init__.py", "from ..tls import server", "imports zcproto.tls"),
        ("zcproto/sessions/x.py", "from zcproto.wire.frame import TOKEN_SIZE", "tokens as values"),
        ("zcproto/sessions/x.py", "from zcproto.connection import server", "outlive connections"),
        ("zcproto/tls/x.py", "from zcproto.certs import own", "tls moves records"),
        ("zcproto/certs/x.py", "from zcproto.sessions import Session", "certs makes and loads"),
        ("zcproto/client/x.py", "from zcproto.server import App", "meet on the wire only"),
        ("zcproto/server/x.py", "from zcproto.client import connect", "meet on the wire only"),
        ("zcproto/connection/x.py", "from zcproto.tls import server", "connection joins wire and sessions"),
        ("zcproto/server/x.py", "import zcproto.load", "imports point down"),
        ("zcproto/config/x.py", "from zcproto.server import App", "imports point down"),
        ("zcproto/server/x.py", "from zcproto import connect", "imports point down"),
        ("bench/x.py", "from zcproto.cli import main", "imports point down"),
        ("zcproto/attic/x.py", "", "the room 'attic' is new"),
    ],
)
def test_an_import_that_points_up_is_found_and_explained(path: str, source: str, said: str) -> None:
    (fault,) = broken_layers(path, source)
    assert said in fault


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "zcproto/wire/x.py",
            "from zcproto.errors import Code\nfrom zcproto.wire.frame import Kind\nimport struct",
        ),
        (
            "zcproto/wire/x.py",
            "from . import frame\nfrom .decoder import FrameDecoder\nfrom ..errors import Code",
        ),
        ("zcproto/connection/x.py", "from zcproto import sessions, wire"),
        ("zcproto/cli/x.py", "import zcproto.load\nfrom zcproto.client import connect"),
        ("bench/load/x.py", "from bench.compare import client\nfrom zcproto.wire import frame"),
        ("zcproto/__init__.py", "from zcproto.app import App"),
    ],
)
def test_an_import_that_points_down_is_good(path: str, source: str) -> None:
    assert broken_layers(path, source) == []


@pytest.mark.parametrize("module", sorted(NOT_IN_THE_CORE))
@pytest.mark.parametrize("room", sorted(CORE))
def test_the_world_is_not_imported_by_the_core(room: str, module: str) -> None:
    for source in (f"import {module}", f"from {module} import x", f"import {module}.x as y"):
        (fault,) = io_in_the_core(f"zcproto/{room}/x.py", source)
        assert "the core has no I/O" in fault
    assert io_in_the_core("zcproto/server/x.py", f"import {module}") == []


@pytest.mark.parametrize(
    "source",
    [
        "import time\nnow = time.time()",
        "import time as t\nnow = t.monotonic_ns()",
        "from time import perf_counter",
        "import os\ntoken = os.urandom(32)",
        "from os import urandom",
        "import secrets\nmake = secrets.token_bytes",
        "from random import random",
        "import random\nrandom.seed(1)",
        "from uuid import uuid4",
        "import datetime\nnow = datetime.datetime.now()",
        "from datetime import UTC, datetime\nnow = datetime.now(UTC)",
        "from datetime import date as day\nnow = day.today()",
    ],
)
def test_a_hidden_clock_is_found(source: str) -> None:
    (fault,) = hidden_time("zcproto/server/x.py", source)
    assert "only zcproto/common/clock.py reads time and randomness" in fault
    assert hidden_time("bench/x.py", source) == []


@pytest.mark.parametrize(
    "source",
    [
        "import time\ntime.sleep(1)",
        "import os\nos.replace('a', 'b')",
        "from datetime import UTC, datetime\nthen = datetime.fromtimestamp(0, UTC)",
        "now = self.clock.now()",
        "import datetime\nday = datetime.timedelta(days=1)",
    ],
)
def test_what_is_no_clock_is_left_alone(source: str) -> None:
    assert hidden_time("zcproto/server/x.py", source) == []


def test_a_wait_that_can_lose_a_cancellation_is_found() -> None:
    (fault,) = lost_cancellation(
        "bench/x.py", "import asyncio\nasync def f():\n await asyncio.wait_for(g(), 1)"
    )
    assert "bench/x.py:3 uses asyncio.wait_for" in fault
    assert lost_cancellation("bench/x.py", "async def _wait_for(x): await self._wait_for(x)") == []
