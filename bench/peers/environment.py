"""The environment of the other servers: a virtual environment in the user's cache, made once for each Python."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Final

from zcproto.common.text import escape_text
from zcproto.errors import ZcprotoError

REQUIREMENTS: Final = (
    "grpcio>=1.66",
    "httptools>=0.6",
    "uvicorn>=0.32",
    "uvloop>=0.21",
    "websockets>=14",
)
MARK: Final = "installed.json"
INSTALL_TIMEOUT: Final = 600.0
"""Seconds for pip."""

_VERSIONS: Final = """
import importlib.metadata, json, ssl, sys
names = sys.argv[1:]
print(json.dumps({**{name: importlib.metadata.version(name) for name in names}, "openssl": ssl.OPENSSL_VERSION}))
"""

Say = Callable[[str], None]


def default_folder() -> Path:
    """Return the folder for this Python: packages with compiled parts fit one version only."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    version = ".".join(map(str, sys.version_info[:2]))
    return Path(cache).expanduser() / "zcproto" / f"peers-{version}"


class Environment:
    """A virtual environment in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"

    def prepare(self, say: Say) -> None:
        """Make it, unless it exists with all packages. Raises ZcprotoError if they cannot be installed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at the same time make it once
            wanted = {"python": sys.version, "requirements": list(REQUIREMENTS)}
            if self._installed() == wanted:
                return
            say(f"installing {', '.join(REQUIREMENTS)} into {self.folder} ...")
            (self.folder / MARK).unlink(missing_ok=True)
            venv.create(self.folder, with_pip=True, clear=False, upgrade_deps=False)
            self._run(
                "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade", *REQUIREMENTS
            )
            (self.folder / MARK).write_text(json.dumps(wanted), encoding="utf-8")

    def versions(self) -> dict[str, str]:
        """Return the versions of the packages, and of the OpenSSL of its Python."""
        names = [requirement.partition(">")[0] for requirement in REQUIREMENTS]
        found: dict[str, str] = json.loads(self._run("-c", _VERSIONS, *names))
        return found

    def _installed(self) -> object:
        try:
            return json.loads((self.folder / MARK).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # missing, or interrupted
            return None

    def _run(self, *arguments: str) -> str:
        try:
            done = subprocess.run(
                [str(self.python), *arguments],
                capture_output=True,
                text=True,
                timeout=INSTALL_TIMEOUT,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ZcprotoError(f"{self.python}: {escape_text(str(error), 500)}") from error
        if done.returncode:
            last = " / ".join(done.stderr.strip().splitlines()[-3:])
            raise ZcprotoError(f"the environment of the peers cannot be made: {escape_text(last, 800)}")
        return done.stdout
