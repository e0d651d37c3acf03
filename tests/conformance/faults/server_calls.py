"""A fault for each scenario about calls from the server."""

from __future__ import annotations

from typing import Final

from tests.conformance.faults.mutation import Fault, fault

_REGISTERED_ONCE: Final = (
    ("Registrar.connected", "= frozenset()", "= self._handlers.names if self._sent else frozenset()"),
    ("Registrar.begin", "names and connection.ready", "names and not any(self._sent.values())"),
    ("Registrar._register", "if not connection.conversation.handles(token):", "if False:"),
)
"""As if each connection had what the first one has."""

SERVER_CALLS: Final[dict[str, Fault]] = {
    "handle": fault(
        "registers the new method alone",
        (
            "Registrar._register",
            "names, token = self._handlers.names, sessions.token",
            "names, token = self._handlers.names - self._sent[connection], sessions.token",
        ),
    ),
    "call": fault(
        "answers without the token of the call",
        ("ClientConnection._answer_call", "call.number, call.token", "call.number, NO_TOKEN"),
    ),
    "call-with-the-number-of-a-request": fault(
        "has one space of numbers for both ends",
        (
            "ClientConnection._received_call",
            "received = calls.receive(",
            'if number in self._in_flight:\n            raise ProtocolError(Code.PROTOCOL_ERROR, "a fault")\n'
            "        received = calls.receive(",
        ),
    ),
    "call-of-an-error": fault(
        "drops the code of an error",
        ("ClientConnection.fail_call", "if code > Code.UNAUTHENTICATED:", "if code != Code.CANCELLED:"),
    ),
    "call-without-a-handler": fault(
        "runs methods that it has not registered",
        ("ClientCalls.receive", "if method not in session.methods:", "if False:"),
    ),
    "call-with-an-unknown-token": fault(
        "runs a call whatever its token",
        (
            "ClientCalls.receive",
            "session = self._by_token.get(token)",
            "session = self._by_token.get(token) or next(iter(self._by_token.values()))",
        ),
    ),
    "call-without-a-deadline": fault(
        "does not require a deadline",
        (
            "ClientCalls.receive",
            "if meta.deadline_ms is None:\n            return _NO_DEADLINE\n        if meta.deadline_ms <= 0:",
            "if meta.deadline_ms is not None and meta.deadline_ms <= 0:",
        ),
    ),
    "call-undecodable": fault(
        "ends the connection at a call that cannot be decoded",
        (
            "ClientCalls.receive",
            "return Refused(Code.INVALID_ARGUMENT, str(error))",
            'raise ProtocolError(Code.PROTOCOL_ERROR, "a fault") from error',
        ),
    ),
    "call-withdrawn": fault(
        "answers a withdrawn call again",
        ("ClientCalls.answer", "if call.state is ClientCallState.NONE:", "if False:"),
        ("ClientCalls.answer", "del self._in_flight[call.number]", "self._in_flight.pop(call.number, None)"),
    ),
    "call-withdrawn-late": fault(
        "drops a stale WITHDRAW",
        (
            "ClientConnection._received_stale",
            "if head in _ON_CALLS:",
            "if head in _ON_CALLS and not WITHDRAW:",
        ),
    ),
    "call-answered-once": fault(
        "answers a WITHDRAW after its answer",
        (
            "ClientConnection._received_call",
            "self.dropped_unknown += 1\n",
            'self.refuse_call(number, token, Refused(Code.CANCELLED, "a fault"), wall)\n',
        ),
    ),
    "call-stale": fault("runs stale calls", ("ClientCalls.receive", "if not is_fresh:", "if False:")),
    "call-on-a-number-in-flight": fault(
        "runs a call on a number in flight",
        ("ClientCalls.receive", "if number in self._in_flight:", "if False:"),
    ),
    "call-without-registration": fault(
        "drops calls before session.handle",
        (
            "ClientConnection._received_call",
            'raise ProtocolError(Code.PROTOCOL_ERROR, "CALL without session.handle")',
            "return None",
        ),
    ),
    "handle-without-calls": fault(
        "registers methods whatever WELCOME announces",
        (
            "Registrar._step",
            'any("calls" in connection.conversation.welcome for connection in self._sent)',
            "True",
        ),
        ("Registrar._register", 'if "calls" not in connection.conversation.welcome:', "if False:"),
        (
            "ClientConnection.handle",
            'if self.state is State.OPEN and "calls" not in self.welcome:',
            "if False:",
        ),
    ),
    "call-result-of-max-frame": fault(
        "does not limit the size of results",
        ("ClientConnection.answer_call", "if MIN_LENGTH + len(body) > self.send_limit:", "if False:"),
    ),
    "calls-at-once": fault(
        "runs any number of calls", ("ClientCalls.receive", "if session.running >= session.max:", "if False:")
    ),
    "handle-after-reconnect": fault(
        "registers its methods once",
        *_REGISTERED_ONCE,
    ),
    "handle-on-further-connections": fault(
        "registers its methods on the main connection alone",
        (
            "Client._extra_connected",
            "each._show_session(connection, is_extra=True)",
            "each._sessions.present(connection)",
        ),
    ),
    "call-after-a-refresh": fault(
        "forgets a registration with the refresh of its session",
        ("ClientCalls.refreshed", "self._by_token[token] = session", "pass"),
    ),
    "call-after-an-expiry": fault(
        "drops all registrations with a refresh",
        (
            "ClientCalls.refreshed",
            "session = self._by_token.pop(",
            "session = self._by_token.clear() or self._by_token.pop(",
        ),
    ),
    "handle-with-an-expired-token": fault(
        "counts a registration that was refused",
        (
            "Registrar._register",
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
        ("ClientProtocol._handle", "self.cancel_calls(event.token)", "pass"),
    ),
    "session-for": fault(
        "chooses the handler by the method alone",
        (
            "ClientCalls.register",
            "session = self._by_token.setdefault(token, HandledSession(receiver))",
            "session = self._by_token.setdefault(\n"
            "            token, next(iter(self._by_token.values()), HandledSession(receiver))\n        )",
        ),
    ),
    "session-for-is-revoked": fault(
        "ends the calls of all sessions with one of them",
        (
            "ClientConnection.cancel_calls",
            "self._calls.end_session(token)",
            "[*self._calls._in_flight.values()]",
        ),
    ),
    "call-during-goaway": fault(
        "closes the connection after GOAWAY while calls run",
        (
            "ClientProtocol._close_if_drained",
            "if self.draining and not self._pending and not self.conversation.running_calls:",
            "if self.draining and not self._pending:",
        ),
    ),
}
