from __future__ import annotations

import pytest

from tests.server.conftest import Serve, certs, serve
from zcproto.load import generator

__all__ = ["Serve", "certs", "serve"]


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the timeouts of the generator."""
    monkeypatch.setattr(generator, "ANSWER_TIMEOUT", 0.3)
    monkeypatch.setattr(generator, "CLOSE_TIMEOUT", 3.0)
