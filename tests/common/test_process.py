from __future__ import annotations

import asyncio
import ctypes
import resource
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop

from zcproto.common.process import (
    HEAP_BLOCK,
    HEAP_SPARE,
    heap_trim,
    new_event_loop,
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
