"""What a first start reports on a terminal, in three lines: what is created, and the next command.

Must not know: how certificates are made.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from zcproto.common.home import DEFAULT, VARIABLE, Home
from zcproto.common.text import counted, escape_text
from zcproto.config import Config

SHOWN_NAMES = 4


class FirstStart:
    """Replaces the progress of the certificates by three lines, if the server has none yet.

    `progress` gets the sentences of every other start, `terminal` is None without one.
    """

    def __init__(self, progress: Callable[[str], None], terminal: TextIO | None) -> None:
        self._progress = progress
        self._terminal = terminal

    def begin(self, config: Config, home: Home) -> None:
        """Begin with the configuration of a server that has not started."""
        self._config, self._home = config, home
        certificates = config.certificates
        if certificates.mode != "own" or (certificates.directory / "ca.crt").exists():
            self._terminal = None
        folder = escape_text(str(home.path))
        self._print(f"first start: creating {folder} with keys and certificates; RSA keys take some seconds")

    def progress(self, sentence: str) -> None:
        """Pass on a sentence about the certificates, unless the three lines replace it."""
        if self._terminal is None:
            self._progress(sentence)

    def ready(self, names: Sequence[str], port: int) -> None:
        """Report what was created, now that the server listens. `names` are those of its certificate."""
        if self._terminal is None or not names:
            return
        left = len(names) - SHOWN_NAMES
        more = f" and {counted(left, 'more name')}" if left > 0 else ""
        authority = escape_text(str(self._config.certificates.directory / "ca.crt"))
        self._print(f"clients trust {authority}; the server is {', '.join(names[:SHOWN_NAMES])}{more}")
        self._print(f"next, in another terminal: {_next_command(self._home, port)}")
        self.end()

    def end(self) -> None:
        """Pass on what the certificates report from now on."""
        self._terminal = None

    def _print(self, line: str) -> None:
        if self._terminal is not None:
            self._terminal.write(f"zcproto: {line}\n")
            self._terminal.flush()


def _next_command(home: Home, port: int) -> str:
    option = "" if _is_default(home.path) else f" --home {escape_text(shlex.quote(str(home.path)))}"
    if home.users.exists():
        return f"{_program()}{option} call localhost:{port} server.info"
    return f"{_program()}{option} user add ada --out ada.key"


def _program() -> str:
    """Return how to run a command, also from an environment that is not activated."""
    return "zcproto" if shutil.which("zcproto") else f"{escape_text(shlex.quote(sys.executable))} -m zcproto"


def _is_default(path: Path) -> bool:
    return path == Path(os.environ.get(VARIABLE) or DEFAULT).expanduser().absolute()
