"""A fault for each scenario about calls from the server."""

from __future__ import annotations

from typing import Final

from tests.conformance.faults.mutation import Fault, fault

_PROTOCOL: Final = "zcproto.client.protocol:ClientProtocol"
_REGISTRAR: Final = "zcproto.client.handlers:Registrar"
_REGISTER: Final = f"{_REGISTRAR}._register"
_CONNECTION: Final = "zcproto.connection.client:ClientConnection"
_RECEIVED: Final = f"{_CONNECTION}._received_call"
_OUTPUT: Final = "zcproto.connection.client:ClientConnection"
_CALLS: Final = "zcproto.connection.client_calls:ClientCalls"
_RECEIVE: Final = f"{_CALLS}.receive"

_REGISTERED_ONCE: Final = (
    (f"{_REGISTRAR}.connected", "= frozenset()", "= self._handlers.names if self._sent else frozenset()"),
    (f"{_REGISTRAR}.connected", "and self.begin(connection)", "and False"),
    (_REGISTER, "if not connection.conversation.handles(token):", "if False:"),
)
"""As if each connection had what the first one has."""

SERVER_CALLS: Final[dict[str, Fault]] = {
    "handle": fault(
        "registers the new method alone",
        (
            _REGISTER,
            "names, token = self._handlers.names, sessions.token",
            "names, token = self._handlers.names - self._sent[connection], sessions.token",
        ),
    ),
    "call": fault(
        "answers without the token of the call",
        (f"{_OUTPUT}._answer_call", "call.number, call.token", "call.number, NO_TOKEN"),
    ),
    "call-with-the-number-of-a-request": fault(
        "has one space of numbers for both ends",
        (
            _RECEIVED,
            "received = calls.receive(",
            'if number in self._in_flight:\n            raise ProtocolError(Code.PROTOCOL_ERROR, "a fault")\n'
            "        received = calls.receive(",
        ),
    ),
    "call-of-an-error": fault(
        "drops the code of an error",
        (f"{_OUTPUT}.fail_call", "if code > Code.UNAUTHENTICATED:", "if code != Code.CANCELLED:"),
    ),
    "call-without-a-handler": fault(
        "runs methods that it has not registered",
        (_RECEIVE, "if method not in session.methods:", "if False:"),
    ),
    "call-with-an-unknown-token": fault(
        "runs a call whatever its token",
        (
            _RECEIVE,
            "session = self._by_token.get(token)",
            "session = self._by_token.get(token) or next(iter(self._by_token.values()))",
        ),
    ),
    "call-without-a-deadline": fault(
        "does not require a deadline",
        (
            _RECEIVE,
            "if meta.deadline_ms is None:\n            return _NO_DEADLINE\n        if meta.deadline_ms <= 0:",
            "if meta.deadline_ms is not None and meta.deadline_ms <= 0:",
        ),
    ),
    "call-undecodable": fault(
        "ends the connection at a call that cannot be decoded",
        (
            _RECEIVE,
            "return Refused(Code.INVALID_ARGUMENT, str(error))",
            'raise ProtocolError(Code.PROTOCOL_ERROR, "a fault") from error',
        ),
    ),
    "call-withdrawn": fault(
        "answers a withdrawn call again",
        (f"{_CALLS}.answer", "if call.state is ClientCallState.NONE:", "if False:"),
        (f"{_CALLS}.answer", "del self._in_flight[call.number]", "self._in_flight.pop(call.number, None)"),
    ),
    "call-withdrawn-late": fault(
        "drops a stale WITHDRAW",
        (
            f"{_CONNECTION}._received_stale",
            "if head in _ON_CALLS:",
            "if head in _ON_CALLS and not WITHDRAW:",
        ),
    ),
    "call-answered-once": fault(
        "answers a WITHDRAW after its answer",
        (
            _RECEIVED,
            "self.dropped_unknown += 1\n",
            'self.refuse_call(number, token, Refused(Code.CANCELLED, "a fault"), wall)\n',
        ),
    ),
    "call-stale": fault("runs stale calls", (_RECEIVE, "if not is_fresh:", "if False:")),
    "call-on-a-number-in-flight": fault(
        "runs a call on a number in flight", (_RECEIVE, "if number in self._in_flight:", "if False:")
    ),
    "call-without-registration": fault(
        "drops calls before session.handle",
        (
            _RECEIVED,
            'raise ProtocolError(Code.PROTOCOL_ERROR, "CALL without session.handle")',
            "return None",
        ),
    ),
    "handle-without-calls": fault(
        "registers methods whatever WELCOME announces",
        (
            f"{_REGISTRAR}._step",
            'any("calls" in connection.conversation.welcome for connection in self._sent)',
            "True",
        ),
        (_REGISTER, 'if "calls" not in connection.conversation.welcome:', "if False:"),
        (f"{_OUTPUT}.handle", 'if self.state is State.OPEN and "calls" not in self.welcome:', "if False:"),
    ),
    "call-result-of-max-frame": fault(
        "does not limit the size of results",
        (f"{_OUTPUT}.answer_call", "if MIN_LENGTH + len(body) > self.send_limit:", "if False:"),
    ),
    "calls-at-once": fault(
        "runs any number of calls", (_RECEIVE, "if session.running >= session.max:", "if False:")
    ),
    "handle-after-reconnect": fault(
        "registers its methods once",
        *_REGISTERED_ONCE,
    ),
    "handle-on-further-connections": fault(
        "registers its methods on the main connection alone",
        (
            "zcproto.client.client:Client._extra_connected",
            "each._show_session(connection, is_extra=True)",
            "each._sessions.present(connection)",
        ),
    ),
    "call-after-a-refresh": fault(
        "forgets a registration with the refresh of its session",
        (f"{_CALLS}.refreshed", "self._by_token[token] = session", "pass"),
    ),
    "call-after-an-expiry": fault(
        "drops all registrations with a refresh",
        (
            f"{_CALLS}.refreshed",
            "session = self._by_token.pop(",
            "session = self._by_token.clear() or self._by_token.pop(",
        ),
    ),
    "handle-with-an-expired-token": fault(
        "counts a registration that was refused",
        (
            _REGISTER,
            "return await self._after_error(error, connection, token)",
            "self._sessions.refused(token, error)",
        ),
    ),
    "handle-after-a-lost-refresh": fault(
        "registers on the first connection alone",
        *_REGISTERED_ONCE,
    ),
    "calls-of-a-revoked-session": fault(
        "runs the handlers of a session on that has ended",
        (f"{_PROTOCOL}._handle", "self.cancel_calls(event.token)", "pass"),
    ),
    "session-for": fault(
        "chooses the handler by the method alone",
        (
            f"{_CALLS}.register",
            "session = self._by_token.setdefault(token, HandledSession(receiver))",
            "session = self._by_token.setdefault(\n"
            "            token, next(iter(self._by_token.values()), HandledSession(receiver))\n        )",
        ),
    ),
    "session-for-is-revoked": fault(
        "ends the calls of all sessions with one of them",
        (f"{_OUTPUT}.cancel_calls", "self._calls.end_session(token)", "[*self._calls._in_flight.values()]"),
    ),
    "call-during-goaway": fault(
        "closes the connection after GOAWAY while calls run",
        (
            f"{_PROTOCOL}._close_if_drained",
            "if self.draining and not self._pending and not self.conversation.running_calls:",
            "if self.draining and not self._pending:",
        ),
    ),
}
