"""Verdicts on a ClientHello, which must be the same for every way to pass its bytes."""

from __future__ import annotations

from tests.tls.hellos import Hello
from zcproto.tls.client_hello import (
    SUITE_IDS,
    Accepted,
    AlertDescription,
    ClientHelloJudge,
    ClientHelloReader,
    Refusal,
)
from zcproto.tls.failure import TlsFailure

SUITES = frozenset(SUITE_IDS.values())
PROTOCOLS = frozenset(["zcp/1", "http/1.1", None])
Verdict = Accepted | Refusal | None

NOT_TLS = Refusal(TlsFailure.NOT_TLS, None)
HTTP = Refusal(TlsFailure.PLAINTEXT_HTTP, None)
MALFORMED = Refusal(TlsFailure.MALFORMED_CLIENT_HELLO, AlertDescription.DECODE_ERROR)
UNEXPECTED = Refusal(TlsFailure.UNEXPECTED_MESSAGE, AlertDescription.UNEXPECTED_MESSAGE)
TOO_LARGE = Refusal(TlsFailure.CLIENT_HELLO_TOO_LARGE, AlertDescription.ILLEGAL_PARAMETER)
RECORD_TOO_LARGE = Refusal(TlsFailure.RECORD_TOO_LARGE, AlertDescription.RECORD_OVERFLOW)
NO_TLS_1_3 = Refusal(TlsFailure.UNSUPPORTED_VERSION, AlertDescription.PROTOCOL_VERSION)
NO_SUITE = Refusal(TlsFailure.NO_SHARED_SUITE, AlertDescription.HANDSHAKE_FAILURE)
NO_ALPN = Refusal(TlsFailure.NO_APPLICATION_PROTOCOL, AlertDescription.NO_APPLICATION_PROTOCOL)
NO_NAME = Refusal(TlsFailure.MALFORMED_CLIENT_HELLO, AlertDescription.UNRECOGNIZED_NAME)
LOCALHOST = Accepted("localhost")

GOOD = Hello()


JUDGE = ClientHelloJudge(SUITES, PROTOCOLS)
"""Shared by all tests: cached hellos must not change a verdict."""


def reader() -> ClientHelloReader:
    return ClientHelloReader(JUDGE)


def judge(data: bytes) -> Verdict:
    """Return the verdict on bytes received at once: the same by both entry points, whatever is cached."""
    verdict = reader().feed(data)
    for judging in (ClientHelloJudge(SUITES, PROTOCOLS), JUDGE, JUDGE):
        whole = judging.judge_record(data)
        assert whole is None or whole == verdict
    return verdict


def judge_pieces(*pieces: bytes) -> Verdict:
    """Feed pieces up to the first verdict."""
    slow = reader()
    for piece in pieces:
        verdict = slow.feed(piece)
        if verdict is not None:
            return verdict
    return None


def byte_by_byte(data: bytes) -> Verdict:
    return judge_pieces(*(data[at : at + 1] for at in range(len(data))))
