"""The programs in the README run as they are printed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from bench.server_process import free_port
from tests.docs.blocks import ZCPROTO
from tests.docs.messages import ROOT
from tests.helpers import variables
from tests.limits import TIMEOUT
from tests.server.helpers import PATIENT

INSTALL = "python3 -m venv .venv && .venv/bin/pip install -q .\n"


def test_readme_blocks_run_by_one_paste_in_an_empty_folder(tmp_path: Path) -> None:
    port = str(free_port())
    page = (ROOT / "README.md").read_text()
    section = page[page.index("## A server and a client") : page.index("## 10,000 connections")]
    blocks = re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    pasted = "".join(blocks).replace("localhost:7443", f"localhost:{port}")
    assert pasted.count(INSTALL) == 1
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, program in (("python", ""), ("zcproto", f"-c {shlex.quote(ZCPROTO)}")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {program} "$@"\n')
        (programs / name).chmod(0o755)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ZCPROTO_")} | {
        **variables(PATIENT),
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "ZCPROTO_SERVER__PORT": port,
        "ZCPROTO_CERTIFICATES__KEY_TYPES": "ecdsa-p256",
    }
    done = subprocess.run(
        ["bash"],  # reads what is pasted from its standard input, like a terminal
        input=pasted.replace(INSTALL, ""),
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    answers = [line for line in done.stdout.splitlines() if "hello" in line]
    assert answers == ['"hello, anyone"', '"hello shell (asked by ada)"', "hello world (asked by ada)"], (
        done.stderr
    )
    assert done.returncode == 0, done.stderr
