"""Files for the tools that run and watch a server: systemd units, Prometheus alert rules, a Grafana dashboard.

They are package data, in a folder for each tool. `zcproto deploy` prints them.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Final

TOOLS: Final = ("systemd", "prometheus", "grafana")


def read_files(tool: str) -> dict[str, str]:
    """Return the files for one of TOOLS: their names with their text, sorted."""
    folder = files(__name__) / tool
    return {
        path.name: path.read_text(encoding="utf-8")
        for path in sorted(folder.iterdir(), key=lambda path: path.name)
    }
