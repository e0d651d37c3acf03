"""Check the direction of imports and the use of clocks, randomness and I/O, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KIT = "clients/conformance"

BELOW_THE_EDGE = {
    *("tls", "connection", "wire", "sessions", "auth", "stores", "certs", "observe", "alerts", "http"),
    *("errors", "common", "config", "accelerator", "bus", "runs"),
}

MAY_IMPORT: dict[str, set[str]] = {
    # the base
    "errors": set(),
    "accelerator": set(),
    "common": {"errors", "accelerator"},
    # the sans-IO core
    "wire": {"errors", "accelerator"},
    "http": set(),
    "sessions": {"errors", "common"},
    "connection": {"wire", "sessions", "errors", "common", "accelerator"},
    # beside the core
    "tls": {"errors", "common"},
    "config": {"errors", "common", "tls"},
    "observe": {"errors", "common", "config"},
    "auth": {"errors", "common", "wire", "sessions", "observe"},
    "certs": {"errors", "common", "config", "tls", "observe"},
    "stores": {"errors", "common", "sessions", "observe"},
    "alerts": {"errors", "common", "config", "observe"},
    "runs": {"errors", "common", "wire", "observe"},
    # the edge
    "bus": {"errors", "common", "stores", "observe", "runs"},
    "app": {"bus", "errors", "common", "wire", "connection", "sessions", "auth", "observe"},
    "server": {"app"} | BELOW_THE_EDGE,
    "admin": {"server", "app"} | BELOW_THE_EDGE,
    "runtime": {"telemetry", "admin", "server", "app"} | BELOW_THE_EDGE,
    "workers": {"runtime", "admin", "server", "app"} | BELOW_THE_EDGE,
    "client": {"tls", "connection", "wire", "errors", "common"},
    # beside both ends
    "telemetry": {"app", "client", "connection", "wire", "observe", "config", "errors", "common"},
    # on top
    "testing": {"client", "runtime", "workers", "admin", "server", "app"} | BELOW_THE_EDGE,
    "load": {"app", "client", "auth", "tls", "connection", "wire", "errors", "common"},
    "zcproto_conformance": {"client", "connection", "wire", "tls", "errors", "common"},
    "cli": {"load", "client", "telemetry", "runtime", "workers", "admin", "server", "app"} | BELOW_THE_EDGE,
    "bench": {
        "zcproto_conformance",
        "load",
        "client",
        "telemetry",
        "runtime",
        "workers",
        "admin",
        "server",
        "app",
    }
    | BELOW_THE_EDGE,
    "__main__": {"cli"},
    "zcproto": {"runtime", "admin", "app", "auth", "client", "config", "common", "errors"},
}
"""The packages that each package may import."""

UPWARD = {
    ("zcproto/load/demo_child.py", "cli"): "the program of a separate process, which is `zcproto serve`",
    ("zcproto/runtime/run.py", "workers"): "serve() imports what runs several processes only if it is to",
}
"""Upward imports, each with its reason. An entry that is no longer needed fails the test."""

REASONS = {
    ("wire", "*"): "wire is the layout of bytes; it may import zcproto.errors and zcproto.accelerator only",
    ("sessions", "wire"): "sessions receive tokens as values, not as frames",
    ("sessions", "connection"): "sessions outlive connections and must not depend on them",
    (
        "tls",
        "*",
    ): "tls moves records; sessions, connections, frames and the issue of certificates are above it",
    ("certs", "*"): "certs issues and loads certificates; their users are above it",
    ("client", "server"): "client and server share the wire only",
    ("server", "client"): "client and server share the wire only",
    ("stores", "*"): "stores keep sessions; connections and callers are above them",
    ("http", "*"): "http has messages and routes; what they mean is above it",
    ("runtime", "workers"): "workers runs several servers; one server needs to know none of it",
    ("*", "testing"): "testing is for tests; what serves and calls must work without it",
    ("connection", "*"): "connection joins wire and sessions; everything else is above it",
    ("*", "*"): "imports point down: cli, bench > server, client > tls > connection > wire; see MAY_IMPORT",
}

PLUGIN = "zcproto/testing/plugin.py"

CORE = {"wire", "connection", "sessions", "http"}
NOT_IN_THE_CORE = {
    *("asyncio", "ssl", "socket", "os", "time", "pathlib", "random", "secrets", "logging"),
    *("io", "threading", "select", "selectors", "subprocess", "tempfile", "shutil", "uuid", "datetime"),
}

CLOCKS_AND_RANDOMNESS = {
    "time": {"*"} - {"sleep"},
    "secrets": {"*"},
    "random": {"*"},
    "uuid": {"uuid1", "uuid4"},
    "os": {"urandom", "getrandom"},
    "datetime": {"now", "utcnow", "today"},
}
"""What only zcproto/common/clock.py may use, by module; `*` means everything except `sleep`."""

ALLOWED = {
    "zcproto/common/clock.py": {"time": "the clock", "os": "the system's randomness"},
    "zcproto/client/client.py": {"random": "default source of retry jitter; not secret"},
    "zcproto/certs/manager.py": {"random": "retry jitter; not secret"},
    "zcproto/observe/loop_lag.py": {"time": "measures the real lag of the loop"},
    "zcproto/server/state.py": {"secrets": "incident ids, which join an answer to a log line"},
    "zcproto/telemetry/requests.py": {"random": "which traces are recorded, and their ids; not secret"},
    "zcproto/tls/server.py": {"time": "limits one turn of the loop in real time"},
}
"""Other uses, each with its reason. An entry that is no longer needed fails the test."""

MEASURES = {"bench", "load"}
"""Packages that exist to measure; they may read clocks."""


@cache
def nodes_of(source: str) -> tuple[ast.AST, ...]:
    """Return all nodes of a file, which is parsed once for all checks."""
    return tuple(ast.walk(ast.parse(source)))


@cache
def sources() -> dict[str, str]:
    """Return the source files of the package, of bench and of the conformance kit by path from the root."""
    paths = [path for folder in ("zcproto", "bench", KIT) for path in sorted((ROOT / folder).rglob("*.py"))]
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in paths
        if path.name != "setup.py"
    }


def package_of(dotted: str) -> str | None:
    """Return the package under test that a module belongs to, or None for a third-party module."""
    first, *rest = dotted.split(".")
    if first in {"bench", "zcproto_conformance"}:
        return first
    if first != "zcproto":
        return None
    return rest[0] if rest else "zcproto"


def module_of(path: str) -> str:
    return path.removeprefix(f"{KIT}/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported_names(path: str, source: str) -> Iterator[tuple[int, str, str | None]]:
    """Yield line, module and name of every import in a file, at its top or nested; no name for `import module`."""
    package = module_of(path).split(".")
    if not path.endswith("/__init__.py"):
        package = package[:-1]
    for node in nodes_of(source):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, module, alias.name) for alias in node.names)


def imports_of(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of every imported module, once a line."""
    found = {
        # `from zcproto import wire` imports a package
        (line, f"{module}.{name}" if name and module in {"zcproto", "bench"} else module): None
        for line, module, name in imported_names(path, source)
    }
    yield from found


def upward_imports(path: str, source: str) -> list[str]:
    """Report imports of a package that is not below the file's own."""
    package = package_of(module_of(path))
    assert package is not None
    if package not in MAY_IMPORT:
        return [
            f"{path}: the package {package!r} is new: add what it may import, and its users, to MAY_IMPORT"
        ]
    faults = []
    for line, name in imports_of(path, source):
        target = package_of(name)
        if target in {None, package} or target in MAY_IMPORT[package] or (path, target) in UPWARD:
            continue
        keys = [(package, target), ("*", target), (package, "*"), ("*", "*")]
        reason = next(REASONS[key] for key in keys if key in REASONS)
        faults.append(f"{path}:{line} imports {name}: {reason}")
    return faults


def import_circles(files: Mapping[str, str]) -> list[list[str]]:
    """Return the groups of modules that import one another, imports for types alone included."""
    modules = {module_of(path) for path in files}
    below: dict[str, set[str]] = {}
    for path, source in files.items():
        names = {(module, name) for _, module, name in imported_names(path, source)}
        targets = {f"{module}.{name}" if f"{module}.{name}" in modules else module for module, name in names}
        below[module_of(path)] = (targets & modules) - {module_of(path)}
    while free := {module for module, targets in below.items() if not targets & below.keys()}:
        for module in free:
            del below[module]
    reachable = {module: _reachable(module, below) for module in below}
    circles = {
        tuple(sorted(other for other in reachable[module] if module in reachable[other])) for module in below
    }
    return sorted(list(circle) for circle in circles if circle)


def _reachable(module: str, below: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    new = below[module] & below.keys()
    while new:
        found |= new
        new = {target for each in new for target in below[each] if target in below} - found
    return found


def pytest_outside_the_plugin(path: str, source: str) -> list[str]:
    """Report imports of pytest, which is not a dependency, outside the module that only pytest loads."""
    return [
        f"{path}:{line} imports {name}: only zcproto/testing/plugin.py may, as the package works without pytest"
        for line, name in imports_of(path, source)
        if name.split(".")[0] in {"pytest", "_pytest"} and path.startswith("zcproto/") and path != PLUGIN
    ]


def io_in_the_core(path: str, source: str) -> list[str]:
    """Report imports of I/O, clocks or randomness in the sans-IO core."""
    if package_of(module_of(path)) not in CORE:
        return []
    return [
        f"{path}:{line} imports {name}: the core has no I/O, clock or randomness; pass time and random bytes as"
        " arguments"
        for line, name in imports_of(path, source)
        if name.split(".")[0] in NOT_IN_THE_CORE
    ]


def uses_of_time(path: str, source: str) -> Iterator[tuple[int, str, str]]:
    """Yield line, module and name of every use of a clock or of randomness."""
    names: dict[str, str] = {}  # the local name of each module
    for node in nodes_of(source):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in CLOCKS_AND_RANDOMNESS:
            if node.module == "datetime":  # its classes; their methods are checked below
                names |= {alias.asname or alias.name: "datetime" for alias in node.names}
                continue
            for alias in node.names:
                if is_restricted(node.module, alias.name):
                    yield node.lineno, node.module, alias.name
    for node in nodes_of(source):
        if isinstance(node, ast.Attribute):
            owner = (
                node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            )
            module = names.get(owner, owner if owner == "datetime" else "")
            if module in CLOCKS_AND_RANDOMNESS and is_restricted(module, node.attr):
                yield node.lineno, module, node.attr


def is_restricted(module: str, name: str) -> bool:
    names = CLOCKS_AND_RANDOMNESS[module]
    return name in names or ("*" in names and name != "sleep" and not name.endswith("Error"))


def hidden_time(path: str, source: str) -> list[str]:
    """Report uses of clocks or randomness that ALLOWED does not list."""
    if package_of(module_of(path)) in MEASURES:
        return []
    return [
        f"{path}:{line} uses {module}.{name}: only zcproto/common/clock.py reads time and randomness"
        for line, module, name in uses_of_time(path, source)
        if module not in ALLOWED.get(path, {})
    ]


def lost_cancellation(path: str, source: str) -> list[str]:
    """Report uses of wait_for: before Python 3.12 it may swallow a cancellation that arrives with the result."""
    return [
        f"{path}:{node.lineno} uses asyncio.wait_for, which can lose a cancellation: use asyncio.timeout"
        for node in nodes_of(source)
        if isinstance(node, ast.Attribute)
        and node.attr == "wait_for"
        and ast.unparse(node) == "asyncio.wait_for"
    ]


CHECKS = [upward_imports, pytest_outside_the_plugin, io_in_the_core, hidden_time, lost_cancellation]


@pytest.mark.parametrize("check", CHECKS, ids=[check.__name__ for check in CHECKS])
def test_sources_pass_check(check: Callable[[str, str], list[str]]) -> None:
    faults = [fault for path, source in sources().items() for fault in check(path, source)]
    assert not faults, "\n" + "\n".join(faults)


def test_modules_do_not_import_in_circles() -> None:
    assert import_circles(sources()) == []


def test_every_exception_is_needed() -> None:
    used = {
        (path, module) for path, source in sources().items() for _, module, _ in uses_of_time(path, source)
    }
    assert {(path, module) for path, modules in ALLOWED.items() for module in modules} - used == set()
    up = {
        (path, package_of(name)) for path, source in sources().items() for _, name in imports_of(path, source)
    }
    assert set(UPWARD) - up == set()


def test_every_package_in_the_table_exists() -> None:
    found = {package_of(module_of(path)) for path in sources()}
    assert set(MAY_IMPORT) - found == set()


def test_table_allows_no_package_circles() -> None:
    left = {package: set(below) for package, below in MAY_IMPORT.items()}
    while left:
        lowest = {package for package, below in left.items() if not below & set(left)}
        assert lowest, f"these packages may import one another: {sorted(left)}"
        for package in lowest:
            del left[package]


# --- the checks themselves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("zcproto/wire/x.py", "from zcproto.sessions import Session", "wire is the layout"),
        ("zcproto/wire/x.py", "import zcproto.common.clock", "wire is the layout"),
        ("zcproto/wire/x.py", "def f():\n    from zcproto import tls", "wire/x.py:2 imports zcproto.tls"),
        ("zcproto/wire/x.py", "from ..tls import server", "wire/x.py:1 imports zcproto.tls"),
        ("zcproto/wire/__init__.py", "from ..tls import server", "imports zcproto.tls"),
        ("zcproto/sessions/x.py", "from zcproto.wire.frame import TOKEN_SIZE", "tokens as values"),
        ("zcproto/sessions/x.py", "from zcproto.connection import server", "outlive connections"),
        ("zcproto/tls/x.py", "from zcproto.certs import managed", "tls moves records"),
        ("zcproto/certs/x.py", "from zcproto.sessions import Session", "certs issues and loads"),
        ("zcproto/client/x.py", "from zcproto.server import App", "share the wire only"),
        ("zcproto/server/x.py", "from zcproto.client import connect", "share the wire only"),
        ("zcproto/connection/x.py", "from zcproto.tls import server", "connection joins wire and sessions"),
        ("zcproto/server/x.py", "import zcproto.load", "imports point down"),
        ("zcproto/config/x.py", "from zcproto.server import App", "imports point down"),
        ("zcproto/server/x.py", "from zcproto import connect", "imports point down"),
        ("bench/x.py", "from zcproto.cli import main", "imports point down"),
        ("zcproto/server/x.py", "from zcproto.testing import Link", "testing is for tests"),
        ("zcproto/attic/x.py", "", "the package 'attic' is new"),
    ],
)
def test_upward_import_is_reported_with_its_reason(path: str, source: str, expected: str) -> None:
    (fault,) = upward_imports(path, source)
    assert expected in fault


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
        ("bench/peers/x.py", "from bench.compare import client\nfrom zcproto.wire import frame"),
        ("zcproto/__init__.py", "from zcproto.app import App"),
    ],
)
def test_downward_import_is_allowed(path: str, source: str) -> None:
    assert upward_imports(path, source) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"zcproto/a.py": "from zcproto.b import B", "zcproto/b.py": "import os"}, []),
        (
            {"zcproto/a.py": "from zcproto.b import B", "zcproto/b.py": "import zcproto.a"},
            [["zcproto.a", "zcproto.b"]],
        ),
        (
            {
                "zcproto/a.py": "if TYPE_CHECKING:\n    from zcproto.b import B",
                "zcproto/b.py": "def f():\n    from zcproto import c",
                "zcproto/c.py": "from . import a",
                "zcproto/d.py": "from zcproto.a import A",
            },
            [["zcproto.a", "zcproto.b", "zcproto.c"]],
        ),
        (
            {
                "zcproto/a/__init__.py": "from zcproto.a.b import B",
                "zcproto/a/b.py": "from zcproto.a import B",
                "zcproto/x.py": "from zcproto.y import Y",
                "zcproto/y.py": "from zcproto.x import X",
            },
            [["zcproto.a", "zcproto.a.b"], ["zcproto.x", "zcproto.y"]],
        ),
    ],
    ids=["none", "two", "three, for types or nested", "package and another pair"],
)
def test_import_circle_is_reported(files: dict[str, str], expected: list[list[str]]) -> None:
    assert import_circles(files) == expected


def test_import_of_pytest_outside_the_plugin_is_reported() -> None:
    (fault,) = pytest_outside_the_plugin("zcproto/testing/memory.py", "from pytest import fixture")
    assert "the package works without pytest" in fault
    assert pytest_outside_the_plugin(PLUGIN, "import pytest") == []


@pytest.mark.parametrize("module", sorted(NOT_IN_THE_CORE))
@pytest.mark.parametrize("package", sorted(CORE))
def test_io_in_the_core_is_reported(package: str, module: str) -> None:
    for source in (f"import {module}", f"from {module} import x", f"import {module}.x as y"):
        (fault,) = io_in_the_core(f"zcproto/{package}/x.py", source)
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
def test_hidden_clock_is_reported(source: str) -> None:
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
def test_other_uses_of_the_same_modules_are_allowed(source: str) -> None:
    assert hidden_time("zcproto/server/x.py", source) == []


def test_wait_for_is_reported() -> None:
    (fault,) = lost_cancellation(
        "bench/x.py", "import asyncio\nasync def f():\n await asyncio.wait_for(g(), 1)"
    )
    assert "bench/x.py:3 uses asyncio.wait_for" in fault
    assert lost_cancellation("bench/x.py", "async def _wait_for(x): await self._wait_for(x)") == []
