"""What figures depend on beside the code, in full."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from zcproto.load import report

PACKAGES: Final = ("zcproto", "uvloop", "cryptography", "msgpack", "pydantic", "h11")


def machine() -> dict[str, Any]:
    """Processor, memory, system, versions, and how busy the machine is at this moment."""
    return {
        **report.machine(),
        "processor": _processor(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": [round(each, 2) for each in os.getloadavg()],
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }


def sentence(told: dict[str, Any]) -> str:
    """One line of it for people."""
    packages = ", ".join(f"{name} {version}" for name, version in told["packages"].items())
    return (
        f"{told['processor']}, {told['cpus']} cores, {told['memory_gib']:g} GiB, {told['system']}; Python"
        f" {told['python']}, {told['openssl']}, {packages}; load average at the start {told['load_average'][0]:g}"
    )


def _processor() -> str:
    """The name that the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # another system
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
