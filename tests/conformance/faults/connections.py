"""A fault for each scenario about TLS, WELCOME, framing and freshness."""

from __future__ import annotations

from typing import Final

from tests.conformance.faults.mutation import Fault, fault

_ALPN: Final = "    context.set_alpn_protocols(list(protocols))\n"
_JUDGE_ALPN: Final = "if self._tls.selected_alpn_protocol() != ALPN:"
_HEAD_KIND: Final = "if bare_head not in accepted.heads:"
_HEAD_STREAM: Final = "if (bare_head in ON_A_STREAM) != (stream != 0):"
_NONCE: Final = "if salt != self.salt or counter <= self._last_counter:"
_STALE: Final = "if not (is_fresh or self._corrects_clock(head, body)):"
_LOST: Final = "self._ended(ConnectionClosed(exc.failure))"

_SAVED_WELCOME: Final = (
    "return dict(server='', versions=[1], max_frame=16384, max_streams=1, idle_timeout_ms=0, tolerance_ms=1,"
    " sts=dict(max_age=0, include_subdomains=False))"
)

_SOME_PINS: Final = (
    "pins=frozenset() if id(self) in globals().setdefault('_dialled', set())"
    " else globals()['_dialled'].add(id(self)) or self._trust.pins,"
)
_ONE_PIN: Final = fault(
    "uses only one pin", ("parse_pins", "parsed = frozenset(pins)", "parsed = frozenset(list(pins)[:1])")
)
_NO_LENGTH_LIMIT: Final = fault(
    "does not limit the length", ("check_length", "if length > limit:", "if False:")
)
_NO_CLOSE_NOTIFY: Final = fault(
    "closes without close_notify",
    ("ClientProtocol.close", "self._transport.close()", "self._transport.abort()"),
)

TRUST: Final[dict[str, Fault]] = {
    "client-hello": fault(
        "offers no ALPN",
        ("client_context", _ALPN, "\n"),
        ("TlsClientTransport._judge", _JUDGE_ALPN, "if False:"),
    ),
    "wrong-ca": fault(
        "does not verify certificates", ("client_context", "    if not verify:\n", "    if True:\n")
    ),
    "wrong-name": fault(
        "does not verify the name", ("client_context", _ALPN, f"{_ALPN}    context.check_hostname = False\n")
    ),
    "expired-certificate": fault(
        "does not verify the validity period (X509_V_FLAG_NO_CHECK_TIME)",
        ("client_context", _ALPN, f"{_ALPN}    context.verify_flags |= 0x200000\n"),
    ),
    "tls-1.2": fault(
        "accepts TLS 1.2",
        ("_restrict", "context.minimum_version = ssl.TLSVersion.TLSv1_3", "pass"),
        (
            "_restrict",
            "context.maximum_version = ssl.TLSVersion.TLSv1_3",
            "context.minimum_version = ssl.TLSVersion.TLSv1_2",
        ),
        ("suites_are_allowed", 'tls.version() == "TLSv1.3" and', ""),
        ("suites_are_allowed", "cipher[0] in SUITES", "True"),
    ),
    "other-suite": fault(
        "accepts any suite",
        ("suites_are_allowed", "cipher[0] in SUITES", "True"),
    ),
    "other-group": fault(
        "treats every alert as one that may pass",
        ("TlsClientTransport._fail_for", "failure = failure_of(error)", "failure = TlsFailure.PEER_ALERT"),
    ),
    "no-alpn": fault("does not check ALPN", ("TlsClientTransport._judge", _JUDGE_ALPN, "if False:")),
    "no-tls": fault(
        "treats a server without TLS like one that is down",
        (
            "Endpoints.failure",
            "return permanent or (None if is_starting else next(others, self.last_error))",
            "return None",
        ),
    ),
    "pin": fault(
        "ignores pins without a CA",
        (
            "Trust.__init__",
            "options.system_store or not (self.ca_file or self.pins)",
            "options.system_store or not self.ca_file",
        ),
    ),
    "wrong-pin": fault("ignores pins", ("TlsClientTransport._judge", "if not connector.pins:", "if True:")),
    "backup-pin": _ONE_PIN,
    "wrong-pin-with-ca": fault(
        "ignores pins if it has a CA",
        (
            "TlsClientTransport._judge",
            "if not connector.pins:",
            "if not connector.pins or connector.context.verify_mode is ssl.CERT_REQUIRED:",
        ),
    ),
    "pin-with-wrong-ca": fault(
        "ignores the CA if it has a pin",
        (
            "Trust.context",
            "verify=self._by_ca,",
            "verify=not self.pins and self._by_ca,",
        ),
    ),
    "pin-checked-on-reconnect": fault(
        "checks pins on the first connection only", ("Dialer.__call__", "pins=self._trust.pins,", _SOME_PINS)
    ),
    "pins-next-event": fault(
        "trusts the pins that a server announces",
        (
            "SessionClient._receive_event",
            "if self._options.on_event is not None:",
            "self._dial._trust.pins |= frozenset(event.data['pins'])\n"
            "        if self._options.on_event is not None:",
        ),
    ),
    "key-rollover-with-next-pin": _ONE_PIN,
    "sts-policy": fault(
        "ignores policies",
        (
            "Dialer._require_verification",
            "if not self._trust.verify and self._known_hosts is not None:",
            "if False:",
        ),
    ),
    "sts-policy-for-subdomains": fault(
        "applies a policy to one name only",
        ("KnownHosts.require", "for start in range(len(labels)):", "for start in range(1):"),
    ),
    "sts-policy-with-another-name": fault(
        "looks for the policy of the verified name only",
        (
            "Dialer._require_verification",
            "for name in {host, self._hostname(host)}:",
            "for name in {self._hostname(host)}:",
        ),
    ),
    "sts-policy-removed": fault(
        "never removes a policy", ("KnownHosts.learn", "hosts.pop(host, None)", "pass")
    ),
    "sts-policy-from-unverified-server": fault(
        "stores policies of unverified servers",
        (
            "Dialer._remember",
            "if not self._trust.verify or",
            "if",
        ),
    ),
}

WELCOME: Final[dict[str, Fault]] = {
    "welcome-is-awaited": fault(
        "sends PING right after the TLS handshake",
        (
            "ClientProtocol.connection_made",
            'self._transport = cast("asyncio.Transport", transport)',
            'self._transport = transport; transport.write(b"\\0\\0\\0\\x40\\x01\\x06" + bytes(62))',
        ),
    ),
    "welcome-byte-by-byte": fault(
        "drops the beginning of a frame with a complete header",
        ("FrameDecoder.frames", "self._keep(at, end - size)", "self._data = b''; self._at = 0"),
    ),
    "welcome-with-unknown-keys": fault(
        "refuses unknown keys",
        (
            "read_welcome",
            'sts = welcome["sts"]',
            'sts = welcome["sts"] if len(welcome) == len(_TYPES) else {}',
        ),
    ),
    "welcome-followed-by-frame": fault(
        "drops frames after WELCOME in the same read",
        (
            "ClientConnection.receive_data",
            "if event is not None:\n                    yield event",
            "yield event\n                return",
        ),
    ),
    "welcome-without-version-1": fault(
        "does not check versions",
        (
            "read_welcome",
            'if not any(version.__class__ is int and version == VERSION for version in welcome["versions"]):',
            "if False:",
        ),
    ),
    "welcome-without-required-key": fault(
        "uses defaults for missing keys",
        (
            "read_welcome",
            "if welcome.get(key).__class__ is not wanted:",
            "if welcome.setdefault(key, 128).__class__ is not wanted:",
        ),
    ),
    "welcome-with-wrong-type": fault(
        "does not check types",
        ("read_welcome", "if welcome.get(key).__class__ is not wanted:", "if key not in welcome:"),
        ("read_welcome", "if welcome[key] < least:", "if int(welcome[key]) < least:"),
    ),
    "welcome-not-first": fault(
        "ignores frames before WELCOME",
        (
            "ClientConnection._received_welcome",
            'raise ProtocolError(Code.PROTOCOL_ERROR, "the first frame is not WELCOME")',
            'return EventReceived("ignored", None, b"", b"")',
        ),
    ),
    "welcome-with-nonzero-counter": fault(
        "accepts WELCOME with any counter",
        ("ClientConnection._received_welcome", "if counter != 0:", "if False:"),
    ),
    "welcome-twice": fault(
        "ignores a second WELCOME",
        (
            "ClientConnection._receive",
            'raise ProtocolError(Code.PROTOCOL_ERROR, "WELCOME came twice")',
            "return None",
        ),
    ),
    "welcome-unparsable": fault(
        "uses defaults for an invalid WELCOME",
        (
            "read_welcome",
            'raise ProtocolError(Code.PROTOCOL_ERROR, f"WELCOME cannot be read: {error}") from error',
            _SAVED_WELCOME,
        ),
    ),
    "welcome-too-large": _NO_LENGTH_LIMIT,
    "welcome-never-sent": fault(
        "waits for WELCOME forever",
        (
            "Dialer._connect",
            "async with asyncio.timeout(self._connect_timeout):",
            "async with asyncio.timeout(None):",
        ),
    ),
    "max-streams": fault(
        "ignores max_streams",
        ("ClientProtocol._handle", 'event.settings["max_streams"]', "128"),
        ("ClientConnection.request", 'if len(in_flight) >= self.welcome["max_streams"]:', "if False:"),
    ),
}


def _reported_as_clean(how: str) -> Fault:
    return fault(
        f"reports {how} as a clean end",
        (
            "ClientProtocol.connection_lost",
            _LOST,
            f'self._ended(ConnectionClosed(exc.failure, clean=exc.failure == "{how}"))',
        ),
    )


FRAMING: Final[dict[str, Fault]] = {
    "response-byte-by-byte": fault(
        "drops a partial length field",
        (
            "FrameDecoder._keep_header",
            "self._keep(at, LENGTH_SIZE - available)",
            "self._data = b''; self._at = 0",
        ),
    ),
    "response-in-two-pieces": fault(
        "drops a partial header",
        (
            "FrameDecoder._keep_header",
            "self._keep(at, HEADER_SIZE - available)",
            "self._data = b''; self._at = 0",
        ),
    ),
    "responses-in-one-read": fault(
        "handles one response per read",
        (
            "ClientConnection.receive_data",
            "yield event",
            "yield event\n                if event.__class__ is ResponseReceived:\n                    return",
        ),
    ),
    "response-of-a-megabyte": fault(
        "keeps the limit from before WELCOME",
        ("ClientConnection._received_welcome", "self._decoder.limit = self.max_frame", "pass"),
    ),
    "length-below-64": fault(
        "does not check the minimum length", ("check_length", "if length < MIN_LENGTH:", "if False:")
    ),
    "length-above-limit": _NO_LENGTH_LIMIT,
    "version-2": fault(
        "does not check the version",
        ("check_head", "if head >> 24 != VERSION:", "if False:"),
        ("check_head", "bare_head = head & 0xFFFF0000", "bare_head = VERSION << 24 | head & 0xFF0000"),
    ),
    "flag-set": fault("does not check flags", ("check_head", "if head & 0xFFFF:", "if False:")),
    "reserved-kind": fault(
        "ignores reserved kinds",
        ("check_head", _HEAD_KIND, "if bare_head not in accepted.heads and bare_head < head_of(0x10):"),
    ),
    "kind-of-client": fault(
        "ignores a kind that only clients may send",
        ("check_head", _HEAD_KIND, "if bare_head not in accepted.heads and bare_head != CANCEL:"),
    ),
    "response-on-stream-0": fault(
        "ignores a response on stream 0",
        ("check_head", _HEAD_STREAM, f"{_HEAD_STREAM[:-1]} and bare_head != RESPONSE:"),
    ),
    "event-on-nonzero-stream": fault(
        "accepts an event on any stream",
        ("check_head", _HEAD_STREAM, f"{_HEAD_STREAM[:-1]} and bare_head != EVENT:"),
    ),
    "ping-with-body": fault(
        "ignores the body of PING", ("ClientConnection._receive", "        if body:\n", "        if False:\n")
    ),
    "event-unparsable": fault(
        "ignores an invalid event",
        (
            "ClientConnection._receive",
            'raise ProtocolError(Code.PROTOCOL_ERROR, f"EVENT cannot be read: {error}") from error',
            "return None",
        ),
    ),
    "goaway-without-required-key": fault(
        "uses defaults for missing keys of GOAWAY",
        (
            "ClientConnection._received_go_away",
            'raise ProtocolError(Code.PROTOCOL_ERROR, "GOAWAY must have a reason and retry_after_ms")',
            "retry_after_ms = 0",
        ),
    ),
    "fatal-error": fault(
        "continues after ERROR on stream 0",
        ("ClientConnection._received_error", "raise ProtocolError(_code_of(code), message)", "return None"),
    ),
    "fatal-error-unparsable": fault(
        "ignores an invalid ERROR on stream 0",
        (
            "ClientConnection._received_error",
            'raise ProtocolError(Code.PROTOCOL_ERROR, f"ERROR cannot be read: {error}") from error',
            "return None",
        ),
    ),
    "truncated": _reported_as_clean("truncated"),
    "reset": _reported_as_clean("connection_reset"),
    "clean-end": fault(
        "reports a clean end as a failure",
        (
            "ClientProtocol._closed_by_peer",
            'ConnectionClosed("the server closed the connection", clean=True)',
            'ConnectionClosed("the server closed the connection")',
        ),
    ),
    "truncated-everywhere": fault(
        "treats a truncation after a header as a clean end",
        (
            "ClientProtocol.connection_lost",
            _LOST,
            "self._ended(ConnectionClosed(exc.failure, clean=self.conversation._decoder.buffered >= 68))",
        ),
    ),
    "end-before-welcome": fault(
        "does not notice an end before WELCOME",
        ("ClientProtocol._ended", "if not self.welcomed.done():", "if False:"),
    ),
    "close-notify-on-close": _NO_CLOSE_NOTIFY,
    "close-notify-at-end-of-input": _NO_CLOSE_NOTIFY,
}

_NO_SALT_CHECK: Final = fault(
    "does not check the salt",
    (
        "ClientConnection._receive",
        _NONCE,
        "if salt != self.salt and self.state is State.AWAITING_WELCOME or counter <= self._last_counter:",
    ),
)

FRESHNESS: Final[dict[str, Fault]] = {
    "wrong-salt": _NO_SALT_CHECK,
    "counter-decreases": fault(
        "accepts lower counters",
        ("ClientConnection._receive", _NONCE, "if salt != self.salt or counter == self._last_counter:"),
    ),
    "replayed-response": fault(
        "accepts a counter twice",
        ("ClientConnection._receive", _NONCE, "if salt != self.salt or counter < self._last_counter:"),
    ),
    "replayed-from-another-connection": _NO_SALT_CHECK,
    "counter-jumps": fault(
        "stores counters in doubles",
        (
            "ClientConnection._receive",
            _NONCE,
            "if salt != self.salt or float(counter) <= self._last_counter:",
        ),
    ),
    "counters-of-concurrent-calls": fault(
        "stops increasing its counter at ten",
        ("ClientConnection._send", "counter = self._counter + 1", "counter = min(self._counter + 1, 10)"),
    ),
    "stale-response": fault("accepts stale frames", ("ClientConnection._receive", _STALE, "if False:")),
    "stale-error": fault(
        "drops a stale ERROR, so that its call waits for the timeout",
        ("ClientConnection._received_stale", "if head in _ANSWERS and", "if head == RESPONSE and"),
    ),
    "timestamps-of-any-value": fault(
        "compares timestamps as signed numbers",
        (
            "ClientConnection._receive",
            "is_fresh = abs(judged_at + self.clock_offset_ms - timestamp) <= self.tolerance_ms",
            "is_fresh = abs(wall + self.clock_offset_ms - timestamp) <= self.tolerance_ms or timestamp >= 2**63",
        ),
    ),
    "ten-stale-frames": fault(
        "drops any number of stale frames",
        ("ClientConnection._received_stale", "if self._stale_in_a_row >= MAX_STALE_IN_A_ROW:", "if False:"),
    ),
    "nine-stale-frames": fault(
        "does not reset the count of stale frames",
        ("ClientConnection._receive", "self._stale_in_a_row = 0\n", "pass\n"),
    ),
    "clock-ahead": fault(
        "sends its own time",
        ("ClientConnection._send", "timestamp = wall + self.clock_offset_ms", "timestamp = wall"),
    ),
    "clock-behind": fault(
        "compares timestamps with its own time",
        (
            "ClientConnection._receive",
            "judged_at + self.clock_offset_ms - timestamp",
            "judged_at - timestamp",
        ),
    ),
    "clock-corrected": fault(
        "does not correct its clock",
        ("ClientConnection._correct_clock", "self.clock_offset_ms = server_time - wall", "pass"),
    ),
    "clock-corrected-by-a-stale-error": fault(
        "drops a stale STALE_TIMESTAMP", ("ClientConnection._receive", _STALE, "if not is_fresh:")
    ),
    "stale-twice": fault(
        "retries after each STALE_TIMESTAMP",
        (
            "Attempt.after_error",
            "self.once(then)",
            "(then is Then.AT_ONCE or self.once(then))",
        ),
    ),
}

ARRIVAL: Final[dict[str, Fault]] = {
    "response-with-a-slow-body": fault(
        "judges a frame when it is complete",
        (
            "ClientConnection.receive_data",
            "judged_at, self._partial = self._partial[0], None",
            "self._partial = None",
        ),
    ),
    "response-behind-a-slow-one": fault(
        "judges the frames behind a slow one by its clock",
        ("ClientConnection.receive_data", "judged_at = wall\n                if event", "if event"),
    ),
}
"""By the name of a vector."""
