"""Test the mapping from errors of the ssl module to failures."""

from __future__ import annotations

import ssl
from typing import Any

import pytest

from zcproto.tls.failure import TlsFailure, failure_of


def ssl_error(reason: str | None, message: str = "[SSL] something (_ssl.c:1006)") -> ssl.SSLError:
    error = ssl.SSLError(1, message)
    error.reason = reason  # type: ignore[assignment]
    return error


@pytest.mark.parametrize(
    ("reason", "failure"),
    [
        ("NO_SUITABLE_KEY_SHARE", TlsFailure.NO_SHARED_GROUP),
        ("NO_SHARED_GROUPS", TlsFailure.NO_SHARED_GROUP),
        ("NO_SHARED_CIPHER", TlsFailure.NO_SHARED_SUITE),
        ("NO_SUITABLE_SIGNATURE_ALGORITHM", TlsFailure.NO_SHARED_SIGNATURE_ALGORITHM),
        ("UNSUPPORTED_PROTOCOL", TlsFailure.UNSUPPORTED_VERSION),
        ("TLSV1_ALERT_PROTOCOL_VERSION", TlsFailure.UNSUPPORTED_VERSION),
        ("TLSV1_ALERT_NO_APPLICATION_PROTOCOL", TlsFailure.NO_APPLICATION_PROTOCOL),
        ("SSLV3_ALERT_HANDSHAKE_FAILURE", TlsFailure.NO_SHARED_PARAMETERS),
        ("WRONG_VERSION_NUMBER", TlsFailure.NOT_TLS),
        ("PACKET_LENGTH_TOO_LONG", TlsFailure.RECORD_TOO_LARGE),
        ("DECRYPTION_FAILED_OR_BAD_RECORD_MAC", TlsFailure.BAD_RECORD),
        ("RECORD_LAYER_FAILURE", TlsFailure.BAD_RECORD),
        ("BAD_KEY_UPDATE", TlsFailure.UNEXPECTED_MESSAGE),
        ("UNEXPECTED_EOF_WHILE_READING", TlsFailure.TRUNCATED),
        ("TLSV1_ALERT_UNKNOWN_CA", TlsFailure.PEER_REJECTED_CERTIFICATE),
        ("SSLV3_ALERT_CERTIFICATE_EXPIRED", TlsFailure.PEER_REJECTED_CERTIFICATE),
        ("PEER_DID_NOT_RETURN_A_CERTIFICATE", TlsFailure.CERTIFICATE_REQUIRED),
        ("TLSV1_ALERT_INTERNAL_ERROR", TlsFailure.PEER_ALERT),
        ("SSLV3_ALERT_BAD_RECORD_MAC", TlsFailure.PEER_ALERT),
        ("A_REASON_OF_TOMORROW", TlsFailure.OTHER),
        ("", TlsFailure.OTHER),
    ],
)
def test_reason_maps_to_failure(reason: str, failure: TlsFailure) -> None:
    assert failure_of(ssl_error(reason)) is failure


@pytest.mark.parametrize(
    ("message", "failure"),
    [
        ("[SSL] record layer failure (_ssl.c:2580)", TlsFailure.BAD_RECORD),
        ("[SSL] record layer failure", TlsFailure.BAD_RECORD),
        ("[SSL] tlsv1 alert no application protocol (_ssl.c:1006)", TlsFailure.NO_APPLICATION_PROTOCOL),
        ("[SSL] ssl/tls alert unknown thing (_ssl.c:1006)", TlsFailure.PEER_ALERT),
        ("[SSL] ssl/tls alert certificate revoked (_ssl.c:1006)", TlsFailure.PEER_REJECTED_CERTIFICATE),
        ("[SSL] tlsv13 alert certificate required (_ssl.c:1006)", TlsFailure.CERTIFICATE_REQUIRED),
        ("unknown error (_ssl.c:1006)", TlsFailure.OTHER),
        ("", TlsFailure.OTHER),
    ],
)
def test_message_maps_to_failure_without_reason(message: str, failure: TlsFailure) -> None:
    """As with an OpenSSL newer than the one Python was built for."""
    assert failure_of(ssl_error(None, message)) is failure


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        (9, TlsFailure.CERTIFICATE_EXPIRED),
        (10, TlsFailure.CERTIFICATE_EXPIRED),
        (23, TlsFailure.CERTIFICATE_REVOKED),
        (3, TlsFailure.REVOCATION_UNKNOWN),
        *((code, TlsFailure.REVOCATION_UNKNOWN) for code in (8, 11, 12, 33, 35, 36, 44)),
        (62, TlsFailure.CERTIFICATE_NAME_MISMATCH),
        (64, TlsFailure.CERTIFICATE_NAME_MISMATCH),
        (18, TlsFailure.CERTIFICATE_UNTRUSTED),
        (20, TlsFailure.CERTIFICATE_UNTRUSTED),
    ],
)
def test_verify_code_maps_to_failure(code: int, failure: TlsFailure) -> None:
    error: Any = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code = code
    assert failure_of(error) is failure


def test_eof_error_is_truncated() -> None:
    assert failure_of(ssl.SSLEOFError(8, "EOF occurred in violation of protocol")) is TlsFailure.TRUNCATED


def test_failure_values_are_valid_metric_labels() -> None:
    names = [failure.value for failure in TlsFailure]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() and name == name.lower() for name in names)
