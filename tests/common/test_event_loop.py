from __future__ import annotations

import asyncio
import sys

import pytest
import uvloop

from zcproto.common.event_loop import new_event_loop


def test_uvloop_is_used_if_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = new_event_loop()
    assert isinstance(loop, uvloop.Loop)
    loop.close()
    monkeypatch.setitem(sys.modules, "uvloop", None)
    loop = new_event_loop()
    assert isinstance(loop, asyncio.BaseEventLoop)
    loop.close()
