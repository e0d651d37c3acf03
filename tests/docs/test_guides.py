"""The guides: what they tell to run is run where that can be, and their links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.messages import ROOT
from tests.server.conftest import certs
from tests.server.helpers import AnsweredError, ServerProcess
from zcproto.auth import UserFile
from zcproto.cli import COMMANDS
from zcproto.config.model import keys, sections
from zcproto.observe.events import EVENTS

__all__ = ["certs"]

DOCS = ROOT / "docs"
GUIDES = sorted(
    path
    for path in DOCS.glob("*.md")
    if path.name in {"installation.md", "upgrades.md", "backup.md", "troubleshooting.md"}
)


def blocks(guide: str) -> list[str]:
    """The commands of a guide."""
    return re.findall(r"^```sh\n(.*?)^```$", (DOCS / guide).read_text(), re.MULTILINE | re.DOTALL)


def run(script: str, folder: Path) -> str:
    """Run commands of a guide as a person does, whose home folder is `folder`."""
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
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_backup_is_taken_tried_and_restored_as_the_guide_says(tmp_path: Path, certs: Path) -> None:
    running, stopped, trial, restore = blocks("backup.md")
    home = tmp_path / ".zeroclaw"
    home.mkdir(0o700)
    key = UserFile(home / "users.toml").add("ada")
    (home / "config.toml").write_text("[certificates]\nkey_types = ['ecdsa-p256']\n[server]\nport = 0\n")
    (home / "log").touch(0o600)  # which ServerProcess writes to
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

    # Everything is lost, and comes back from the archive that was taken while the server ran.
    (home / "users.toml").write_text("damaged")
    (home / "certs" / "server-ecdsa.key").unlink()
    assert "permissions" in run(restore, tmp_path)
    assert (tmp_path / ".zeroclaw.before" / "users.toml").read_text() == "damaged"
    assert (home / "certs" / "server-ecdsa.crt").read_bytes() == pin
    assert (home / "certs" / "server-ecdsa.key").stat().st_mode & 0o777 == 0o600
    with ServerProcess(home, certs) as server, server.client("ada", key) as client:
        client.echo()
        client.token = token
        assert client.refused("echo", {}).code == 16, "sessions of before are no more"
        with server.client() as stranger, pytest.raises(AnsweredError):
            stranger.open_session("eve", later)


def test_an_archive_with_sessions_brings_them_back(tmp_path: Path, certs: Path) -> None:
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


def test_an_archive_is_its_owners_alone(tmp_path: Path) -> None:
    (tmp_path / ".zeroclaw").mkdir()
    run(blocks("backup.md")[0], tmp_path)
    assert (tmp_path / "backup.tar").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_the_links_of_a_guide_lead_somewhere(guide: Path) -> None:
    text = guide.read_text()
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    files = [link for link in links if "://" not in link]
    assert [link for link in files if not (guide.parent / link).exists()] == []
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", head.lower()).replace(" ", "-")
        for head in re.findall(r"^#+ (.*)", text, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_commands_and_settings_of_a_guide_are_there(guide: Path) -> None:
    text = guide.read_text()
    scripts = "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    used = set(re.findall(r"`(?:ZCPROTO_DEBUG=1 )?zc(?:proto)? ([a-z]+)", text))
    used |= set(
        re.findall(r"^(?:\(umask 077; )?zc(?:proto)?(?: --home \S+)? ([a-z]+)", scripts, re.MULTILINE)
    )
    assert used
    assert used <= set(COMMANDS), used - set(COMMANDS)
    settings = set(re.findall(rf"`({'|'.join(sections())})\.([a-z_]+)[` ]", text))
    named = {f"{section}.{name}" for section, name in settings}
    assert named - keys() - set(EVENTS) - {"sessions.db", "server.info"} == set()
