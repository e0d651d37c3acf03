"""Prepare a process for many connections: its event loop, its heap, and its limit of open files.

Children inherit heap and limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

try:
    import resource
except ImportError:  # Windows, which limits open files to millions
    HAS_LIMITS = False
else:
    HAS_LIMITS = True

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3

HEAP_BLOCK: Final = 4 << 20
"""Blocks of memory below so many bytes come from the heap, which keeps them for the next large body. By default
glibc maps each, and the kernel clears its pages for every request."""

HEAP_SPARE: Final = 16 << 20
"""Bytes that may be free at the end of the heap before they return to the system."""


_NS_PER_S: Final = 1e9

_MADV_COLLAPSE: Final = 25
HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage")
MAPPINGS: Final = Path("/proc/self/smaps")
_ANONYMOUS: Final = re.compile(
    r"^([0-9a-f]+)-([0-9a-f]+) rw-p [0-9a-f]+ 00:00 0 *(?:\[heap\])?\n(?:[A-Z].*\n)*?Rss: +(\d+) kB$",
    re.MULTILINE,
)
MOST_COLLAPSED: Final = 64 << 20
"""Bytes that are moved to huge pages: more than a server has at its start, in some tens of milliseconds."""

FILLED: Final = 0.75
"""The part of a mapping that is in use, at least, so that huge pages take little more memory."""


def queued_seconds(pid: int, thread: int | None = None) -> float:
    """Return how long a thread of a process was ready to run and had no processor; 0 if it is not known.

    `thread` is its native id; None: the main thread. Linux has it in the second field of schedstat, in nanoseconds.
    A container that has used up its share waits too.
    """
    try:
        path = f"/proc/{pid}/task/{pid if thread is None else thread}/schedstat"
        return int(Path(path).read_bytes().split()[1]) / _NS_PER_S
    except (OSError, ValueError, IndexError):
        return 0.0


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
    if not HAS_LIMITS:
        return sys.maxsize
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:  # -1
        return sys.maxsize
    target = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        soft = target
    return soft


def deny_core_dumps() -> None:
    """Keep a crash from writing the memory to the disk."""
    if HAS_LIMITS:
        _, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


def _c_library() -> Any:
    """Return the C library that this process has loaded; None on Windows."""
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None


def tune_heap() -> None:
    """Keep the memory of large bodies for the next ones, in this process and its children. glibc only."""
    libc = _c_library()
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, HEAP_BLOCK)
        libc.mallopt(_M_TRIM_THRESHOLD, HEAP_SPARE)


def collapse_heap() -> int:
    """Move the memory in use to huge pages and return its bytes: 0 before Linux 6.1, or where the operator has
    switched huge pages off.

    A server sleeps between requests. With small pages it misses the TLB hundreds of times each time it wakes.
    """
    try:
        if "[never]" in (HUGE_PAGES / "enabled").read_text():
            return 0
        page = int((HUGE_PAGES / "hpage_pmd_size").read_text())
        mappings = [*_filled_mappings(MAPPINGS.read_text())]
    except (OSError, ValueError):
        return 0
    madvise = ctypes.CDLL(None).madvise
    moved = 0
    for start, end in mappings:
        first = -(-start // page) * page
        size = min((end - first) // page * page, (MOST_COLLAPSED - moved) // page * page)
        if size > 0 and madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_COLLAPSE) == 0:
            moved += size
    return moved


def _filled_mappings(smaps: str) -> Iterator[tuple[int, int]]:
    """Yield the start and end of anonymous mappings that are mostly in use (proc(5), smaps)."""
    for found in _ANONYMOUS.finditer(smaps):
        start, end, resident = int(found[1], 16), int(found[2], 16), int(found[3]) << 10
        if resident >= FILLED * (end - start):
            yield start, end


def heap_trim() -> Callable[[], object] | None:
    """Return what returns free memory to the system; None without glibc, as others keep little of it."""
    trim = getattr(_c_library(), "malloc_trim", None)
    return None if trim is None else lambda: trim(0)
