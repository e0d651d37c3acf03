from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder that does not exist yet, set in ZCPROTO_HOME."""
    monkeypatch.setenv("ZCPROTO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
