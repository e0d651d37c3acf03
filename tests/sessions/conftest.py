from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.sessions.helpers import RegistryHarness
from zcproto.sessions import OpenedSession, slab


@pytest.fixture(autouse=True, scope="package")
def mapped_memory() -> Iterator[None]:
    """Map small tables too, as large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slab, "SMALL", 0)
        yield


@pytest.fixture
def harness() -> RegistryHarness:
    """Return a registry with the default settings."""
    return RegistryHarness()


@pytest.fixture
def opened(harness: RegistryHarness) -> OpenedSession:
    """Return the first session of alice in it."""
    return harness.open()
