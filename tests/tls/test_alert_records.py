"""Test the alerts sent before OpenSSL is involved."""

from __future__ import annotations

import ssl

import pytest

from zcproto.tls.client_hello import AlertDescription, alert_record


def test_alert_numbers_match_rfc_8446() -> None:
    """RFC 8446 section 6."""
    assert {alert.name: alert.value for alert in AlertDescription} == {
        "UNEXPECTED_MESSAGE": 10,
        "RECORD_OVERFLOW": 22,
        "HANDSHAKE_FAILURE": 40,
        "ILLEGAL_PARAMETER": 47,
        "DECODE_ERROR": 50,
        "PROTOCOL_VERSION": 70,
        "UNRECOGNIZED_NAME": 112,
        "NO_APPLICATION_PROTOCOL": 120,
    }


def test_alert_is_one_fatal_plaintext_record() -> None:
    assert alert_record(AlertDescription.PROTOCOL_VERSION) == bytes.fromhex("15 0303 0002 02 46")


@pytest.mark.parametrize("alert", AlertDescription)
def test_openssl_parses_each_alert(alert: AlertDescription, client_tls: ssl.SSLContext) -> None:
    incoming = ssl.MemoryBIO()
    client = client_tls.wrap_bio(incoming, ssl.MemoryBIO(), server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    incoming.write(alert_record(alert))
    with pytest.raises(ssl.SSLError, match=f"(?i)(alert|tlsv1) {alert.name.replace('_', ' ')}"):
        client.do_handshake()
