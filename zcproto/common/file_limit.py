"""The limit of open files of this process, which its children inherit: each connection takes one."""

from __future__ import annotations

import resource
import sys


def raise_file_limit(wanted: int) -> int:
    """Raise the limit to `wanted`, or as far as allowed. Returns what it is now; it is never lowered."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:  # which is -1, and no limit
        return sys.maxsize
    target = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        soft = target
    return soft
