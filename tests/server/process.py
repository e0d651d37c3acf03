"""A server in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from tests.helpers import variables, whole_lines
from tests.server.helpers import PATIENT, ROOT, TIMEOUT, Client


def home_with(folder: Path, certs: Path, config: str) -> Path:
    """Return a new home in a folder, with certificates and a configuration."""
    home = folder / "home"
    home.mkdir(0o700)
    shutil.copytree(certs, home / "certs")
    (home / "config.toml").write_text(config)
    return home


def patient(home: Path) -> dict[str, str]:
    """Return the variables of the longest timeouts, except for those that the configuration sets."""
    file = home / "config.toml"
    config = file.read_text() if file.exists() else ""
    return variables(
        {name: value for name, value in PATIENT.items() if name.partition("__")[2] not in config}
    )


class ServerProcess:
    """`zcproto serve` in its own process. `log` is its log. Without `listens` the start is not awaited."""

    def __init__(
        self, home: Path, certs: Path, *arguments: str, app: str | None = None, listens: bool = True
    ) -> None:
        home.mkdir(mode=0o700, exist_ok=True)
        if not (home / "certs").exists():
            shutil.copytree(certs, home / "certs")
        self.home = home
        self._log = open(home / "log", "w")  # noqa: SIM115 - closed by `wait`
        command = [sys.executable, "-m", "zcproto", "--home", str(home), "serve", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, *arguments, *([] if app is None else [app])],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=home,
            env={**patient(home), **os.environ, "PYTHONPATH": str(ROOT)},
        )
        if not listens:
            return
        line = self.process.stdout.readline()
        if not line.startswith("zcproto: listening on "):
            code = self.wait()
            raise AssertionError(f"no server, exit code {code}: {self.log}")
        self.port = int(line.rpartition(":")[2])

    def client(self, user: str | None = None, key: str = "", **options: Any) -> Client:
        return Client(self.port, self.home / "certs" / "ca.crt", user=user, key=key, **options)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for the end; return the exit code."""
        code = self.process.wait(TIMEOUT)
        if not self._log.closed:
            self._log.close()
            self.process.stdout.close()
        return code

    @property
    def log(self) -> str:
        return (self.home / "log").read_text()

    def events(self, *names: str) -> list[dict[str, Any]]:
        """Return the logged events of these names."""
        return [line for line in whole_lines(self.log) if line["event"] in names]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
