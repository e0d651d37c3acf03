"""The contract of every session store, as tests.

The test module of a store defines a fixture `harness` and a class:

    class TestSqliteStore(StoreContract, DurabilityContract):
        pass
"""

from __future__ import annotations

import pytest

from tests.stores.contract.answer_limits import AnswerLimitContract
from tests.stores.contract.answers import AnswerContract
from tests.stores.contract.durability import DurabilityContract
from tests.stores.contract.expiry import ExpiryContract
from tests.stores.contract.helpers import (
    DAY,
    DIGESTS,
    EVICT_ONE,
    EVICT_TWO,
    FIVE,
    HOUR,
    IDLE,
    KEEP,
    KEEP_ENDED,
    LAST,
    LEASE,
    MINUTE,
    ONE,
    SECOND,
    STRINGS,
    WALL,
    Harness,
    StoreTime,
    digest,
    ended,
    expire_all,
    loaded,
    opened,
    rotated,
    rotation,
    session,
)
from tests.stores.contract.last_use import LastUseContract
from tests.stores.contract.limit import LimitContract
from tests.stores.contract.refresh import RefreshContract, RepeatedRefreshContract
from tests.stores.contract.revocation import RevocationContract
from tests.stores.contract.sessions import SessionContract
from zcproto.stores.base import SessionStore

__all__ = [
    "DAY",
    "DIGESTS",
    "EVICT_ONE",
    "EVICT_TWO",
    "FIVE",
    "HOUR",
    "IDLE",
    "KEEP",
    "KEEP_ENDED",
    "LAST",
    "LEASE",
    "MINUTE",
    "ONE",
    "SECOND",
    "STRINGS",
    "WALL",
    "DurabilityContract",
    "Harness",
    "RepeatedRefreshContract",
    "StoreContract",
    "StoreTime",
    "digest",
    "ended",
    "expire_all",
    "loaded",
    "opened",
    "rotated",
    "rotation",
    "session",
]


class StoreContract(
    SessionContract,
    LimitContract,
    RefreshContract,
    LastUseContract,
    RevocationContract,
    ExpiryContract,
    AnswerContract,
    AnswerLimitContract,
):
    """What all stores do."""

    @pytest.fixture
    async def store(self, harness: Harness) -> SessionStore:
        return await harness.make_store()
