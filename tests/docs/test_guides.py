"""The guides: commands are run where possible, commands and options exist, and links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

from bench.__main__ import bench
from tests.docs.messages import ROOT
from tests.limits import TIMEOUT
from tests.server.helpers import AnsweredError
from tests.server.process import ServerProcess
from zcproto.alerts.alert import CATALOGUE
from zcproto.auth import UserFile
from zcproto.cli import group
from zcproto.config.model import keys, sections
from zcproto.observe.events import EVENTS

DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
        *(
            path
            for room in ("docs", "spec", "bench", "clients", "examples")
            for path in (ROOT / room).rglob("*.md")
        ),
    ]
)
PAGES = [path for path in PAGES if "node_modules" not in path.parts]
FOREIGN = {"build", "venv"}
"""Modules of others that the pages run. They need not be installed here."""


def blocks(guide: str) -> list[str]:
    """Return the shell blocks of a guide."""
    return re.findall(r"^```sh\n(.*?)^```$", (DOCS / guide).read_text(), re.MULTILINE | re.DOTALL)


def run(script: str, folder: Path) -> str:
    """Run commands of a guide with `folder` as HOME. Return their output."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    program = programs / "zcproto"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m zcproto "$@"\n')
    program.chmod(0o755)
    environ = {
        **os.environ,
        "HOME": str(folder),
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    environ.pop("ZCPROTO_HOME", None)
    done = subprocess.run(
        ["/bin/sh", "-euc", script],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_backup_and_restore_commands_of_the_guide_work(tmp_path: Path, certs: Path) -> None:
    running, stopped, trial, restore = blocks("backup.md")
    home = tmp_path / ".zeroclaw"
    home.mkdir(0o700)
    key = UserFile(home / "users.toml").add("ada")
    (home / "config.toml").write_text("[certificates]\nkey_types = ['ecdsa-p256']\n[server]\nport = 0\n")
    (home / "log").touch(0o600)  # ServerProcess writes to it
    with ServerProcess(home, certs) as server:
        with server.client("ada", key) as client:
            client.echo()
            token = client.token
            run(running, tmp_path)
        pin = (home / "certs" / "server-ecdsa.crt").read_bytes()
        later = UserFile(home / "users.toml").add("eve")
        server.process.terminate()
        assert server.wait() == 0
    run(stopped, tmp_path)
    assert "ok        certificate" in run(trial, tmp_path)

    # Everything is lost, then restored from the archive of the running server.
    (home / "users.toml").write_text("damaged")
    (home / "certs" / "server-ecdsa.key").unlink()
    assert "permissions" in run(restore, tmp_path)
    assert (tmp_path / ".zeroclaw.before" / "users.toml").read_text() == "damaged"
    assert (home / "certs" / "server-ecdsa.crt").read_bytes() == pin
    assert (home / "certs" / "server-ecdsa.key").stat().st_mode & 0o777 == 0o600
    with ServerProcess(home, certs) as server, server.client("ada", key) as client:
        client.echo()
        client.token = token
        assert client.refused("echo", {}).code == 16, "sessions are not in the archive"
        with server.client() as stranger, pytest.raises(AnsweredError):
            stranger.open_session("eve", later)


def test_archive_with_sessions_restores_them(tmp_path: Path, certs: Path) -> None:
    stopped = blocks("backup.md")[1]
    home = tmp_path / ".zeroclaw"
    home.mkdir(0o700)
    key = UserFile(home / "users.toml").add("ada")
    (home / "config.toml").write_text("[certificates]\nkey_types = ['ecdsa-p256']\n")
    with ServerProcess(home, certs) as server:
        client = server.client("ada", key)
        token = client.token
        client.fin()
        server.process.terminate()
        assert server.wait() == 0
    run(stopped, tmp_path)
    run("rm -r .zeroclaw; mkdir -m 700 .zeroclaw; tar -C .zeroclaw -xpf backup-with-sessions.tar", tmp_path)
    with ServerProcess(home, certs) as server, server.client() as client:
        client.token = token
        client.echo()


def test_archive_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    (tmp_path / ".zeroclaw").mkdir()
    run(blocks("backup.md")[0], tmp_path)
    assert (tmp_path / "backup.tar").stat().st_mode & 0o777 == 0o600


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", head) for head in heads]
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in plain}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_to_existing_files_and_headings(page: Path) -> None:
    broken = []
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        name, _, anchor = link.partition("#")
        if "://" in name:
            continue
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def commands_in(text: str) -> set[str]:
    """Return the `zcproto` command lines in code spans and shell blocks of a page."""
    scripts = re.findall(r"^```(?:sh|bash)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"`(?:ZCPROTO_DEBUG=1 )?(?:\.venv/bin/)?zc(?:proto)? ([^`]+)`", prose)
    for script in scripts:
        for line in script.replace("\\\n", " ").splitlines():
            found += re.findall(
                r"(?:^|[;&(] ?|sudo -u zcproto )(?:\.venv/bin/)?zc(?:proto)? ([^#;|&)>]+)",
                line.split("  #")[0],
            )
    return {" ".join(command.split()) for command in found}


def faults_of(command: str, program: click.Group = group) -> Iterator[str]:
    """Yield the subcommands and options of a command line that a program does not have."""
    current: list[click.Command] = [program]
    words = iter(re.sub(r"\.\.\.|[\[\]]", " ", command).split())
    for word in words:
        if word == "-h":
            return
        if word.startswith("--"):
            for name in word.split("=")[0].split("|"):
                options = [each for one in current for each in one.params if name in each.opts]
                if not options and name != "--help":
                    yield f"{command}: no option {name}"
                elif (
                    options
                    and isinstance(options[0], click.Option)
                    and not options[0].is_flag
                    and "=" not in word
                ):
                    next(words, None)  # its value
        elif isinstance(current[0], click.Group):
            if word.isupper():  # a placeholder
                return
            with click.Context(current[0]) as context:
                commands = [current[0].get_command(context, name) for name in word.split("|")]
            if None in commands:
                yield f"{command}: no command {word}"
                return
            current = [each for each in commands if each is not None]
        elif not any(isinstance(parameter, click.Argument) for each in current for parameter in each.params):
            yield f"{command}: {word} is not an argument"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_and_options_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [fault for command in sorted(commands_in(text)) for fault in faults_of(command)] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_modules_and_benchmarks_that_are_run_exist(page: Path) -> None:
    found = re.findall(r"python -m ([\w.]+)([^`\n#;&>]*)", page.read_text(encoding="utf-8"))
    assert [module for module, _ in found if module not in FOREIGN and find_spec(module) is None] == []
    benchmarks = {" ".join(arguments.split()) for module, arguments in found if module == "bench"}
    assert [fault for command in sorted(benchmarks) for fault in faults_of(command, bench)] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_package_is_installed_from_a_clone(page: Path) -> None:
    """`zcproto` on PyPI is another project's package."""
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"pip install [^\n|`]*?(?<![/\w])zcproto\b", text) == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_settings_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    files = r"(?:crt|db|json|key|toml)`"
    settings = set(re.findall(rf"`((?:{'|'.join(sections())})\.(?!{files})[a-z_]+)[` ]", text))
    methods = {"server.info", "server.stats", "server.sessions", "server.revoke"}
    alerts = {kind.value for kind in CATALOGUE}
    in_welcome = {"streams.max_item", "streams.durable"}
    attributes = {"server.ca_file", "server.clients", "server.users", "server.address"}
    assert settings - keys() - set(EVENTS) - alerts - methods - in_welcome - attributes == set()


def test_fault_of_a_command_line_is_found() -> None:
    assert list(faults_of("session list --user NAME")) == []
    assert list(faults_of("cert show|renew --json")) == []
    assert list(faults_of("session list --operators")) == ["session list --operators: no option --operators"]
    assert list(faults_of("session list NAME")) == ["session list NAME: NAME is not an argument"]
    assert list(faults_of("store move A B")) == ["store move A B: no command move"]
    assert commands_in("run `zcproto status --watch`\n```sh\n(umask 077; zc user add ada > key)\n```\n") == {
        "status --watch",
        "user add ada",
    }


def test_messages_of_the_status_page_exist() -> None:
    text = (DOCS / "http.md").read_text(encoding="utf-8")
    rows = text[text.index("| the page says |") :].split("\n\n")[0].splitlines()[2:-1]
    page = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "zcproto" / "admin" / "page").iterdir()
    )
    messages = [
        re.sub(r" \d+$", " ", message)
        for row in rows
        for message in re.findall(r"`([^`]+)`", row.split("|")[1])
    ]
    assert [message for message in messages if message not in page and not message.isdigit()] == []


def test_readyz_reasons_in_the_guide_exist() -> None:
    reasons = re.findall(r'"(store: [^"]+)"', (DOCS / "http.md").read_text(encoding="utf-8"))
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "zcproto" / "admin").glob("*.py"))
    assert reasons
    assert [reason for reason in reasons if reason not in source] == []
