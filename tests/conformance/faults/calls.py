"""A fault for each scenario about calls, retries, sessions and devices."""

from __future__ import annotations

from typing import Final

from tests.conformance.faults.mutation import Fault, fault

_BY_CODE: Final = "return _BY_CODE.get(error.code, Then.RAISE)"
_DECODE: Final = "decode_body"
_UNPACK: Final = "value = unpack(body) if is_checked else unpack(body, max_ext_len=0, ext_hook=_refuse_ext)"
_NESTED: Final = "_check_nested"
_KEY: Final = "if key.__class__ is not str:"
_DEEP: Final = "_check_nested([value], max_depth)"
SEND_CANCEL: Final = 'self._send(CANCEL, stream, token or NO_TOKEN, b"", wall)'


def then(code: str, then: str) -> tuple[str, str, str]:
    """Change what the client does after an error with this code."""
    return "what_next", _BY_CODE, f"return Then.{then} if error.code is Code.{code} else {_BY_CODE[7:]}"


def more_than_once(then: str) -> tuple[str, str, str]:
    """Take a step as often as its error occurs."""
    return "Attempt.after_error", "self.once(then)", f"(then is Then.{then} or self.once(then))"


_INVALID_RESPONSE_IS_FATAL: Final = fault(
    "ends the connection after an invalid response",
    (
        "ClientConnection._received_response",
        'return ErrorReceived(stream, Code.INTERNAL, f"the answer cannot be read: {error}", {})',
        'raise ProtocolError(Code.PROTOCOL_ERROR, "a fault") from error',
    ),
)
_UNKNOWN_RESPONSE_IS_FATAL: Final = fault(
    "ends the connection after a response on an unknown stream",
    (
        "ClientConnection._received_response",
        "self.dropped_unknown += 1",
        'raise ProtocolError(Code.PROTOCOL_ERROR, "a fault")',
    ),
)
_NO_SEND_LIMIT: Final = fault(
    "does not limit the size of sent frames",
    ("ClientConnection._check_size", "if size > limit:", "if False:"),
)
LIMIT_IS_RETRIED: Final = fault(
    "retries after an error with a limit",
    ("what_next", 'if error.code is Code.RESOURCE_EXHAUSTED and "limit" in error.details:', "if False:"),
)

CALLS: Final[dict[str, Fault]] = {
    "responses-out-of-order": fault(
        "matches responses by their order",
        (
            "ClientProtocol.data_received",
            "call = pending.pop(stream, None)",
            "call = pending.pop(next(iter(pending)), None)",
        ),
        (
            "ClientProtocol._receive_others",
            "call = pending.pop(event.stream, None)",
            "call = pending.pop(next(iter(pending)), None)",
        ),
    ),
    "response-on-unknown-stream": _UNKNOWN_RESPONSE_IS_FATAL,
    "duplicate-response": _UNKNOWN_RESPONSE_IS_FATAL,
    "error-codes": fault(
        "drops details", ("CallError.from_wire", "return kind(message, details)", "return kind(message)")
    ),
    "error-without-details": fault(
        "requires details",
        ("decode_error", "not 2 <= len(value) <= 3", "len(value) != 3"),
    ),
    "unknown-code": fault(
        "fails at an unknown code",
        ("CallError.from_wire", "kind = cls.by_code.get(code)", "kind = cls.by_code[code]"),
    ),
    "body-not-msgpack": _INVALID_RESPONSE_IS_FATAL,
    "body-empty": _INVALID_RESPONSE_IS_FATAL,
    "body-with-huge-array-length": _INVALID_RESPONSE_IS_FATAL,
    "body-with-trailing-bytes": fault(
        "decodes the first value of a body and ignores the rest",
        (
            _DECODE,
            _UNPACK,
            "value = (lambda reader: (reader.feed(body), reader.unpack())[1])(msgpack.Unpacker())",
        ),
    ),
    "body-with-ext-type": fault(
        "accepts ext types", (_DECODE, _UNPACK, "value = unpack(body, ext_hook=lambda code, data: data)")
    ),
    "body-with-timestamp": fault(
        "accepts msgpack timestamps", (_DECODE, _UNPACK, "value = unpack(body, timestamp=1)")
    ),
    "body-with-int-key": fault(
        "accepts int keys",
        (_DECODE, _UNPACK, "value = unpack(body, strict_map_key=False)"),
        (_NESTED, _KEY, "if key.__class__ not in (str, int):"),
    ),
    "body-with-bin-key": fault("accepts bin keys", (_NESTED, _KEY, "if key.__class__ not in (str, bytes):")),
    "body-not-utf-8": fault(
        "replaces invalid UTF-8", (_DECODE, _UNPACK, 'value = unpack(body, unicode_errors="replace")')
    ),
    "body-nested-too-deep": fault(
        "accepts any depth", (_DECODE, _DEEP, "_check_nested([value], max_depth + 99)")
    ),
    "body-32-deep": fault(
        "accepts a depth of at most 31",
        (_DECODE, _DEEP, "_check_nested([value], max_depth - 1)"),
    ),
    "results-of-all-types": fault(
        "stores ints in doubles",
        (
            _DECODE,
            _UNPACK,
            f"{_UNPACK}; value = float(value) if value.__class__ is int else value",
        ),
    ),
    "params-of-all-types": fault(
        "sends bytes as str",
        (
            "encode_body",
            "body: bytes = _pack(value)",
            "body: bytes = msgpack.packb(value, use_bin_type=False)",
        ),
    ),
    "call-without-params": fault(
        "sends an empty array instead of no params",
        (
            "ClientConnection.request",
            "encode_body([method, params, meta] if meta else [method, params])",
            "encode_body([method, params or [], meta or {}])",
        ),
    ),
    "deadline-is-sent": fault(
        "does not send the deadline",
        (
            "_deadline_meta",
            'return {"deadline_ms"',
            'return {} and {"deadline_ms"',
        ),
    ),
    "deadline-at-the-client": fault(
        "does not enforce deadlines",
        (
            "ClientProtocol._check_calls",
            "if not call.done():",
            "if False:",
        ),
    ),
    "cancel": fault(
        "sends CANCEL without its request's token",
        ("ClientConnection.cancel", SEND_CANCEL, 'self._send(CANCEL, stream, NO_TOKEN, b"", wall)'),
    ),
    "cancelled-call-stays-in-flight": fault(
        "frees the stream of a cancelled request at once",
        ("ClientConnection.cancel", SEND_CANCEL, f"{SEND_CANCEL}; self.in_flight.pop(stream)"),
        ("ClientProtocol.abandon", "self._flush_soon()", "self._flush_soon(); self.update_ready()"),
    ),
    "traceparent-is-sent": fault(
        "does not send traceparent",
        ("_meta", 'more["traceparent"] = traceparent', "pass"),
    ),
    "request-above-max-frame": _NO_SEND_LIMIT,
    "ping-is-answered": fault(
        "does not answer PING",
        ("ClientConnection._receive", "self._owes_pong = token", "pass"),
    ),
    "ping-flood": fault(
        "answers each PING at once",
        (
            "ClientConnection._receive",
            "self._owes_pong = token",
            'self._send(PONG, 0, token, b"", wall)',
        ),
    ),
    "message-with-control-characters": fault(
        "passes on messages as they are",
        ("ClientProtocol._handle", "escape_text(event.message, MESSAGE_SHOWN)", "event.message"),
    ),
    "keepalive": fault("sends no PING", ("ClientConnection.handle_timeout", "self.ping(wall)", "pass")),
    "unknown-event": fault(
        "ends a connection for an event that it does not know",
        (
            "ClientConnection._receive",
            "return EventReceived(name, data, token, body)",
            'raise ProtocolError(Code.PROTOCOL_ERROR, "a fault")',
        ),
    ),
    "events-are-delivered": fault(
        "loses the data of events",
        (
            "EventStream.__anext__",
            "Event(*decode_event(body))",
            "Event(decode_event(body)[0], None)",
        ),
    ),
}

_LOST: Final = "is_repeatable = (connection.unanswered_not_run or is_idempotent)"

GOAWAY: Final[dict[str, Fault]] = {
    "goaway-with-calls-in-flight": fault(
        "closes at GOAWAY",
        (
            "ClientProtocol._go_away",
            "self._owner.connection_draining(self, event)",
            'self._owner.connection_draining(self, event); self.close("a fault")',
        ),
    ),
    "goaway-and-new-calls": fault(
        "does not listen to GOAWAY",
        ("ClientConnection._received_go_away", "self.state = next_state(self.state, Input.GOAWAY)", "pass"),
        ("ClientProtocol._go_away", "if self.draining:", "if True:"),
    ),
    "goaway-retry-after": fault(
        "reconnects at once after GOAWAY",
        (
            "Endpoints.lost",
            "_rest(health, now + health.backoff.next(retry_after_ms))",
            "pass",
        ),
    ),
    "goaway-and-another-address": fault(
        "waits for a server that goes away, even if there is another",
        (
            "ConnectionManager._connect",
            "delay = endpoints.due_at - loop.time()",
            "delay = max(map(endpoints.rests_until, endpoints._listed), default=0.0) - loop.time()",
        ),
    ),
    "goaway-twice": fault(
        "refuses a second GOAWAY",
        (
            "ClientConnection._received_go_away",
            'reason = goaway.get("reason")',
            'reason = goaway.get("reason") if self.state is State.OPEN else None',
        ),
    ),
    "goaway-then-clean-end": fault(
        "treats a request that did not run like one that may have",
        (
            "ClientProtocol._closed_by_peer",
            "self.unanswered_not_run = self.draining",
            "self.unanswered_not_run = False",
        ),
    ),
    "goaway-then-truncated": fault(
        "treats a request that may have run like one that did not",
        (
            "SessionClient._after_failure",
            _LOST,
            _LOST.replace("connection.unanswered_not_run", "connection.draining"),
        ),
    ),
    "lost-call-without-idempotency-key": fault(
        "retries a lost call", ("SessionClient._after_failure", _LOST, "is_repeatable = True")
    ),
    "lost-call-with-idempotency-key": fault(
        "does not retry a lost call with an idempotency key",
        ("SessionClient._after_failure", _LOST, "is_repeatable = connection.unanswered_not_run"),
    ),
    "reconnect-after-network-failure": fault(
        "treats a truncation as a clean end",
        (
            "ClientProtocol.connection_lost",
            "self._ended(ConnectionClosed(exc.failure))",
            "self._ended(ConnectionClosed(exc.failure, clean=True))",
        ),
    ),
    "reconnect-backoff": fault(
        "always reconnects at once",
        ("Backoff.next", "self._random()", "0.0"),
    ),
    "reconnect-backoff-after-answers": fault(
        "resets its backoff with every connection",
        (
            "Endpoints.lost",
            "now >= self._stable_at",
            "True",
        ),
    ),
    "silent-server-and-another-address": fault(
        "waits for a server that does not answer PING",
        (
            "ConnectionManager.connection_silent",
            "if self._standby is None:",
            "if False:",
        ),
    ),
    "slow-server-and-another-address": fault(
        "leaves a server although it has answered PING",
        (
            "Silence.check",
            "if self._probed_at not in (NEVER, heard_at):",
            "if False:",
        ),
        (
            "Silence.is_silent",
            "self.is_late and heard_at == self._probed_at",
            "self.is_late",
        ),
    ),
    "unavailable": fault("gives up at UNAVAILABLE", then("UNAVAILABLE", "RAISE")),
    "resource-exhausted": fault("gives up at RESOURCE_EXHAUSTED", then("RESOURCE_EXHAUSTED", "RAISE")),
    "retry-after": fault(
        "ignores retry_after_ms",
        ("Attempt.after_error", "0 if is_draining else retry_after_ms(error.details)", "0"),
    ),
    "retry-within-deadline": fault(
        "waits beyond the deadline of a call",
        ("Attempt.wait", "if delay < left", "if True"),
    ),
    "retry-reduces-deadline": fault(
        "sends the whole timeout with each attempt",
        ("SessionClient.call", "meta = _deadline_meta(deadline - now)", "meta = _deadline_meta(timeout)"),
    ),
    "limit-reached": LIMIT_IS_RETRIED,
    "other-errors-are-not-retried": fault(
        "retries all errors", ("what_next", "error.code, Then.RAISE", "error.code, Then.LATER")
    ),
}

_SAME_ONE: Final = (
    '"refresh_token": self.__dict__.setdefault("_first_refresh_token", session.refresh_token_bytes)'
)

SESSIONS: Final[dict[str, Fault]] = {
    "expired-session": fault(
        "opens sessions without a pause",
        ("SessionManager._adopt", "if session.valid_until - now < MIN_REFRESH_INTERVAL:", "if False:"),
    ),
    "expiring-again-and-again": fault(
        "refreshes whenever the server suggests it",
        ("SessionManager._refresh_early", "if now < allowed_at:", "if False:"),
    ),
    "session-open": fault(
        "does not send its name",
        (
            "SessionManager._next_request",
            'return OPEN, {**self.credentials.params(connection), "client": self.client}',
            "return OPEN, self.credentials.params(connection)",
        ),
    ),
    "own-scheme": fault(
        "sends the first login again",
        (
            "SchemeLogin.params",
            "self._holds_until = -math.inf",
            "self._holds_until = math.inf",
        ),
    ),
    "secrets": fault(
        "writes its token to standard error",
        (
            "SessionManager._adopt",
            "self.session, self.is_lost = session, False\n",
            "self.session, self.is_lost = session, print("
            "session.token, file=__import__('sys').stderr, flush=True)\n",
        ),
    ),
    "no-session": fault(
        "sends a made-up token",
        (
            "SessionClient.call",
            "token = sessions.token",
            "token = sessions.token if sessions.session else b'x' * 32",
        ),
    ),
    "wrong-key": fault(
        "retries a refused key",
        (
            "Renewal.after_error",
            "if then is Then.LATER and self.must:",
            "if then in (Then.LATER, Then.RAISE) and self.must:\n            then = Then.LATER",
        ),
    ),
    "too-many-sessions": LIMIT_IS_RETRIED,
    "unknown-token": fault(
        "refreshes a session whose token is unknown",
        ("what_next", "return Then.REPLACE", "return Then.RENEW"),
    ),
    "unknown-token-twice": fault(
        "opens a session after each unknown token of a call", more_than_once("REPLACE")
    ),
    "unknown-token-backoff": fault(
        "opens another session at once",
        ("SessionManager._delay_opening", "now + self._lost_backoff.next()", "now"),
    ),
    "unauthenticated": fault("retries after UNAUTHENTICATED", then("UNAUTHENTICATED", "AT_ONCE")),
    "expired-token": fault("gives up at TOKEN_EXPIRED", then("TOKEN_EXPIRED", "RAISE")),
    "refresh-rotation": fault(
        "always uses its first refresh token",
        ("SessionManager._next_request", '"refresh_token": session.refresh_token_bytes', _SAME_ONE),
    ),
    "refresh-shown-on-each-connection": fault(
        "shows a new token only where it takes new calls",
        ("SessionClient._session_changed", "self._connections.open", "self._connections.extra"),
    ),
    "concurrent-calls-share-one-refresh": fault(
        "refreshes once per call", ("SessionManager.ensure", "if self._renewing is None:", "if True:")
    ),
    "expired-twice": fault(
        "refreshes after each TOKEN_EXPIRED",
        more_than_once("RENEW"),
    ),
    "expired-without-refresh-token": fault(
        "refreshes without a refresh token",
        (
            "SessionManager._next_request",
            "if session is not None and session.can_refresh(now):",
            "if session is not None:",
        ),
    ),
    "expired-refresh-token": fault(
        "gives up when its refresh token has expired",
        (
            "Renewal._instead",
            "return Then.REOPEN if error.code is Code.TOKEN_EXPIRED or",
            "return Then.REOPEN if",
        ),
    ),
    "lost-refresh": fault(
        "gives up after a lost refresh", ("Renewal.after_loss", "self._lost <= MAX_LOST", "False")
    ),
    "refresh-lost-repeatedly": fault(
        "counts the grace of a lost refresh from its last attempt",
        (
            "ClientSession.refresh_lost",
            "min(self._refresh_ends, sent_at + REFRESH_GRACE)",
            "sent_at + REFRESH_GRACE",
        ),
    ),
    "refresh-of-revoked-session": fault(
        "opens a session after a refused refresh",
        (
            "Renewal._instead",
            "if error.code is Code.TOKEN_EXPIRED or error.code in _MAYBE_RUN else None",
            "",
        ),
    ),
    "revoked-token": fault("treats TOKEN_REVOKED like TOKEN_EXPIRED", then("TOKEN_REVOKED", "RENEW")),
    "replaced-session": fault(
        "reconnects after its session was replaced",
        ("Client.open", "is_wanted=lambda: not all(", "is_wanted=lambda: True or all("),
    ),
    "new-session-after-revocation": fault(
        "never opens a second session", ("SessionManager.require", "self._over = None", "pass")
    ),
    "session-revoked-event": fault(
        "treats session.revoked like an expiry",
        ("SessionManager.event_received", "self.present(connection)", "self.expired(event.token)"),
    ),
    "reconnect-with-token": fault(
        "opens a session on each connection",
        (
            "SessionManager.present",
            "self.present_now(connection)",
            "self.session = None; self.token = NO_TOKEN; self._update_validity()",
        ),
    ),
    "reconnect-with-small-frame-first": fault(
        "sends large frames before its token was accepted",
        ("ClientConnection._check_size", "limit = self.send_limit", 'limit = self.welcome["max_frame"]'),
    ),
    "large-frame-without-session": _NO_SEND_LIMIT,
}

DEVICES: Final[dict[str, Fault]] = {
    "device-opens-session": fault(
        "signs without the salt",
        (
            "DeviceKey.params",
            "open_message(channel.salt, channel.leaf, self.name)",
            "open_message(bytes(8), channel.leaf, self.name)",
        ),
    ),
    "device-attaches-session": fault(
        "signs without the server's certificate",
        (
            "DeviceKey.attach_params",
            "attach_message(channel.salt, channel.leaf, token)",
            "attach_message(channel.salt, bytes(32), token)",
        ),
    ),
    "attach-on-demand": fault(
        "gives up when it must attach", ("what_next", "return Then.ATTACH", "return Then.RAISE")
    ),
    "attach-refused-twice": fault(
        "attaches after each refusal",
        more_than_once("ATTACH"),
    ),
    "attach-without-device-key": fault(
        "retries without attaching",
        (
            "SessionManager.attach",
            "        if self._device is None:\n            return False",
            "        if self._device is None:\n            return True",
        ),
    ),
}
