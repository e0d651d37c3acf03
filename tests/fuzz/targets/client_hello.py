"""Fuzz the first bytes of a TLS connection: accepted, refused for a reason, or incomplete."""

from __future__ import annotations

from collections.abc import Sequence

from tests.fuzz.target import Target, divisions
from zcproto.tls.client_hello import (
    MAX_NAME,
    MAX_SIZE,
    SUITE_IDS,
    Accepted,
    AlertDescription,
    ClientHelloJudge,
    ClientHelloReader,
    Refusal,
)
from zcproto.tls.failure import TlsFailure

SUITES = frozenset(SUITE_IDS.values())
PROTOCOLS = frozenset({"zcp/1", "http/1.1", None})
NAME = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")
JUDGE = ClientHelloJudge(SUITES, PROTOCOLS)
"""Caches accepted records, which must not change the verdict for other inputs."""
WITHOUT_ALERT = frozenset({TlsFailure.NOT_TLS, TlsFailure.PLAINTEXT_HTTP})


def verdict(
    pieces: Sequence[bytes], suites: frozenset[int] = SUITES, protocols: frozenset[str | None] = PROTOCOLS
) -> tuple[Accepted | Refusal | None, int]:
    """Return the verdict, and the number of bytes received until then."""
    reader = ClientHelloReader(ClientHelloJudge(suites, protocols))
    for piece in pieces:
        judged = reader.feed(piece)
        if judged is not None:
            return judged, len(reader.raw)
        assert len(reader.raw) <= MAX_SIZE
    return None, len(reader.raw)


def run(data: bytes) -> None:
    JUDGE.judge_record(data)
    verdict([data])


def check(data: bytes) -> None:
    whole, size = verdict([data])
    assert JUDGE.judge_record(data) in (None, whole)
    assert size == len(data)
    for pieces in divisions(data):
        judged, at = verdict(pieces)
        # A verdict may come early; then it equals the verdict for the bytes received so far.
        assert (judged, at) == verdict([data[:at]])
        if isinstance(judged, Refusal):
            assert isinstance(whole, Refusal)
        elif judged is None:
            assert whole is None
    match whole:
        case Refusal(failure, alert):
            assert isinstance(failure, TlsFailure)
            assert (alert is None) is (failure in WITHOUT_ALERT)
            assert alert is None or isinstance(alert, AlertDescription)
        case Accepted(name):
            assert data[0] == 22
            assert len(data) > 9
            if name is not None:
                assert 0 < len(name) <= MAX_NAME
                assert NAME.issuperset(name)
                assert all(name.split("."))
            # Alerts have the order 70, 40, 120.
            no_suite, _ = verdict([data], suites=frozenset())
            assert no_suite == Refusal(TlsFailure.NO_SHARED_SUITE, AlertDescription.HANDSHAKE_FAILURE)
            no_protocol, _ = verdict([data], protocols=frozenset())
            assert no_protocol == Refusal(
                TlsFailure.NO_APPLICATION_PROTOCOL, AlertDescription.NO_APPLICATION_PROTOCOL
            )
            assert verdict([data[:-1]])[0] in (None, whole)
            assert verdict([data + b"\0"])[0] == whole  # more records may be early data


TARGET = Target("client_hello", run, check)
