"""Follow a page for application developers as its reader would: write its files, run its commands, compare outputs.

The line before a block says what it is:

    `gateway.py`:           the block is this file; behind changes, it shows what they have made of it
    ... in `gateway.py`:    the block changes this file. A definition replaces the one of the same name. A new one
                            goes before the next definition of the block that is there, or to the end. Imports go to
                            the top
    anything, for sh        commands, run in the folder of the files; a server goes on running behind them
    anything, for text      the output of the commands before it, which may fail then. A line `...` stands for any
                            lines, `…` for any text in a line
    anything, for log       lines that are in the output of the servers, in this order

A page with tabs is read in one language: see `read_in`.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import count, zip_longest
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from bench.server_process import free_port
from tests.docs.messages import ROOT
from tests.helpers import variables
from tests.limits import TIMEOUT
from tests.server.helpers import PATIENT
from zcproto.auth import UserFile

PROGRAMS: Final = {"c", "go", "js", "python", "rust", "typescript"}
"""Languages whose blocks must be files."""

FILES: Final = {"dockerfile", "ini", "json", "proto", "toml", "yaml"}
"""Languages whose blocks are files if the line before them names one, and otherwise are only read."""

PORT: Final = re.compile(r"(?<=[:= ])(744\d|6379|8000|50051)\b")
"""Ports of the pages, which are replaced by free ones."""

NODE: Final = re.compile(r"node |npm ")
"""Commands of blocks that are run where the client for Node is built."""

READY: Final = (
    "server.listening",
    " listens on localhost:",
    "Uvicorn running on",
    "Ready to accept connections",
)
"""What servers print when clients can connect."""

CHANGES: Final = re.compile(r"^(?:.* )?[Ii]n `([\w./~-]+\.\w+)`:$")
WRITES: Final = re.compile(r"(?:^|\. )`([\w./~-]+\.\w+)`(?:, [^`]*)?:$")

TAB: Final = re.compile(r"^/// tab \| (\w+)\n(.*?)^///\n", re.MULTILINE | re.DOTALL)
RUN: Final = re.compile(r"^Run a program by `(.*)`\.$", re.MULTILINE)
PROGRAM: Final = re.compile(r"`(?:[\w/]*/)?(\w+)\.(?:c|go|mjs|py|rs)`:$", re.MULTILINE)


class PageError(AssertionError):
    """A page does not do what it says."""


class Block(NamedTuple):
    """A code block of a page. `file` is the file that it writes or changes."""

    place: str
    language: str
    text: str
    file: str | None
    is_change: bool


def blocks_of(page: Path) -> Iterator[Block]:
    """Yield the code blocks of a page. Raises PageError for one that is neither a file, commands nor an output."""
    text = page.read_text(encoding="utf-8")
    before = ""
    for found in re.finditer(r"^( *)```([\w-]*)[^\n]*\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
        introduction = text[: found.start()].rstrip().rsplit("\n", 1)[-1]
        changes, writes = CHANGES.search(introduction), WRITES.search(introduction)
        named = changes or writes
        place = f"{page.name}:{text.count(chr(10), 0, found.start()) + 1}"
        block = Block(place, found[2], found[3], named[1] if named else None, changes is not None)
        problem = problem_of(block, before, is_indented=bool(found[1]))
        if problem is not None:
            raise PageError(f"{place}: {problem}")
        yield block
        before = block.language


def problem_of(block: Block, before: str, *, is_indented: bool = False) -> str | None:
    """Return why a block would not be run. `before` is the language of the block before it."""
    if is_indented:
        return "an indented block is not run; end the list before it"
    if block.language in PROGRAMS and block.file is None:
        return "this block is not run; name its file in the line before it, as `name.py`:"
    if block.language == "text" and before != "sh":
        return "a block of text is the output of commands; it belongs behind a block of sh"
    if block.language not in PROGRAMS | FILES | {"sh", "text", "log"}:
        return f"blocks of {block.language or 'no language'} are not run; use sh, python or text"
    return None


def read_in(language: str, page: str, arguments: Mapping[str, str]) -> str:
    """Return a page as readers of one language follow it: their tabs alone, and commands that run each program.

    One of their tabs has the command, for `connect`. `arguments` are those of programs, by name. A section that has
    tabs, but none of theirs, is left out.
    """
    command = next(
        run[1] for tab in TAB.finditer(page) if tab[1] == language and (run := RUN.search(tab[2])) is not None
    )

    def with_command(tab: re.Match[str]) -> str:
        if tab[1] != language:
            return ""
        names = PROGRAM.findall(tab[2])
        if not names:
            return tab[2]
        run = f"{command.replace('connect', names[-1])} {arguments.get(names[-1], '')}".rstrip()
        return f"{tab[2]}```sh\n{run}\n```\n"

    sections = page.split("\n## ")
    languages = [{tab[1] for tab in TAB.finditer(section)} for section in sections]
    read = [
        section for section, found in zip(sections, languages, strict=True) if not found or language in found
    ]
    return TAB.sub(with_command, "\n## ".join(read))


# --- changes of a file ---------------------------------------------------------------------------------------


class Statement(NamedTuple):
    """A statement at the top level of a module, with the comments and the blank lines before it."""

    text: str
    gap: int
    names: frozenset[str]
    is_import: bool


def statements_of(source: str) -> list[Statement]:
    lines = source.splitlines()
    found, end = [], 0
    for node in ast.parse(source).body:
        assert node.end_lineno is not None
        text = lines[end : node.end_lineno]
        end = node.end_lineno
        gap = next(index for index, line in enumerate(text) if line)
        is_import = isinstance(node, ast.Import | ast.ImportFrom)
        found.append(Statement("\n".join(text[gap:]), gap, names_of(node), is_import))
    return found


def names_of(node: ast.stmt) -> frozenset[str]:
    """Return the names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return frozenset({node.name})
    targets = [*node.targets] if isinstance(node, ast.Assign) else []
    targets += [node.target] if isinstance(node, ast.AnnAssign) else []
    return frozenset(target.id for target in targets if isinstance(target, ast.Name))


def change(source: str, block: str) -> str:
    """Return a module changed by a block."""
    module, waiting = statements_of(source), []
    is_first = True
    start = 1 if module and not module[0].is_import and module[0].text.startswith('"""') else 0
    for new in statements_of(block):
        places = [index for index, old in enumerate(module) if old.names & new.names]
        if new.is_import:
            module.insert(start, new._replace(gap=0))
        elif places:
            module[places[0] : places[0] + 1] = [*waiting, new]
            waiting = []
        else:
            waiting.append(new._replace(gap=2) if is_first else new)
        is_first = new.is_import
    text = "\n".join("\n" * each.gap + each.text for each in [*module, *waiting])
    return tidy(text + "\n")


def tidy(source: str) -> str:
    """Sort and merge the imports of a module, and format it."""
    for command in (["check", "--quiet", "--fix-only", "--select=I", "-"], ["format", "--quiet", "-"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--isolated", "--line-length=110"]
        source = subprocess.run(
            ruff, input=source, capture_output=True, text=True, check=True, cwd="/"
        ).stdout
    return source


# --- outputs -------------------------------------------------------------------------------------------------


def pattern_of(shown: str) -> str:
    """Return the pattern of the output that a page shows."""
    lines = (re.escape(line).replace("…", ".*") + "\n" for line in shown.splitlines())
    return "".join("(?:.*\n)*" if line == "\\.\\.\\.\n" else line for line in lines)


# --- a reader ------------------------------------------------------------------------------------------------

PIP: Final = f"""
import os, re, shutil, sys, tomllib
from importlib import metadata
with open({str(ROOT / "pyproject.toml")!r}, "rb") as file:
    own = tomllib.load(file)["project"]["optional-dependencies"]
for requirement in sys.argv[3:]:
    if requirement[0] == "-":
        continue
    _, is_folder, name = requirement.rpartition("/")
    name, *extras = re.findall(r"^\\.|[a-z0-9-]+", name)
    is_clone = name == "." or is_folder
    assert is_clone or name != "zcproto", "on PyPI, zcproto is another project's package"
    known = own if is_clone else metadata.metadata(name).get_all("Provides-Extra", [])
    assert set(extras) <= set(known), requirement
    path = requirement.partition("[")[0]
    assert not is_clone or os.path.exists(path + "/pyproject.toml"), path + " is not a clone"
    programs = os.path.dirname(sys.argv[1])
    if os.path.isfile(programs + "/of-packages/" + name):
        shutil.copy(programs + "/of-packages/" + name, programs)
"""
"""Checks that a `pip install` names packages that are installed, clones, and extras that they have.

The programs of packages exist from then on. Its first argument is the fake pip.
"""

PACKAGES: Final = {"pytest", "uvicorn"}
"""Programs that exist only after `pip install` of their packages."""


ZCPROTO: Final = f"""
import sys
from zcproto.cli import connect, main
make_client = connect.TrustChoice.make_client
def make_patient_client(trust, home, address, **options):
    options |= {{"connect_timeout": {TIMEOUT}, "start_timeout": {TIMEOUT}}}
    return make_client(trust, home, address, **options)
connect.TrustChoice.make_client = make_patient_client
connect.DEFAULT_TIMEOUT = {TIMEOUT}
sys.exit(main())
"""
"""The command line, which waits for a connection as long as a busy machine takes."""


class RunningServer(NamedTuple):
    """A server that a page has started, and the file with its output. `reloads` is whether it follows its files."""

    process: subprocess.Popen[bytes]
    log: Path
    reloads: bool

    def starts(self) -> int:
        """Return how often it has begun to listen."""
        return sum(map(self.log.read_text().count, READY[:2]))

    def has_failed(self) -> bool:
        return self.log.read_text().endswith("it starts again after a change\n")


class Reader:
    """Follows pages in one folder, with its own home and ports."""

    def __init__(self, folder: Path, certs: Path, *, has_node: bool = False) -> None:
        self.home, self._bin, self._log = folder / "home", folder / "bin", folder / "output"
        self._pycache = folder.parent / "pycache"  # of all pages
        self.clone, self.folder = self.home / "zcproto", self.home / "project"
        self.folder.mkdir(parents=True)
        self.clone.mkdir()
        (self.clone / "pyproject.toml").touch()
        (self.home / ".zeroclaw").mkdir(0o700)
        shutil.copytree(certs, self.home / ".zeroclaw" / "certs")
        self.files: dict[str, str] = {}
        """What has been written, by name."""
        self.scripts = ""
        """The commands that have been run."""
        self._has_node = has_node
        self._exported: dict[str, str] = {}
        self._ports: dict[str, str] = {}
        self._servers: list[RunningServer] = []
        self._logs = count(1)
        self._output = ""
        self._npm_cache = ""
        self._write_programs()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_servers()

    def end_servers(self) -> None:
        for server in self._servers:
            if server.process.poll() is None:
                os.killpg(server.process.pid, signal.SIGTERM)
        for server in self._servers:
            server.process.wait(TIMEOUT)
        self._servers.clear()

    def begin_next_page(self) -> None:
        """End the servers, open a new terminal, and remove the configuration of the last page."""
        self.end_servers()
        self._exported.clear()
        (self.home / ".zeroclaw" / "config.toml").unlink(missing_ok=True)
        self.files.pop("~/.zeroclaw/config.toml", None)

    def use_npm(self) -> None:
        """Run npm itself, with a clone that has the client for Node without what was built."""
        built = shutil.ignore_patterns("node_modules", "dist")
        shutil.copytree(ROOT / "clients" / "typescript", self.clone / "clients" / "typescript", ignore=built)
        shown = subprocess.run(["npm", "config", "get", "cache"], capture_output=True, text=True, check=True)
        self._npm_cache = shown.stdout.strip()
        (self._bin / "npm").unlink()

    def follow_in_clone(self, page: Path) -> None:
        """Follow a page in the clone of the repository."""
        project, self.folder = self.folder, self.clone
        self.follow(page)
        self.folder = project

    def add_user(self, name: str) -> None:
        """Add a user whose key is in a file, as the README does."""
        key = UserFile(self.home / ".zeroclaw" / "users.toml").add(name)
        (self.folder / f"{name}.key").touch(0o600)
        (self.folder / f"{name}.key").write_text(key.reveal())

    def follow(self, page: Path) -> None:
        """Do what a page says. Raises PageError where it fails, or prints something else than the page."""
        blocks = list(blocks_of(page))
        is_skipped = False
        for block, following in zip_longest(blocks, blocks[1:]):
            if block.file is not None:
                self._write(block, block.file)
            elif block.language == "sh":
                self.scripts += block.text
                is_skipped = NODE.match(block.text) is not None and not self._has_node
                if not is_skipped:
                    self._run(block, may_fail=following is not None and following.language == "text")
            elif block.language == "text" and not is_skipped:
                self._compare(block)
            elif block.language == "log":
                self._search(block)

    def check_that_all_files_ran(self) -> None:
        """Raise PageError if no command runs a program, and no other program imports it."""
        used = self.scripts + "\n".join(
            line
            for text in self.files.values()
            for line in re.findall(r"^(?:from|import) .*", text, re.MULTILINE)
        )
        suffixes = {".c", ".go", ".mjs", ".py", ".rs"}
        programs = [Path(name) for name in self.files if Path(name).suffix in suffixes]
        unused = [path.name for path in programs if not re.search(rf"\b{re.escape(path.stem)}\b", used)]
        if unused:
            raise PageError(f"no command runs {', '.join(unused)}; add a block of sh that does")

    def _write(self, block: Block, name: str) -> None:
        path = self.folder / name if name[0] != "~" else self.home / name[2:]
        if block.is_change:
            if name not in self.files:
                raise PageError(f"{block.place}: {name} does not exist yet; name it alone to write it")
            text = change(self.files[name], block.text)
        else:
            text = block.text
            if name in self.files:
                if text != self.files[name]:
                    raise PageError(f"{block.place}: {name} is now\n{self.files[name]}")
                return
        self.files[name] = text
        path.parent.mkdir(parents=True, exist_ok=True)
        reloading = {
            server: server.starts() for server in self._servers if server.reloads and path.suffix == ".py"
        }
        path.write_text(self._with_ports(text), encoding="utf-8")
        for server, before in reloading.items():
            for _ in range(int(TIMEOUT / 0.05)):
                if server.starts() > before or server.has_failed():
                    break
                time.sleep(0.05)
            if server.starts() == before:
                raise PageError(f"{block.place}: the server does not start again\n{server.log.read_text()}")

    def _run(self, block: Block, *, may_fail: bool) -> None:
        self._export("".join(re.findall(r"^export .*\n", block.text, re.MULTILINE)))
        with open(self._log, "wb") as log:
            process = subprocess.Popen(
                ["/bin/sh", "-euc", self._with_ports(block.text)],
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        for _ in range(int(TIMEOUT / 0.05)):
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                self._output = self._log.read_text()
                # Behind `&` the server runs on, and the shell ends.
                if " &\n" not in block.text and any(sign in self._output for sign in READY):
                    self._servers.append(RunningServer(process, self._log, "--reload" in block.text))
                    self._log = self._log.with_name(f"output-{next(self._logs)}")
                    return
            else:
                break
        else:
            os.killpg(process.pid, signal.SIGKILL)
            raise PageError(f"{block.place}: does not end\n{self._log.read_text()}")
        self._output = "".join(f"{line.rstrip()}\n" for line in self._log.read_text().splitlines())
        if process.returncode and not may_fail:
            raise PageError(f"{block.place}: exit code {process.returncode}\n{self._output}")

    def _export(self, lines: str) -> None:
        """Keep the variables that lines of a script export."""
        if lines:
            show = shlex.join([sys.executable, "-c", "import json, os; print(json.dumps({**os.environ}))"])
            shell = ["/bin/sh", "-euc", f"{lines}{show}"]
            ran = subprocess.run(
                shell, cwd=self.folder, env=self._environment(), capture_output=True, check=True
            )
            exported = json.loads(ran.stdout)
            self._exported |= {name: exported[name] for name in re.findall(r"\b(\w+)=", lines)}

    def _compare(self, block: Block) -> None:
        """Compare the last output with what a page shows of it."""
        shown = self._with_ports(block.text)
        if not re.fullmatch(pattern_of(shown), self._output):
            raise PageError(f"{block.place}: the commands print\n{self._output}\ninstead of\n{shown}")

    def _search(self, block: Block) -> None:
        """Look for lines in what servers have printed."""
        wanted = "(?:.*\n)*".join(pattern_of(f"{line}\n") for line in block.text.splitlines())
        for _ in range(int(TIMEOUT / 0.05)):
            printed = "".join(server.log.read_text() for server in self._servers)
            if re.search(wanted, printed):
                return
            time.sleep(0.05)  # other processes write it
        raise PageError(f"{block.place}: the servers print\n{printed}\nwithout\n{block.text}")

    def _with_ports(self, text: str) -> str:
        return PORT.sub(lambda found: self._ports.setdefault(found[0], str(free_port())), text)

    def _environment(self) -> dict[str, str]:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("ZCPROTO_")}
        environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each command would compile the package
        return {
            **environ,
            "HOME": str(self.home),
            "PATH": f"{self._bin}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}",
            "PYTHONPYCACHEPREFIX": str(self._pycache),
            **variables(PATIENT),
            **self._exported,
            "NODE_CLIENT": str(ROOT / "clients" / "typescript"),
            "npm_config_cache": self._npm_cache,
            "npm_config_prefer_offline": "true",
            "ZCPROTO_SERVER__PORT": self._with_ports(" 7443").strip(),
            "ZCPROTO_CERTIFICATES__KEY_TYPES": '["ecdsa-p256"]',
        }

    def _write_programs(self) -> None:
        """Write the programs that an installation would have."""
        (self._bin / "of-packages").mkdir(parents=True)
        python = shlex.quote(sys.executable)
        for name, command in {
            # Its log is as on a terminal.
            "zcproto": f'ZCPROTO_LOG__FORMAT=console exec {python} -c {shlex.quote(ZCPROTO)} "$@"',
            "python": f'exec {python} "$@"',
            "python3": 'test "$1 $2" = "-m venv" && mkdir -p "$3/bin" && touch "$3/bin/activate"'
            f' && ln -sf {shlex.quote(str(self._bin))}/* "$3/bin/"',
            "pip": f'exec {python} -c {shlex.quote(PIP)} "$0" "$@"',
            "npm": 'mkdir -p node_modules/@zcproto && ln -s "$NODE_CLIENT" node_modules/@zcproto/client',
            "pytest": f'exec {python} -m pytest -p no:cacheprovider -p zcproto.testing.plugin "$@"',
            "uvicorn": f'exec {python} -m uvicorn "$@"',
        }.items():
            program = self._bin / "of-packages" / name if name in PACKAGES else self._bin / name
            program.write_text(f"#!/bin/sh\n{command}\n")
            program.chmod(0o755)
