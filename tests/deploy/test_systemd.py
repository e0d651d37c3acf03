"""The units of systemd: that it takes them, that they fit the program, and that the program can live with them."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.server.conftest import certs
from tests.server.helpers import ROOT, TIMEOUT, Client
from zcproto.auth import UserFile
from zcproto.cli import EXIT_UNUSABLE
from zcproto.config import Config

__all__ = ["certs"]

UNITS = ROOT / "zcproto" / "deploy" / "systemd"
SERVICE = (UNITS / "zcproto.service").read_text()

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="takes systemd")


def directives(unit: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for line in unit.splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found[name].append(value)
    return found


DIRECTIVES = directives(SERVICE)


def one(name: str) -> str:
    (value,) = DIRECTIVES[name]
    return value


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@needs_systemd
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    program = tmp_path / "zcproto"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (tmp_path / "zcproto.service").write_text(SERVICE.replace("/opt/zcproto/bin/zcproto", str(program)))
    shutil.copy(UNITS / "zcproto.socket", tmp_path)
    units = [str(tmp_path / name) for name in ("zcproto.service", "zcproto.socket")]
    done = run("systemd-analyze", "verify", "--man=no", *units)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # It would have said so: this test can fail.
    (tmp_path / "zcproto.service").write_text("[Service]\nExecStart=/nowhere\nNoNewPrivilege=yes\n")
    assert "NoNewPrivilege" in run("systemd-analyze", "verify", "--man=no", units[0]).stderr


@needs_systemd
def test_its_exposure_is_what_the_guide_says() -> None:
    done = run("systemd-analyze", "security", "--offline=yes", "--no-pager", str(UNITS / "zcproto.service"))
    exposure = re.search(r"Overall exposure level for zcproto\.service: ([0-9.]+) OK", done.stdout)
    assert exposure is not None, done.stdout + done.stderr
    told = re.search(r"exposure level of ([0-9.]+)", (ROOT / "docs" / "installation.md").read_text())
    assert told is not None
    assert float(exposure[1]) <= float(told[1])


def test_the_unit_fits_the_defaults_of_the_program() -> None:
    config = Config()
    assert int(one("LimitNOFILE")) >= config.limits.max_connections + 256
    assert int(one("TimeoutStopSec").removesuffix("s")) > config.server.drain_timeout
    assert one("RestartPreventExitStatus") == str(EXIT_UNUSABLE)
    assert one("LimitCORE") == "0"
    socket = directives((UNITS / "zcproto.socket").read_text())
    assert socket["ListenStream"] == [str(config.server.port)]


@needs_systemd
def test_the_user_of_the_unit_is_one_that_systemd_makes(tmp_path: Path) -> None:
    if shutil.which("systemd-sysusers") is None:
        pytest.skip("takes systemd-sysusers")
    done = run("systemd-sysusers", "--dry-run", f"--root={tmp_path}", str(UNITS / "zcproto.sysusers"))
    assert done.returncode == 0, done.stderr
    assert f"user '{one('User')}'" in done.stdout + done.stderr


# --- what the process can do under it ------------------------------------------------------------------------


def allowed_calls() -> set[str]:
    """The system calls that the unit's filter lets through, as systemd explains its groups."""
    groups: dict[str, list[str]] = defaultdict(list)
    current = ""
    for line in run("systemd-analyze", "syscall-filter", "--no-pager").stdout.splitlines():
        name = line.strip()
        if line.startswith("@"):
            current = name
        elif name and not name.startswith("#"):
            groups[current].append(name)

    def members(name: str) -> set[str]:
        if not name.startswith("@"):
            return {name}
        return {call for each in groups[name] for call in members(each)}

    allowed = members("@default")  # which systemd always lets through
    for value in DIRECTIVES["SystemCallFilter"]:
        named = {call for name in value.removeprefix("~").split() for call in members(name)}
        allowed = allowed - named if value.startswith("~") else allowed | named
    return allowed


NO_WRITABLE_CODE = """
import ctypes, os, sys
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) != 0:  # PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN
    sys.exit("no such thing")
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def has_mdwe() -> bool:
    """Whether the kernel can refuse memory that is both written and run (Linux 6.3)."""
    return sys.platform == "linux" and ctypes.CDLL(None).prctl(66, 0, 0, 0, 0) >= 0


@pytest.mark.skipif(not has_mdwe(), reason="takes Linux 6.3")
@needs_systemd
@pytest.mark.skipif(shutil.which("strace") is None, reason="takes strace")
def test_a_server_needs_no_call_that_the_filter_refuses(tmp_path: Path, certs: Path) -> None:
    """What the unit refuses is refused here by strace, and writable code by the kernel."""
    home = tmp_path / "home"
    home.mkdir(0o700)
    key = UserFile(home / "users.toml").add("ada")
    (home / "config.toml").write_text("[certificates]\nkey_types = ['ecdsa-p256']\n")
    refused = "fchown,chown,io_uring_setup,io_uring_enter,setuid,setgid,setgroups,mlock,mlockall"
    trace = ["strace", "-f", "-qq", "-o", str(tmp_path / "trace"), "-e", f"inject={refused}:error=EPERM"]
    command = [sys.executable, "-c", NO_WRITABLE_CODE]
    serve = ["-m", "zcproto", "--home", str(home), "serve", "--port", "0"]
    process = subprocess.Popen(
        [*trace, *command, *serve],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("zcproto: listening on "), process.communicate()[1]
        with Client(int(line.rpartition(":")[2]), home / "certs" / "ca.crt") as client:
            client.open_session("ada", key)
            client.echo(size=100_000)
            assert client.call("session.close") == {}
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=3 * TIMEOUT)
    assert '"event":"server.ended"' in err
    used = set(re.findall(r"^\d+ +([a-z_0-9]+)\(", (tmp_path / "trace").read_text(), re.MULTILINE))
    assert {"epoll_pwait", "fdatasync", "sendto"} & used, "it was seen at work"
    # As root, SQLite tries to keep the owner of its files; io_uring is tried and done without.
    assert used - allowed_calls() - set(refused.split(",")) == set()
