"""Prepare a process for many connections: its event loop, its heap, and its limit of open files.

Children inherit heap and limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import resource
import sys
from collections.abc import Callable
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3

HEAP_BLOCK: Final = 4 << 20
"""Blocks of memory below so many bytes come from the heap, which keeps them for the next large body. By default
glibc maps each, and the kernel clears its pages for every request."""

HEAP_SPARE: Final = 16 << 20
"""Bytes that may be free at the end of the heap before they return to the system."""


def import_event_loop() -> None:
    """Import what `new_event_loop` needs, once for all processes that are forked later."""
    with contextlib.suppress(ImportError):
        import uvloop  # noqa: F401, PLC0415 - optional


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return a loop of uvloop if it is installed, else of asyncio."""
    try:
        import uvloop  # noqa: PLC0415 - optional
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def raise_file_limit(wanted: int) -> int:
    """Raise the limit of open files to `wanted`, or as far as allowed, and return it. It is never lowered."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:  # -1
        return sys.maxsize
    target = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        soft = target
    return soft


def tune_heap() -> None:
    """Keep the memory of large bodies for the next ones, in this process and its children. glibc only."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, HEAP_BLOCK)
        libc.mallopt(_M_TRIM_THRESHOLD, HEAP_SPARE)


def heap_trim() -> Callable[[], object] | None:
    """Return what returns free memory to the system; None without glibc, as others keep little of it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return None if trim is None else lambda: trim(0)
