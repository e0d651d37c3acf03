"""Each edge case of streams and calls that a client can get wrong has a scenario of the kit."""

from __future__ import annotations

import pytest

from tests.conformance.helpers import SCRIPTED
from tests.spec.test_stream_cases import CASES

CONVERSATIONS: dict[int, tuple[str, ...]] = {
    1: ("stream-without-streams", "handle-without-calls"),
    3: ("requests-beside-streams",),
    4: ("welcome-streams-is-no-map", "welcome-streams-without-max-item", "welcome-calls-without-max"),
    5: ("welcome-streams-with-unknown-keys",),
    6: ("stream-without-items",),
    7: ("request-of-a-stream",),
    13: ("stream-limit", "max-open"),
    15: ("credit-follows-the-application", "item-before-credit"),
    18: ("credit-lower",),
    24: ("item-before-credit",),
    25: ("items-beyond-the-credit",),
    27: ("item-overdraws-the-bytes",),
    28: ("item-too-long",),
    30: ("item-undecodable",),
    31: ("end-at-once",),
    33: ("half-close",),
    34: ("response-before-the-items-end",),
    37: ("leave",),
    38: ("cancel-crosses-response",),
    41: ("items-after-cancel",),
    42: ("stream-deadline",),
    44: ("stream-error-after-items",),
    47: ("stream-of-a-revoked-session", "session-for-is-revoked"),
    49: ("stream-outlives-a-refresh",),
    52: ("stream-of-a-replaced-session",),
    55: ("stream-after-goaway", "stream-unavailable"),
    56: ("stream-cut-by-a-drain",),
    58: ("stream-of-a-lost-connection", "stream-is-not-repeated-after-an-item"),
    59: ("stream-of-a-closed-connection", "stream-is-not-repeated-after-credit"),
    60: ("stale-open",),
    62: ("stale-credit",),
    63: ("stale-item",),
    65: ("item-on-a-request",),
    66: ("item-on-unknown-stream",),
    82: ("call-answered-once",),
    83: ("call-without-a-handler", "call-with-an-unknown-token", "call-without-registration"),
    84: ("call-withdrawn", "call-withdrawn-late"),
    85: ("call-with-the-number-of-a-request",),
    89: ("calls-of-a-revoked-session",),
    90: ("call-result-of-max-frame",),
    94: ("slow-response-of-a-stream",),
    95: ("session-for", "session-for-is-revoked"),
}
"""Number of a case -> scenarios."""


@pytest.mark.parametrize("number", CONVERSATIONS)
def test_conversation_of_a_case_is_a_scenario(number: int) -> None:
    assert number in CASES
    assert {f"scripted/{name}" for name in CONVERSATIONS[number]} <= set(SCRIPTED)
