from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from tests.limits import TIMEOUT
from tests.server.helpers import KEY

LIMITS = {
    "backends": ["TIMEOUT_S"],
    "connect": ["DEFAULT_TIMEOUT", "MAX_CONNECT_TIMEOUT"],
    "control": ["CONNECT_S", "MARGIN_S"],
    "health": ["LIMIT_S"],
    "login": ["TIMEOUT_S"],
    "session": ["TIMEOUT_S"],
    "status": ["STATUS_S"],
}
"""Limits of commands, by module, which a busy machine may exceed."""


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the commands of this process wait. A test of a limit sets it."""
    for module, names in LIMITS.items():
        for name in names:
            monkeypatch.setattr(import_module(f"zcproto.cli.{module}"), name, TIMEOUT)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder that does not exist yet, set in ZCPROTO_HOME."""
    monkeypatch.setenv("ZCPROTO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def free_default_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """The port of a configuration that names none counts as free, whatever this machine runs there."""
    monkeypatch.setattr("zcproto.runtime.preflight.bind", lambda *_, **__: [])


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """A private file with the key of ada."""
    path = tmp_path / "key"
    path.write_text(KEY + "\n")
    path.chmod(0o600)
    return path
