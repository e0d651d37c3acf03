"""A fault for each scenario about calls, retries, sessions and devices."""

from __future__ import annotations

from typing import Final

from tests.conformance.faults.mutation import Fault, fault

_CLIENT: Final = "zcproto.client.client:SessionClient"
_ATTEMPT: Final = "zcproto.client.retry:Attempt"
_RENEWAL: Final = "zcproto.client.retry:Renewal"
_PUMP: Final = "zcproto.client.protocol:ClientProtocol"
_CONNECTION: Final = "zcproto.connection.client:ClientConnection"
_RESPONSE: Final = f"{_CONNECTION}._received_response"
_RECEIVE: Final = f"{_CONNECTION}._receive"
_ENDPOINTS: Final = "zcproto.client.endpoints:Endpoints"
_MANAGER: Final = "zcproto.client.session:SessionManager"
_CREDENTIALS: Final = "zcproto.client.credentials"
_WHAT_NEXT: Final = "zcproto.client.retry:what_next"
_BY_CODE: Final = "return _BY_CODE.get(error.code, Then.RAISE)"
_FROM_WIRE: Final = "zcproto.errors:CallError.from_wire"
_MESSAGE: Final = "zcproto.wire.message"
_DECODE: Final = f"{_MESSAGE}:decode_body"
_UNPACK: Final = "value = unpack(body) if is_checked else unpack(body, max_ext_len=0, ext_hook=_refuse_ext)"
_NESTED: Final = f"{_MESSAGE}:_check_nested"
_KEY: Final = "if key.__class__ is not str:"
_DEEP: Final = "_check_nested([value], max_depth)"
SEND_CANCEL: Final = 'self._send(CANCEL, stream, token or NO_TOKEN, b"", wall)'


def then(code: str, then: str) -> tuple[str, str, str]:
    """Change what the client does after an error with this code."""
    return _WHAT_NEXT, _BY_CODE, f"return Then.{then} if error.code is Code.{code} else {_BY_CODE[7:]}"


def more_than_once(then: str) -> tuple[str, str, str]:
    """Take a step as often as its error occurs."""
    return f"{_ATTEMPT}.after_error", "self.once(then)", f"(then is Then.{then} or self.once(then))"


_INVALID_RESPONSE_IS_FATAL: Final = fault(
    "ends the connection after an invalid response",
    (
        _RESPONSE,
        'return ErrorReceived(stream, Code.INTERNAL, f"the answer cannot be read: {error}", {})',
        'raise ProtocolError(Code.PROTOCOL_ERROR, "a fault") from error',
    ),
)
_UNKNOWN_RESPONSE_IS_FATAL: Final = fault(
    "ends the connection after a response on an unknown stream",
    (
        _RESPONSE,
        "self.dropped_unknown += 1",
        'raise ProtocolError(Code.PROTOCOL_ERROR, "a fault")',
    ),
)
_NO_SEND_LIMIT: Final = fault(
    "does not limit the size of sent frames",
    (f"{_CONNECTION}._check_size", "if size > limit:", "if False:"),
)
LIMIT_IS_RETRIED: Final = fault(
    "retries after an error with a limit",
    (_WHAT_NEXT, 'if error.code is Code.RESOURCE_EXHAUSTED and "limit" in error.details:', "if False:"),
)

CALLS: Final[dict[str, Fault]] = {
    "responses-out-of-order": fault(
        "matches responses by their order",
        (
            f"{_PUMP}.data_received",
            "call = pending.pop(stream, None)",
            "call = pending.pop(next(iter(pending)), None)",
        ),
        (
            f"{_PUMP}._receive_others",
            "call = pending.pop(event.stream, None)",
            "call = pending.pop(next(iter(pending)), None)",
        ),
    ),
    "response-on-unknown-stream": _UNKNOWN_RESPONSE_IS_FATAL,
    "duplicate-response": _UNKNOWN_RESPONSE_IS_FATAL,
    "error-codes": fault(
        "drops details", (_FROM_WIRE, "return kind(message, details)", "return kind(message)")
    ),
    "error-without-details": fault(
        "requires details", (f"{_MESSAGE}:decode_error", "not 2 <= len(value) <= 3", "len(value) != 3")
    ),
    "unknown-code": fault(
        "fails at an unknown code",
        (_FROM_WIRE, "kind = cls.by_code.get(code)", "kind = cls.by_code[code]"),
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
        (f"{_MESSAGE}:encode_body", "return _pack(value)", "return msgpack.packb(value, use_bin_type=False)"),
    ),
    "call-without-params": fault(
        "sends an empty array instead of no params",
        (
            "zcproto.connection.client:ClientConnection.request",
            "encode_body([method, params, meta] if meta else [method, params])",
            "encode_body([method, params or [], meta or {}])",
        ),
    ),
    "deadline-is-sent": fault(
        "does not send the deadline",
        (
            "zcproto.client.client:_deadline_meta",
            'return {"deadline_ms"',
            'return {} and {"deadline_ms"',
        ),
    ),
    "deadline-at-the-client": fault(
        "does not enforce deadlines",
        (
            "zcproto.client.protocol:ClientProtocol._check_calls",
            "if not call.done():",
            "if False:",
        ),
    ),
    "cancel": fault(
        "sends CANCEL without its request's token",
        (f"{_CONNECTION}.cancel", SEND_CANCEL, 'self._send(CANCEL, stream, NO_TOKEN, b"", wall)'),
    ),
    "cancelled-call-stays-in-flight": fault(
        "frees the stream of a cancelled request at once",
        (f"{_CONNECTION}.cancel", SEND_CANCEL, f"{SEND_CANCEL}; self.in_flight.pop(stream)"),
        (f"{_PUMP}.abandon", "self._flush_soon()", "self._flush_soon(); self.update_ready()"),
    ),
    "traceparent-is-sent": fault(
        "does not send traceparent",
        ("zcproto.client.client:_meta", 'more["traceparent"] = traceparent', "pass"),
    ),
    "request-above-max-frame": _NO_SEND_LIMIT,
    "ping-is-answered": fault(
        "does not answer PING",
        (_RECEIVE, "self._owes_pong = token", "pass"),
    ),
    "ping-flood": fault(
        "answers each PING at once",
        (
            _RECEIVE,
            "self._owes_pong = token",
            'self._send(PONG, 0, token, b"", wall)',
        ),
    ),
    "message-with-control-characters": fault(
        "passes on messages as they are",
        (f"{_PUMP}._handle", "escape_text(event.message, MESSAGE_SHOWN)", "event.message"),
    ),
    "keepalive": fault("sends no PING", (f"{_CONNECTION}.handle_timeout", "self.ping(wall)", "pass")),
    "unknown-event": fault(
        "ends a connection for an event that it does not know",
        (
            _RECEIVE,
            "return EventReceived(name, data, token, body)",
            'raise ProtocolError(Code.PROTOCOL_ERROR, "a fault")',
        ),
    ),
    "events-are-delivered": fault(
        "loses the data of events",
        (
            "zcproto.client.handlers:EventStream.__anext__",
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
            f"{_PUMP}._go_away",
            "self._owner.connection_draining(self, event)",
            'self._owner.connection_draining(self, event); self.close("a fault")',
        ),
    ),
    "goaway-and-new-calls": fault(
        "does not listen to GOAWAY",
        (f"{_CONNECTION}._received_go_away", "self.state = next_state(self.state, Input.GOAWAY)", "pass"),
        (f"{_PUMP}._go_away", "if self.draining:", "if True:"),
    ),
    "goaway-retry-after": fault(
        "reconnects at once after GOAWAY",
        (
            f"{_ENDPOINTS}.lost",
            "_rest(health, now + health.backoff.next(retry_after_ms))",
            "pass",
        ),
    ),
    "goaway-and-another-address": fault(
        "waits for a server that goes away, even if there is another",
        (
            "zcproto.client.connections:ConnectionManager._connect",
            "delay = endpoints.due_at - loop.time()",
            "delay = max(map(endpoints.rests_until, endpoints._listed), default=0.0) - loop.time()",
        ),
    ),
    "goaway-twice": fault(
        "refuses a second GOAWAY",
        (
            f"{_CONNECTION}._received_go_away",
            'reason = goaway.get("reason")',
            'reason = goaway.get("reason") if self.state is State.OPEN else None',
        ),
    ),
    "goaway-then-clean-end": fault(
        "treats a request that did not run like one that may have",
        (
            f"{_PUMP}._closed_by_peer",
            "self.unanswered_not_run = self.draining",
            "self.unanswered_not_run = False",
        ),
    ),
    "goaway-then-truncated": fault(
        "treats a request that may have run like one that did not",
        (
            f"{_CLIENT}._after_failure",
            _LOST,
            _LOST.replace("connection.unanswered_not_run", "connection.draining"),
        ),
    ),
    "lost-call-without-idempotency-key": fault(
        "retries a lost call", (f"{_CLIENT}._after_failure", _LOST, "is_repeatable = True")
    ),
    "lost-call-with-idempotency-key": fault(
        "does not retry a lost call with an idempotency key",
        (f"{_CLIENT}._after_failure", _LOST, "is_repeatable = connection.unanswered_not_run"),
    ),
    "reconnect-after-network-failure": fault(
        "treats a truncation as a clean end",
        (
            f"{_PUMP}.connection_lost",
            "self._ended(ConnectionClosed(exc.failure))",
            "self._ended(ConnectionClosed(exc.failure, clean=True))",
        ),
    ),
    "reconnect-backoff": fault(
        "always reconnects at once",
        ("zcproto.client.retry:Backoff.next", "self._random()", "0.0"),
    ),
    "reconnect-backoff-after-answers": fault(
        "resets its backoff with every connection",
        (
            f"{_ENDPOINTS}.lost",
            "now >= self._stable_at",
            "True",
        ),
    ),
    "silent-server-and-another-address": fault(
        "waits for a server that does not answer PING",
        (
            "zcproto.client.connections:ConnectionManager.connection_silent",
            "if self._standby is None:",
            "if False:",
        ),
    ),
    "slow-server-and-another-address": fault(
        "leaves a server although it has answered PING",
        (
            "zcproto.connection.silence:Silence.check",
            "if self._probed_at not in (NEVER, heard_at):",
            "if False:",
        ),
        (
            "zcproto.connection.silence:Silence.is_silent",
            "self.is_late and heard_at == self._probed_at",
            "self.is_late",
        ),
    ),
    "unavailable": fault("gives up at UNAVAILABLE", then("UNAVAILABLE", "RAISE")),
    "resource-exhausted": fault("gives up at RESOURCE_EXHAUSTED", then("RESOURCE_EXHAUSTED", "RAISE")),
    "retry-after": fault(
        "ignores retry_after_ms",
        (f"{_ATTEMPT}.after_error", "0 if is_draining else retry_after_ms(error.details)", "0"),
    ),
    "retry-within-deadline": fault(
        "waits beyond the deadline of a call",
        (f"{_ATTEMPT}.wait", "if delay < left", "if True"),
    ),
    "retry-reduces-deadline": fault(
        "sends the whole timeout with each attempt",
        (f"{_CLIENT}.call", "meta = _deadline_meta(deadline - now)", "meta = _deadline_meta(timeout)"),
    ),
    "limit-reached": LIMIT_IS_RETRIED,
    "other-errors-are-not-retried": fault(
        "retries all errors", (_WHAT_NEXT, "error.code, Then.RAISE", "error.code, Then.LATER")
    ),
}

_SAME_ONE: Final = (
    '"refresh_token": self.__dict__.setdefault("_first_refresh_token", session.refresh_token_bytes)'
)

SESSIONS: Final[dict[str, Fault]] = {
    "expired-session": fault(
        "opens sessions without a pause",
        (f"{_MANAGER}._adopt", "if session.valid_until - now < MIN_REFRESH_INTERVAL:", "if False:"),
    ),
    "expiring-again-and-again": fault(
        "refreshes whenever the server suggests it",
        (f"{_MANAGER}._refresh_early", "if now < allowed_at:", "if False:"),
    ),
    "session-open": fault(
        "does not send its name",
        (
            f"{_MANAGER}._next_request",
            'return OPEN, {**self.credentials.params(connection), "client": self.client}',
            "return OPEN, self.credentials.params(connection)",
        ),
    ),
    "own-scheme": fault(
        "sends the first login again",
        (
            f"{_CREDENTIALS}:SchemeLogin.params",
            "self._holds_until = -math.inf",
            "self._holds_until = math.inf",
        ),
    ),
    "secrets": fault(
        "writes its token to standard error",
        (
            f"{_MANAGER}._adopt",
            "self.session, self.is_lost = session, False\n",
            "self.session, self.is_lost = session, print("
            "session.token, file=__import__('sys').stderr, flush=True)\n",
        ),
    ),
    "no-session": fault(
        "sends a made-up token",
        (
            f"{_CLIENT}.call",
            "token = sessions.token",
            "token = sessions.token if sessions.session else b'x' * 32",
        ),
    ),
    "wrong-key": fault(
        "retries a refused key",
        (
            f"{_RENEWAL}.after_error",
            "if then is Then.LATER and self.must:",
            "if then in (Then.LATER, Then.RAISE) and self.must:\n            then = Then.LATER",
        ),
    ),
    "too-many-sessions": LIMIT_IS_RETRIED,
    "unknown-token": fault(
        "refreshes a session whose token is unknown", (_WHAT_NEXT, "return Then.REPLACE", "return Then.RENEW")
    ),
    "unknown-token-twice": fault(
        "opens a session after each unknown token of a call", more_than_once("REPLACE")
    ),
    "unknown-token-backoff": fault(
        "opens another session at once",
        (f"{_MANAGER}._delay_opening", "now + self._lost_backoff.next()", "now"),
    ),
    "unauthenticated": fault("retries after UNAUTHENTICATED", then("UNAUTHENTICATED", "AT_ONCE")),
    "expired-token": fault("gives up at TOKEN_EXPIRED", then("TOKEN_EXPIRED", "RAISE")),
    "refresh-rotation": fault(
        "always uses its first refresh token",
        (f"{_MANAGER}._next_request", '"refresh_token": session.refresh_token_bytes', _SAME_ONE),
    ),
    "refresh-shown-on-each-connection": fault(
        "shows a new token only where it takes new calls",
        (f"{_CLIENT}._session_changed", "self._connections.open", "self._connections.extra"),
    ),
    "concurrent-calls-share-one-refresh": fault(
        "refreshes once per call", (f"{_MANAGER}.ensure", "if self._renewing is None:", "if True:")
    ),
    "expired-twice": fault(
        "refreshes after each TOKEN_EXPIRED",
        more_than_once("RENEW"),
    ),
    "expired-without-refresh-token": fault(
        "refreshes without a refresh token",
        (
            f"{_MANAGER}._next_request",
            "if session is not None and session.can_refresh(now):",
            "if session is not None:",
        ),
    ),
    "expired-refresh-token": fault(
        "gives up when its refresh token has expired",
        (
            f"{_RENEWAL}._instead",
            "return Then.REOPEN if error.code is Code.TOKEN_EXPIRED or",
            "return Then.REOPEN if",
        ),
    ),
    "lost-refresh": fault(
        "gives up after a lost refresh", (f"{_RENEWAL}.after_loss", "self._lost <= MAX_LOST", "False")
    ),
    "refresh-lost-repeatedly": fault(
        "counts the grace of a lost refresh from its last attempt",
        (
            "zcproto.client.session:ClientSession.refresh_lost",
            "min(self._refresh_ends, sent_at + REFRESH_GRACE)",
            "sent_at + REFRESH_GRACE",
        ),
    ),
    "refresh-of-revoked-session": fault(
        "opens a session after a refused refresh",
        (
            f"{_RENEWAL}._instead",
            "if error.code is Code.TOKEN_EXPIRED or error.code in _MAYBE_RUN else None",
            "",
        ),
    ),
    "revoked-token": fault("treats TOKEN_REVOKED like TOKEN_EXPIRED", then("TOKEN_REVOKED", "RENEW")),
    "replaced-session": fault(
        "reconnects after its session was replaced",
        ("zcproto.client.client:Client.open", "is_wanted=lambda: not all(", "is_wanted=lambda: True or all("),
    ),
    "new-session-after-revocation": fault(
        "never opens a second session", (f"{_MANAGER}.require", "self._over = None", "pass")
    ),
    "session-revoked-event": fault(
        "treats session.revoked like an expiry",
        (f"{_MANAGER}.event_received", "self.present(connection)", "self.expired(event.token)"),
    ),
    "reconnect-with-token": fault(
        "opens a session on each connection",
        (
            f"{_MANAGER}.present",
            "self.present_now(connection)",
            "self.session = None; self.token = NO_TOKEN; self._update_validity()",
        ),
    ),
    "reconnect-with-small-frame-first": fault(
        "sends large frames before its token was accepted",
        (f"{_CONNECTION}._check_size", "limit = self.send_limit", 'limit = self.welcome["max_frame"]'),
    ),
    "large-frame-without-session": _NO_SEND_LIMIT,
}

DEVICES: Final[dict[str, Fault]] = {
    "device-opens-session": fault(
        "signs without the salt",
        (
            f"{_CREDENTIALS}:DeviceKey.params",
            "open_message(channel.salt, channel.leaf, self.name)",
            "open_message(bytes(8), channel.leaf, self.name)",
        ),
    ),
    "device-attaches-session": fault(
        "signs without the server's certificate",
        (
            f"{_CREDENTIALS}:DeviceKey.attach_params",
            "attach_message(channel.salt, channel.leaf, token)",
            "attach_message(channel.salt, bytes(32), token)",
        ),
    ),
    "attach-on-demand": fault(
        "gives up when it must attach", (_WHAT_NEXT, "return Then.ATTACH", "return Then.RAISE")
    ),
    "attach-refused-twice": fault(
        "attaches after each refusal",
        more_than_once("ATTACH"),
    ),
    "attach-without-device-key": fault(
        "retries without attaching",
        (
            f"{_MANAGER}.attach",
            "        if self._device is None:\n            return False",
            "        if self._device is None:\n            return True",
        ),
    ),
}
