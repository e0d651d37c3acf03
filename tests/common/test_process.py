from __future__ import annotations

import asyncio
import resource
import sys

import pytest
import uvloop

from zcproto.common.process import new_event_loop, raise_file_limit

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
