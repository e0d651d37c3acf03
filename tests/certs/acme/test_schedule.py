"""Test what is kept about orders from one start of a server to the next."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from tests.certs.support import NOW
from zcproto.certs.acme.schedule import MAX_WAIT, OrderRecord, digest_of
from zcproto.certs.settings import AcmeSettings

SETTINGS = AcmeSettings("https://ca.example/dir", ("a.example",))
OTHER = AcmeSettings("https://ca.example/dir", ("b.example",))
LATER, SOON = NOW + timedelta(hours=1), timedelta(microseconds=1)


@pytest.mark.parametrize(
    ("changes", "waits_until"),
    [
        ({}, LATER),
        ({"problem": ""}, None),  # it has not failed
        ({"settings": digest_of(OTHER)}, None),  # other settings may succeed
        ({"retry_at": None}, None),
        ({"retry_at": NOW}, None),
        ({"retry_at": NOW + SOON}, NOW + SOON),
        ({"retry_at": NOW + MAX_WAIT}, NOW + MAX_WAIT),
        ({"retry_at": NOW + MAX_WAIT + SOON}, None),  # written with a wrong clock
    ],
)
def test_failed_order_waits_with_the_same_settings(
    changes: dict[str, Any], waits_until: datetime | None
) -> None:
    record = OrderRecord(**({"problem": "no", "retry_at": LATER, "settings": digest_of(SETTINGS)} | changes))
    assert record.waits_until(SETTINGS, NOW) == waits_until
