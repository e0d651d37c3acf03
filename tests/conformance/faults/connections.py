"""A fault for each scenario about TLS, WELCOME, framing and freshness."""

from __future__ import annotations

from typing import Final

from tests.conformance.faults.mutation import Fault, fault

_CONTEXT: Final = "zcproto.tls.context:client_context"
_ALPN: Final = "    context.set_alpn_protocols(list(protocols))\n"
_JUDGE: Final = "zcproto.tls.client:TlsClientTransport._judge"
_JUDGE_ALPN: Final = "if self._tls.selected_alpn_protocol() != ALPN:"
_DIAL: Final = "zcproto.client.dial:Dialer.__call__"
_POLICY: Final = "zcproto.client.dial:Dialer._require_verification"
_HOSTS: Final = "zcproto.client.dial:KnownHosts"
_WELCOME: Final = "zcproto.connection.settings:read_welcome"
_PARSE_PINS: Final = "zcproto.tls.pins:parse_pins"
_PUMP: Final = "zcproto.client.protocol:ClientProtocol"
_CONNECTION: Final = "zcproto.connection.client:ClientConnection"
_READ: Final = f"{_CONNECTION}.receive_data"
_RECEIVE: Final = f"{_CONNECTION}._receive"
_LATE: Final = f"{_CONNECTION}._received_stale"
_FIRST: Final = f"{_CONNECTION}._received_welcome"
_ERROR: Final = f"{_CONNECTION}._received_error"
_DECODER: Final = "zcproto.wire.decoder:FrameDecoder"
_CHECK_LENGTH: Final = "zcproto.wire.frame:check_length"
_CHECK_HEAD: Final = "zcproto.wire.frame:check_head"
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
    "uses only one pin", (_PARSE_PINS, "parsed = frozenset(pins)", "parsed = frozenset(list(pins)[:1])")
)
_NO_LENGTH_LIMIT: Final = fault(
    "does not limit the length", (_CHECK_LENGTH, "if length > limit:", "if False:")
)
_NO_CLOSE_NOTIFY: Final = fault(
    "closes without close_notify",
    (f"{_PUMP}.close", "self._transport.close()", "self._transport.abort()"),
)

TRUST: Final[dict[str, Fault]] = {
    "client-hello": fault(
        "offers no ALPN",
        (_CONTEXT, _ALPN, "\n"),
        (_JUDGE, _JUDGE_ALPN, "if False:"),
    ),
    "wrong-ca": fault("does not verify certificates", (_CONTEXT, "    if not verify:\n", "    if True:\n")),
    "wrong-name": fault(
        "does not verify the name", (_CONTEXT, _ALPN, f"{_ALPN}    context.check_hostname = False\n")
    ),
    "expired-certificate": fault(
        "does not verify the validity period (X509_V_FLAG_NO_CHECK_TIME)",
        (_CONTEXT, _ALPN, f"{_ALPN}    context.verify_flags |= 0x200000\n"),
    ),
    "tls-1.2": fault(
        "accepts TLS 1.2",
        ("zcproto.tls.context:_restrict", "context.minimum_version = ssl.TLSVersion.TLSv1_3", "pass"),
        (
            "zcproto.tls.context:_restrict",
            "context.maximum_version = ssl.TLSVersion.TLSv1_3",
            "context.minimum_version = ssl.TLSVersion.TLSv1_2",
        ),
        ("zcproto.tls.context:suites_are_allowed", 'tls.version() == "TLSv1.3" and', ""),
        ("zcproto.tls.context:suites_are_allowed", "cipher[0] in SUITES", "True"),
    ),
    "other-suite": fault(
        "accepts any suite",
        ("zcproto.tls.context:suites_are_allowed", "cipher[0] in SUITES", "True"),
    ),
    "no-alpn": fault("does not check ALPN", (_JUDGE, _JUDGE_ALPN, "if False:")),
    "no-tls": fault(
        "treats a server without TLS like one that is down",
        (
            "zcproto.client.endpoints:Endpoints.failure",
            "return permanent or (None if is_starting else next(others, self.last_error))",
            "return None",
        ),
    ),
    "pin": fault(
        "ignores pins without a CA",
        (
            "zcproto.client.dial:Trust.__init__",
            "options.system_store or not (self.ca_file or self.pins)",
            "options.system_store or not self.ca_file",
        ),
    ),
    "wrong-pin": fault("ignores pins", (_JUDGE, "if not connector.pins:", "if True:")),
    "backup-pin": _ONE_PIN,
    "wrong-pin-with-ca": fault(
        "ignores pins if it has a CA",
        (
            _JUDGE,
            "if not connector.pins:",
            "if not connector.pins or connector.context.verify_mode is ssl.CERT_REQUIRED:",
        ),
    ),
    "pin-with-wrong-ca": fault(
        "ignores the CA if it has a pin",
        (
            "zcproto.client.dial:Trust.context",
            "verify=self._by_ca,",
            "verify=not self.pins and self._by_ca,",
        ),
    ),
    "pin-checked-on-reconnect": fault(
        "checks pins on the first connection only", (_DIAL, "pins=self._trust.pins,", _SOME_PINS)
    ),
    "pins-next-event": fault(
        "trusts the pins that a server announces",
        (
            "zcproto.client.client:SessionClient._receive_event",
            "if self._options.on_event is not None:",
            "self._dial._trust.pins |= frozenset(event.data['pins'])\n"
            "        if self._options.on_event is not None:",
        ),
    ),
    "key-rollover-with-next-pin": _ONE_PIN,
    "sts-policy": fault(
        "ignores policies",
        (_POLICY, "if not self._trust.verify and self._known_hosts is not None:", "if False:"),
    ),
    "sts-policy-for-subdomains": fault(
        "applies a policy to one name only",
        (f"{_HOSTS}.require", "for start in range(len(labels)):", "for start in range(1):"),
    ),
    "sts-policy-with-another-name": fault(
        "looks for the policy of the verified name only",
        (
            _POLICY,
            "for name in {host, self._hostname(host)}:",
            "for name in {self._hostname(host)}:",
        ),
    ),
    "sts-policy-removed": fault(
        "never removes a policy", (f"{_HOSTS}.learn", "hosts.pop(host, None)", "pass")
    ),
    "sts-policy-from-unverified-server": fault(
        "stores policies of unverified servers",
        (
            "zcproto.client.dial:Dialer._remember",
            "if not self._trust.verify or",
            "if",
        ),
    ),
}

WELCOME: Final[dict[str, Fault]] = {
    "welcome-is-awaited": fault(
        "sends PING right after the TLS handshake",
        (
            f"{_PUMP}.connection_made",
            'self._transport = cast("asyncio.Transport", transport)',
            'self._transport = transport; transport.write(b"\\0\\0\\0\\x40\\x01\\x06" + bytes(62))',
        ),
    ),
    "welcome-byte-by-byte": fault(
        "drops the beginning of a frame with a complete header",
        (f"{_DECODER}.frames", "self._keep(at, end - size)", "self._data = b''; self._at = 0"),
    ),
    "welcome-with-unknown-keys": fault(
        "refuses unknown keys",
        (_WELCOME, 'sts = welcome["sts"]', 'sts = welcome["sts"] if len(welcome) == len(_TYPES) else {}'),
    ),
    "welcome-followed-by-frame": fault(
        "drops frames after WELCOME in the same read",
        (
            _READ,
            "if event is not None:\n                    yield event",
            "yield event\n                return",
        ),
    ),
    "welcome-without-version-1": fault(
        "does not check versions",
        (
            _WELCOME,
            'if not any(version.__class__ is int and version == VERSION for version in welcome["versions"]):',
            "if False:",
        ),
    ),
    "welcome-without-required-key": fault(
        "uses defaults for missing keys",
        (
            _WELCOME,
            "if welcome.get(key).__class__ is not wanted:",
            "if welcome.setdefault(key, 128).__class__ is not wanted:",
        ),
    ),
    "welcome-with-wrong-type": fault(
        "does not check types",
        (_WELCOME, "if welcome.get(key).__class__ is not wanted:", "if key not in welcome:"),
        (_WELCOME, "if welcome[key] < least:", "if int(welcome[key]) < least:"),
    ),
    "welcome-not-first": fault(
        "ignores frames before WELCOME",
        (
            _FIRST,
            'raise ProtocolError(Code.PROTOCOL_ERROR, "the first frame is not WELCOME")',
            'return EventReceived("ignored", None, b"", b"")',
        ),
    ),
    "welcome-with-nonzero-counter": fault(
        "accepts WELCOME with any counter", (_FIRST, "if counter != 0:", "if False:")
    ),
    "welcome-twice": fault(
        "ignores a second WELCOME",
        (_RECEIVE, 'raise ProtocolError(Code.PROTOCOL_ERROR, "WELCOME came twice")', "return None"),
    ),
    "welcome-unparsable": fault(
        "uses defaults for an invalid WELCOME",
        (
            _WELCOME,
            'raise ProtocolError(Code.PROTOCOL_ERROR, f"WELCOME cannot be read: {error}") from error',
            _SAVED_WELCOME,
        ),
    ),
    "welcome-too-large": _NO_LENGTH_LIMIT,
    "welcome-never-sent": fault(
        "waits for WELCOME forever",
        (
            "zcproto.client.dial:Dialer._connect",
            "async with asyncio.timeout(self._connect_timeout):",
            "async with asyncio.timeout(None):",
        ),
    ),
    "max-streams": fault(
        "ignores max_streams",
        (f"{_PUMP}._handle", 'event.settings["max_streams"]', "128"),
        (f"{_CONNECTION}.request", 'if len(in_flight) >= self.welcome["max_streams"]:', "if False:"),
    ),
}


def _reported_as_clean(how: str) -> Fault:
    return fault(
        f"reports {how} as a clean end",
        (
            f"{_PUMP}.connection_lost",
            _LOST,
            f'self._ended(ConnectionClosed(exc.failure, clean=exc.failure == "{how}"))',
        ),
    )


FRAMING: Final[dict[str, Fault]] = {
    "response-byte-by-byte": fault(
        "drops a partial length field",
        (
            f"{_DECODER}._keep_header",
            "self._keep(at, LENGTH_SIZE - available)",
            "self._data = b''; self._at = 0",
        ),
    ),
    "response-in-two-pieces": fault(
        "drops a partial header",
        (
            f"{_DECODER}._keep_header",
            "self._keep(at, HEADER_SIZE - available)",
            "self._data = b''; self._at = 0",
        ),
    ),
    "responses-in-one-read": fault(
        "handles one response per read",
        (
            _READ,
            "yield event",
            "yield event\n                if event.__class__ is ResponseReceived:\n                    return",
        ),
    ),
    "response-of-a-megabyte": fault(
        "keeps the limit from before WELCOME", (_FIRST, "self._decoder.limit = self.max_frame", "pass")
    ),
    "length-below-64": fault(
        "does not check the minimum length", (_CHECK_LENGTH, "if length < MIN_LENGTH:", "if False:")
    ),
    "length-above-limit": _NO_LENGTH_LIMIT,
    "version-2": fault(
        "does not check the version",
        (_CHECK_HEAD, "if head >> 24 != VERSION:", "if False:"),
        (_CHECK_HEAD, "bare_head = head & 0xFFFF0000", "bare_head = VERSION << 24 | head & 0xFF0000"),
    ),
    "flag-set": fault("does not check flags", (_CHECK_HEAD, "if head & 0xFFFF:", "if False:")),
    "reserved-kind": fault(
        "ignores reserved kinds",
        (_CHECK_HEAD, _HEAD_KIND, "if bare_head not in accepted.heads and bare_head < head_of(0x10):"),
    ),
    "kind-of-client": fault(
        "ignores a kind that only clients may send",
        (_CHECK_HEAD, _HEAD_KIND, "if bare_head not in accepted.heads and bare_head != CANCEL:"),
    ),
    "response-on-stream-0": fault(
        "ignores a response on stream 0",
        (_CHECK_HEAD, _HEAD_STREAM, f"{_HEAD_STREAM[:-1]} and bare_head != RESPONSE:"),
    ),
    "event-on-nonzero-stream": fault(
        "accepts an event on any stream",
        (_CHECK_HEAD, _HEAD_STREAM, f"{_HEAD_STREAM[:-1]} and bare_head != EVENT:"),
    ),
    "ping-with-body": fault(
        "ignores the body of PING", (_RECEIVE, "        if body:\n", "        if False:\n")
    ),
    "event-unparsable": fault(
        "ignores an invalid event",
        (
            _RECEIVE,
            'raise ProtocolError(Code.PROTOCOL_ERROR, f"EVENT cannot be read: {error}") from error',
            "return None",
        ),
    ),
    "goaway-without-required-key": fault(
        "uses defaults for missing keys of GOAWAY",
        (
            f"{_CONNECTION}._received_go_away",
            'raise ProtocolError(Code.PROTOCOL_ERROR, "GOAWAY must have a reason and retry_after_ms")',
            "retry_after_ms = 0",
        ),
    ),
    "fatal-error": fault(
        "continues after ERROR on stream 0",
        (_ERROR, "raise ProtocolError(_code_of(code), message)", "return None"),
    ),
    "fatal-error-unparsable": fault(
        "ignores an invalid ERROR on stream 0",
        (
            _ERROR,
            'raise ProtocolError(Code.PROTOCOL_ERROR, f"ERROR cannot be read: {error}") from error',
            "return None",
        ),
    ),
    "truncated": _reported_as_clean("truncated"),
    "reset": _reported_as_clean("connection_reset"),
    "clean-end": fault(
        "reports a clean end as a failure",
        (
            f"{_PUMP}._closed_by_peer",
            'ConnectionClosed("the server closed the connection", clean=True)',
            'ConnectionClosed("the server closed the connection")',
        ),
    ),
    "truncated-everywhere": fault(
        "treats a truncation after a header as a clean end",
        (
            f"{_PUMP}.connection_lost",
            _LOST,
            "self._ended(ConnectionClosed(exc.failure, clean=self.conversation._decoder.buffered >= 68))",
        ),
    ),
    "end-before-welcome": fault(
        "does not notice an end before WELCOME",
        (f"{_PUMP}._ended", "if not self.welcomed.done():", "if False:"),
    ),
    "close-notify-on-close": _NO_CLOSE_NOTIFY,
    "close-notify-at-end-of-input": _NO_CLOSE_NOTIFY,
}

_NO_SALT_CHECK: Final = fault(
    "does not check the salt",
    (
        _RECEIVE,
        _NONCE,
        "if salt != self.salt and self.state is State.AWAITING_WELCOME or counter <= self._last_counter:",
    ),
)

FRESHNESS: Final[dict[str, Fault]] = {
    "wrong-salt": _NO_SALT_CHECK,
    "counter-decreases": fault(
        "accepts lower counters",
        (_RECEIVE, _NONCE, "if salt != self.salt or counter == self._last_counter:"),
    ),
    "replayed-response": fault(
        "accepts a counter twice",
        (_RECEIVE, _NONCE, "if salt != self.salt or counter < self._last_counter:"),
    ),
    "replayed-from-another-connection": _NO_SALT_CHECK,
    "counter-jumps": fault(
        "stores counters in doubles",
        (_RECEIVE, _NONCE, "if salt != self.salt or float(counter) <= self._last_counter:"),
    ),
    "counters-of-concurrent-calls": fault(
        "stops increasing its counter at ten",
        (f"{_CONNECTION}._send", "counter = self._counter + 1", "counter = min(self._counter + 1, 10)"),
    ),
    "stale-response": fault("accepts stale frames", (_RECEIVE, _STALE, "if False:")),
    "stale-error": fault(
        "drops a stale ERROR, so that its call waits for the timeout",
        (_LATE, "if head in _ANSWERS and", "if head == RESPONSE and"),
    ),
    "timestamps-of-any-value": fault(
        "compares timestamps as signed numbers",
        (
            _RECEIVE,
            "is_fresh = abs(judged_at + self.clock_offset_ms - timestamp) <= self.tolerance_ms",
            "is_fresh = abs(wall + self.clock_offset_ms - timestamp) <= self.tolerance_ms or timestamp >= 2**63",
        ),
    ),
    "ten-stale-frames": fault(
        "drops any number of stale frames",
        (_LATE, "if self._stale_in_a_row >= MAX_STALE_IN_A_ROW:", "if False:"),
    ),
    "nine-stale-frames": fault(
        "does not reset the count of stale frames",
        (_RECEIVE, "self._stale_in_a_row = 0\n", "pass\n"),
    ),
    "clock-ahead": fault(
        "sends its own time",
        (f"{_CONNECTION}._send", "timestamp = wall + self.clock_offset_ms", "timestamp = wall"),
    ),
    "clock-behind": fault(
        "compares timestamps with its own time",
        (_RECEIVE, "judged_at + self.clock_offset_ms - timestamp", "judged_at - timestamp"),
    ),
    "clock-corrected": fault(
        "does not correct its clock",
        (f"{_CONNECTION}._correct_clock", "self.clock_offset_ms = server_time - wall", "pass"),
    ),
    "clock-corrected-by-a-stale-error": fault(
        "drops a stale STALE_TIMESTAMP", (_RECEIVE, _STALE, "if not is_fresh:")
    ),
    "stale-twice": fault(
        "retries after each STALE_TIMESTAMP",
        (
            "zcproto.client.retry:Attempt.after_error",
            "self.once(then)",
            "(then is Then.AT_ONCE or self.once(then))",
        ),
    ),
}

ARRIVAL: Final[dict[str, Fault]] = {
    "response-with-a-slow-body": fault(
        "judges a frame when it is complete",
        (_READ, "judged_at, self._partial = self._partial[0], None", "self._partial = None"),
    ),
    "response-behind-a-slow-one": fault(
        "judges the frames behind a slow one by its clock",
        (_READ, "judged_at = wall\n                if event", "if event"),
    ),
}
"""By the name of a vector."""
