from __future__ import annotations

from collections.abc import Iterator

import pytest

from zcproto.sessions import slab


@pytest.fixture(autouse=True, scope="package")
def mapped_memory() -> Iterator[None]:
    """Map small tables too, as large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slab, "SMALL", 0)
        yield
