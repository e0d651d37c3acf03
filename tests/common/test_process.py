from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop

from zcproto.common import process
from zcproto.common.process import (
    HEAP_BLOCK,
    HEAP_SPARE,
    MOST_COLLAPSED,
    collapse_heap,
    heap_trim,
    new_event_loop,
    queued_seconds,
    raise_file_limit,
    tune_heap,
)

NO_LIMIT = resource.RLIM_INFINITY


def test_uvloop_is_used_if_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = new_event_loop()
    assert isinstance(loop, uvloop.Loop)
    loop.close()
    monkeypatch.setitem(sys.modules, "uvloop", None)
    loop = new_event_loop()
    assert isinstance(loop, asyncio.BaseEventLoop)
    loop.close()


def test_time_in_the_queue_of_the_processors_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    schedstat = tmp_path / "schedstat"
    monkeypatch.setattr(
        process, "Path", lambda name: schedstat if name == "/proc/7/task/7/schedstat" else Path(name)
    )
    assert queued_seconds(7) == 0.0
    for text, seconds in (("1 2500000000 3\n", 2.5), ("", 0.0), ("1 x 3", 0.0)):
        schedstat.write_text(text)
        assert queued_seconds(7) == seconds
    assert queued_seconds(os.getpid(), threading.get_native_id()) >= 0.0


@pytest.mark.parametrize(
    ("limits", "wanted", "becomes"),
    [
        ((1_024, 4_096), 2_000, 2_000),
        ((1_024, 4_096), 9_000, 4_096),
        ((1_024, 4_096), 1_024, 1_024),
        ((1_024, 4_096), 500, 1_024),
        ((1_024, NO_LIMIT), 9_000, 9_000),
        ((4_096, 4_096), 9_000, 4_096),
    ],
)
def test_limit_is_raised_as_far_as_allowed(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], wanted: int, becomes: int
) -> None:
    state = [limits]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: state[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: state.append(pair))
    assert raise_file_limit(wanted) == becomes
    assert state[-1] == (becomes, limits[1])


def test_unlimited_process_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (NO_LIMIT, NO_LIMIT))
    monkeypatch.setattr(resource, "setrlimit", None)
    assert raise_file_limit(9_000) == sys.maxsize


def test_limit_of_this_process_is_read() -> None:
    assert raise_file_limit(0) == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class Libc:
    """A C library with some functions."""

    def __init__(self, **functions: Any) -> None:
        self.calls: list[tuple[int, int]] = []
        self.__dict__.update(functions)

    def mallopt(self, parameter: int, value: int) -> int:
        self.calls.append((parameter, value))
        return 1


def test_heap_keeps_memory_of_large_bodies_with_glibc_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    glibc, bionic = Libc(gnu_get_libc_version=lambda: b"2.41"), Libc()
    for libc in (glibc, bionic, SimpleNamespace()):
        monkeypatch.setattr(ctypes, "CDLL", lambda name, libc=libc: libc)
        tune_heap()
    assert glibc.calls == [(-3, HEAP_BLOCK), (-1, HEAP_SPARE)]
    assert bionic.calls == []


def test_heap_is_trimmed_completely_where_the_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=kept.append))
    trim = heap_trim()
    assert trim is not None
    trim()
    assert kept == [0]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert heap_trim() is None


PAGE = 2 << 20


def mapping(start: int, size: int, resident: int, line: str = "rw-p 00000000 00:00 0 ") -> str:
    """Return an entry of /proc/self/smaps."""
    return (
        f"{start:x}-{start + size:x} {line}\n"
        f"Size:{size >> 10:15} kB\nKernelPageSize:{4:5} kB\nMMUPageSize:{4:8} kB\n"
        f"Rss:{resident >> 10:16} kB\nPss:{resident >> 10:16} kB\nVmFlags: rd wr mr\n"
    )


class Kernel:
    """A kernel with huge pages, which moves memory to them; `failing` is where it does not."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moved: list[tuple[int, int]] = []
        self.failing: int | None = None
        self.smaps = folder / "smaps"
        self.enabled = folder / "enabled"
        self.enabled.write_text("always [madvise] never\n")
        (folder / "hpage_pmd_size").write_text(f"{PAGE}\n")
        monkeypatch.setattr(process, "HUGE_PAGES", folder)
        monkeypatch.setattr(process, "MAPPINGS", self.smaps)
        monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(madvise=self.madvise))

    def madvise(self, address: Any, size: Any, advice: int) -> int:
        assert advice == 25, "MADV_COLLAPSE"
        if address.value == self.failing:
            return -1
        self.moved.append((address.value, size.value))
        return 0


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(tmp_path, monkeypatch)


def test_heap_in_use_is_moved_to_huge_pages(kernel: Kernel) -> None:
    kernel.smaps.write_text(
        mapping(8 * PAGE + 4096, 4 * PAGE, 4 * PAGE, "rw-p 00000000 00:00 0    [heap]")
        + mapping(20 * PAGE, 3 * PAGE, 3 * PAGE)
        + mapping(30 * PAGE, PAGE - 4096, PAGE - 4096)  # less than a page
        + mapping(40 * PAGE, 8 * PAGE, 4096)  # the stack of a thread
        + mapping(50 * PAGE, 2 * PAGE, 2 * PAGE, "r-xp 00000000 fe:00 7    /usr/bin/python3")
        + mapping(60 * PAGE, 2 * PAGE, 2 * PAGE, "rw-s 00000000 00:01 9    /dev/zero (deleted)")
    )
    assert collapse_heap() == 6 * PAGE
    assert kernel.moved == [(9 * PAGE, 3 * PAGE), (20 * PAGE, 3 * PAGE)]


def test_huge_pages_are_limited_for_a_large_heap(kernel: Kernel) -> None:
    kernel.smaps.write_text(mapping(PAGE, PAGE, PAGE) + mapping(8 * PAGE, 1 << 40, 1 << 40) * 2)
    assert collapse_heap() == MOST_COLLAPSED
    assert kernel.moved == [(PAGE, PAGE), (8 * PAGE, MOST_COLLAPSED - PAGE)]


def test_memory_that_the_kernel_cannot_move_stays(kernel: Kernel) -> None:
    kernel.failing = PAGE
    kernel.smaps.write_text(mapping(PAGE, PAGE, PAGE) + mapping(8 * PAGE, PAGE, PAGE))
    assert collapse_heap() == PAGE
    assert kernel.moved == [(8 * PAGE, PAGE)]


def test_huge_pages_are_not_used_if_switched_off_or_missing(kernel: Kernel) -> None:
    assert collapse_heap() == 0  # no /proc
    kernel.smaps.write_text(mapping(PAGE, PAGE, PAGE))
    kernel.enabled.write_text("always madvise [never]\n")
    assert collapse_heap() == 0
    kernel.enabled.unlink()
    assert collapse_heap() == 0
    assert kernel.moved == []
