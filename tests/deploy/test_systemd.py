"""The systemd units: systemd accepts them, they match the program's defaults, and a server runs under them."""

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

from tests.helpers import variables
from tests.server.helpers import PATIENT, ROOT, TIMEOUT, Client
from zcproto.auth import UserFile
from zcproto.cli import EXIT_UNUSABLE
from zcproto.config import Config

UNITS = ROOT / "zcproto" / "deploy" / "systemd"
SERVICE = (UNITS / "zcproto.service").read_text()

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")


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
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)


@needs_systemd
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    program = tmp_path / "zcproto"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (tmp_path / "zcproto.service").write_text(SERVICE.replace("/opt/zcproto/bin/zcproto", str(program)))
    shutil.copy(UNITS / "zcproto.socket", tmp_path)
    units = [str(tmp_path / name) for name in ("zcproto.service", "zcproto.socket")]
    done = run("systemd-analyze", "verify", "--man=no", *units)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # Counter-check: systemd-analyze does report a wrong unit.
    (tmp_path / "zcproto.service").write_text("[Service]\nExecStart=/nowhere\nNoNewPrivilege=yes\n")
    assert "NoNewPrivilege" in run("systemd-analyze", "verify", "--man=no", units[0]).stderr


@needs_systemd
def test_exposure_level_is_at_most_the_documented_one() -> None:
    done = run("systemd-analyze", "security", "--offline=yes", "--no-pager", str(UNITS / "zcproto.service"))
    exposure = re.search(r"Overall exposure level for zcproto\.service: ([0-9.]+) OK", done.stdout)
    assert exposure is not None, done.stdout + done.stderr
    documented = re.search(r"exposure level of ([0-9.]+)", (ROOT / "docs" / "installation.md").read_text())
    assert documented is not None
    assert float(exposure[1]) <= float(documented[1])


def test_unit_matches_the_defaults_of_the_configuration() -> None:
    config = Config()
    assert int(one("LimitNOFILE")) >= config.limits.max_connections + 256
    assert int(one("TimeoutStopSec").removesuffix("s")) > config.server.drain_timeout
    assert one("RestartPreventExitStatus").split() == ["0", str(EXIT_UNUSABLE)]
    assert one("LimitCORE") == "0"
    socket = directives((UNITS / "zcproto.socket").read_text())
    assert socket["ListenStream"] == [str(config.server.port)]


@needs_systemd
def test_sysusers_creates_the_user_of_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-sysusers") is None:
        pytest.skip("needs systemd-sysusers")
    done = run("systemd-sysusers", "--dry-run", f"--root={tmp_path}", str(UNITS / "zcproto.sysusers"))
    assert done.returncode == 0, done.stderr
    assert f"user '{one('User')}'" in done.stdout + done.stderr


# --- what the process can do under it ------------------------------------------------------------------------


def allowed_calls() -> set[str]:
    """Return the system calls that the unit's filter allows, with the groups as systemd defines them."""
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

    allowed = members("@default")  # always allowed by systemd
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
    """Return whether the kernel can refuse memory that is both writable and executable (Linux 6.3)."""
    return sys.platform == "linux" and ctypes.CDLL(None).prctl(66, 0, 0, 0, 0) >= 0


@pytest.mark.skipif(not has_mdwe(), reason="needs Linux 6.3")
@needs_systemd
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_server_runs_under_the_system_call_filter(tmp_path: Path, certs: Path) -> None:
    """strace refuses here what the unit refuses, and the kernel refuses writable code."""
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
        env={**os.environ, **variables(PATIENT), "PYTHONPATH": str(ROOT)},
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
        _, err = process.communicate(timeout=TIMEOUT)
    assert '"event":"server.ended"' in err
    used = set(re.findall(r"^\d+ +([a-z_0-9]+)\(", (tmp_path / "trace").read_text(), re.MULTILINE))
    assert {"epoll_pwait", "fdatasync", "sendto"} & used, "the server was traced"
    # As root, SQLite tries to keep the owner of its files; uvloop falls back if io_uring is refused.
    assert used - allowed_calls() - set(refused.split(",")) == set()
