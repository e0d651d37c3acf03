"""Starting a module of this package in a process of its own, with this interpreter and this package."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import bench


def module_command(module: str, *arguments: str) -> list[str]:
    """The command line. -P: `bench` must be this one, not a folder of that name where the user happens to be."""
    return [sys.executable, "-P", "-m", module, *arguments]


def module_environment() -> dict[str, str]:
    """The environment to start it with: the package is found again wherever this process found it."""
    package = str(Path(bench.__file__).parents[1])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}
