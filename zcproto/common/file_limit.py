"""Raise the limit of open files: each connection needs one. Child processes inherit the limit."""

from __future__ import annotations

import resource
import sys


def raise_file_limit(wanted: int) -> int:
    """Raise the limit to `wanted`, or as far as allowed, and return it. It is never lowered."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:  # -1
        return sys.maxsize
    target = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        soft = target
    return soft
