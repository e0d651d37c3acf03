"""What tests of files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def mount_read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every file system look like a read-only mount."""
    statvfs = os.statvfs

    def read_only(path: Path) -> os.statvfs_result:
        found = list(statvfs(path))
        found[8] |= os.ST_RDONLY  # f_flag
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", read_only)
