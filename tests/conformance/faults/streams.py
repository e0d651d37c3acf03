"""A fault for each scenario about streams of items."""

from __future__ import annotations

from typing import Final

from tests.conformance.faults.calls import LIMIT_IS_RETRIED, SEND_CANCEL, then
from tests.conformance.faults.mutation import Fault, fault

_MAY_SEND: Final = "SendCredit.may_send"
_ALLOWED: Final = "return self.sent_items < self.items and self.sent_bytes < self.bytes"
_FEATURE: Final = "if feature in welcome:"
_LIMITS: Final = "limits = welcome[feature]"
_STALE: Final = "if head in _ON_STREAMS and self._streams is not None and self._streams.is_read(stream):"
_OPENS_AGAIN: Final = (
    (
        "Stream._answered",
        "if (pending.stream.was_answered_to or run is not None) and not can_resume:",
        "if False:",
    ),
    ("Client._after_stream_error", "elif pending.stream.was_answered_to:", "elif False:"),
)


STREAMS: Final[dict[str, Fault]] = {
    "stream-without-streams": fault(
        "opens streams whatever WELCOME announces",
        ("ClientConnection.open_stream", "if announced is None:", "if False:"),
    ),
    "requests-beside-streams": fault(
        "refuses a WELCOME with calls",
        (
            "read_welcome",
            "for feature, keys in _OPTIONAL.items():",
            'if "calls" in welcome:\n        raise ProtocolError(Code.PROTOCOL_ERROR, "a fault")\n'
            "    for feature, keys in _OPTIONAL.items():",
        ),
    ),
    "welcome-streams-is-no-map": fault(
        "does not check the type of `streams`",
        ("read_welcome", _LIMITS, f"{_LIMITS} = {{'max_open': 1, 'max_item': 64}}"),
    ),
    "welcome-streams-without-max-item": fault(
        "does not require the keys of `streams`",
        ("read_welcome", _LIMITS, f"{_LIMITS} = {{'max_item': 64, **welcome[feature]}}"),
    ),
    "welcome-calls-without-max": fault(
        "does not check `calls`", ("read_welcome", _FEATURE, 'if feature in welcome and feature != "calls":')
    ),
    "welcome-streams-with-unknown-keys": fault(
        "refuses unknown keys of `streams`",
        (
            "read_welcome",
            "limits.__class__ is not dict or",
            "limits.__class__ is not dict or limits.keys() != keys.keys() or",
        ),
    ),
    "stream": fault(
        "ignores the window of the application",
        ("ClientConnection.open_stream", '"credit": window', '"credit": (9, 9)'),
    ),
    "stream-without-items": fault(
        "expects an item before the answer",
        ("Stream._answered", "self._has_ended = True", "self._has_ended = pending.stream.was_answered_to"),
    ),
    "request-of-a-stream": fault("repeats FAILED_PRECONDITION", then("FAILED_PRECONDITION", "AT_ONCE")),
    "stream-limit": LIMIT_IS_RETRIED,
    "max-open": fault(
        "does not count its streams",
        (
            "ClientConnection.open_stream",
            'if self._streams is not None and len(self._streams) >= announced["max_open"]:',
            "if False:",
        ),
    ),
    "credit-follows-the-application": fault(
        "grants for items that it has only stored",
        (
            "ItemQueue.next_grant",
            "self._taken[0] + window_items",
            "self._received[0] + window_items",
        ),
    ),
    "item-before-credit": fault("sends without credit", (_MAY_SEND, _ALLOWED, "return True")),
    "item-overdraws-the-bytes": fault(
        "counts items alone", (_MAY_SEND, _ALLOWED, "return self.sent_items < self.items")
    ),
    "items-beyond-the-credit": fault(
        "accepts any number of items",
        (
            "ItemQueue.receive",
            "if items >= self._granted[0] or size >= self._granted[1]:",
            "if False:",
        ),
    ),
    "credit-lower": fault(
        "accepts lower totals",
        (
            "SendCredit.grow",
            "if items < self.items or size < self.bytes:",
            "if False:",
        ),
    ),
    "end-at-once": fault(
        "sends END only with credit",
        (
            "ClientConnection.end_items",
            "stream.state is ClientStreamState.OPEN and",
            "stream.credit.may_send and",
        ),
    ),
    "half-close": fault(
        "drops items after its own END",
        (
            "ClientConnection.end_items",
            "stream.state = ClientStreamState.HALF",
            "stream.state = ClientStreamState.LEAVING",
        ),
    ),
    "response-before-the-items-end": fault(
        "sends items on a stream that was answered",
        ("Stream._wanted", "if not pending.done():", "if True:"),
        ("PendingStream.wait_to_send", "while not self.done():", "while True:"),
    ),
    "leave": fault("does not send CANCEL", ("ClientConnection.cancel", SEND_CANCEL, "pass")),
    "cancel-crosses-response": fault(
        "does not free a stream that was left",
        (
            "ClientStreams.end",
            "stream = self.pop(number, None)",
            "stream = self.pop(number, None) if self.is_read(number) else None",
        ),
    ),
    "items-after-cancel": fault(
        "frees a stream with its CANCEL",
        ("ClientConnection.cancel", "self._streams.leave(stream)", "self._streams.end(stream)"),
    ),
    "stream-deadline": fault(
        "drops the items that wait when a stream ends",
        ("ClientStreams.end", "stream.items.has_ended = True", "stream.items.clear()"),
    ),
    "stream-error-after-items": fault(
        "raises the error of a stream before its items",
        (
            "Stream._receive",
            "if pending.stream.items.held:",
            "if pending.stream.items.held and not (pending.done() and pending.exception()):",
        ),
    ),
    "item-undecodable": fault(
        "does not cancel a stream that it fails",
        (
            "Stream.receive",
            "self._middleware.end(error=error)\n            self.close()",
            "self._middleware.end(error=error)",
        ),
    ),
    "item-too-long": fault(
        "does not check the length of items",
        (
            "check_head",
            "if bare_head == ITEM and length > accepted.max_item:",
            "if False:",
        ),
    ),
    "item-on-a-request": fault(
        "drops items on the stream of a REQUEST",
        (
            "ClientStreams.receive",
            'raise ProtocolError(Code.PROTOCOL_ERROR, "ITEM or CREDIT for a request")',
            "return None",
        ),
    ),
    "item-on-unknown-stream": fault(
        "ends the connection after an item on an unknown stream",
        (
            "ClientConnection._receive",
            "self.dropped_unknown += 1\n                return None",
            'raise ProtocolError(Code.PROTOCOL_ERROR, "a fault")',
        ),
    ),
    "stale-open": fault("reports STALE_TIMESTAMP at once", then("STALE_TIMESTAMP", "RAISE")),
    "stale-item": fault("drops stale items", ("ClientConnection._received_stale", _STALE, "if False:")),
    "stale-credit": fault(
        "drops stale CREDITs",
        (
            "ClientConnection._received_stale",
            _STALE,
            "if head == ITEM and self._streams is not None and self._streams.is_read(stream):",
        ),
    ),
    "slow-response-of-a-stream": fault(
        "judges frames when they are complete",
        (
            "ClientConnection.receive_data",
            "judged_at, self._partial = self._partial[0], None",
            "self._partial = None",
        ),
    ),
    "stream-of-a-revoked-session": fault(
        "opens a stream again that was cut", *_OPENS_AGAIN, then("CANCELLED", "AT_ONCE")
    ),
    "stream-outlives-a-refresh": fault(
        "sends CREDIT with the newest token",
        ("ClientConnection.send_credit", "stream.token, encode_body", "[*self._tokens][-1], encode_body"),
    ),
    "stream-of-a-replaced-session": fault(
        "goes on with a replaced session",
        ("Client._after_failure", "sessions.ended(token, error)", "pass"),
    ),
    "stream-after-goaway": fault(
        "forgets its streams at GOAWAY",
        (
            "ClientConnection._received_go_away",
            "self.state = next_state(self.state, Input.GOAWAY)",
            "self.state, self._streams = next_state(self.state, Input.GOAWAY), None",
        ),
    ),
    "stream-cut-by-a-drain": fault(
        "opens a stream again that a drain has cut", *_OPENS_AGAIN, then("CANCELLED", "LATER")
    ),
    "stream-unavailable": fault("reports UNAVAILABLE at once", then("UNAVAILABLE", "RAISE")),
    "stream-is-not-repeated-after-an-item": fault("opens a stream again that has begun", *_OPENS_AGAIN),
    "stream-is-not-repeated-after-credit": fault(
        "takes a stream with credit for one that has not begun",
        ("ClientStreams.receive", "stream.was_answered_to = True", "stream.was_answered_to = head == ITEM"),
    ),
    "stream-of-a-lost-connection": fault(
        "opens a stream again after a loss",
        *_OPENS_AGAIN,
        (
            "Client._after_failure",
            "is_repeatable = (connection.unanswered_not_run or is_idempotent)",
            "is_repeatable = True",
        ),
    ),
    "stream-of-a-closed-connection": fault(
        "opens a stream again that has begun, after GOAWAY and a clean end", *_OPENS_AGAIN
    ),
}
