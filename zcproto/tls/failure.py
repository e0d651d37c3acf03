"""Classify failures of TLS connections as an enumeration that can be counted."""

from __future__ import annotations

import re
import ssl
from enum import Enum
from typing import Final


class TlsFailure(Enum):
    """Causes as seen by the side that counts them. The value is used in metrics and logs."""

    # before TLS began
    PROXY_HEADER_MISSING = "proxy_header_missing"
    PROXY_HEADER_VERSION = "proxy_header_version"
    PROXY_HEADER_MALFORMED = "proxy_header_malformed"
    # before OpenSSL saw a byte
    DISPLACED = "displaced"
    NOT_TLS = "not_tls"
    PLAINTEXT_HTTP = "plaintext_http"
    MALFORMED_CLIENT_HELLO = "malformed_client_hello"
    CLIENT_HELLO_TOO_LARGE = "client_hello_too_large"
    UNSUPPORTED_VERSION = "unsupported_version"
    NO_SHARED_SUITE = "no_shared_suite"
    NO_APPLICATION_PROTOCOL = "no_application_protocol"
    # during the handshake
    HANDSHAKE_TIMEOUT = "handshake_timeout"
    DISCONNECTED = "disconnected"
    NO_SHARED_GROUP = "no_shared_group"
    NO_SHARED_SIGNATURE_ALGORITHM = "no_shared_signature_algorithm"
    NO_SHARED_PARAMETERS = "no_shared_parameters"
    BAD_RECORD = "bad_record"
    RECORD_TOO_LARGE = "record_too_large"
    UNEXPECTED_MESSAGE = "unexpected_message"
    PEER_REJECTED_CERTIFICATE = "peer_rejected_certificate"
    PEER_ALERT = "peer_alert"
    # the peer's identity
    CERTIFICATE_REQUIRED = "certificate_required"
    CERTIFICATE_UNTRUSTED = "certificate_untrusted"
    CERTIFICATE_EXPIRED = "certificate_expired"
    CERTIFICATE_REVOKED = "certificate_revoked"
    REVOCATION_UNKNOWN = "revocation_unknown"
    CERTIFICATE_NAME_MISMATCH = "certificate_name_mismatch"
    PIN_MISMATCH = "pin_mismatch"
    # after the handshake
    WRONG_PARAMETERS = "wrong_parameters"
    TRUNCATED = "truncated"
    CONNECTION_RESET = "connection_reset"
    BARREN_RECORDS = "barren_records"
    WRITE_TIMEOUT = "write_timeout"
    OTHER = "other"


CERTIFICATE_CURES: Final = {
    TlsFailure.CERTIFICATE_UNTRUSTED: (
        "get the CA of the server (zcproto cert export-ca), and give it as ca_file"
    ),
    TlsFailure.CERTIFICATE_EXPIRED: "renew it on the server (zcproto cert show), and compare the clocks",
    TlsFailure.CERTIFICATE_NAME_MISMATCH: (
        "connect to one of its names, or add this one to certificates.names on the server"
    ),
}
"""The fix of each server certificate that a client refuses."""

# OpenSSL's reason names (include/openssl/sslerr.h), as in `ssl.SSLError.reason`.
_REASONS: Final = {
    TlsFailure.NO_SHARED_GROUP: "NO_SUITABLE_KEY_SHARE NO_SHARED_GROUPS",
    TlsFailure.NO_SHARED_SUITE: "NO_SHARED_CIPHER",
    TlsFailure.NO_SHARED_SIGNATURE_ALGORITHM: (
        "NO_SHARED_SIGNATURE_ALGORITHMS NO_SUITABLE_SIGNATURE_ALGORITHM"
    ),
    # RFC 8446 section 6.2: the alert is the same for a suite, a group and a signature algorithm.
    TlsFailure.NO_SHARED_PARAMETERS: "SSLV3_ALERT_HANDSHAKE_FAILURE",
    TlsFailure.UNSUPPORTED_VERSION: "UNSUPPORTED_PROTOCOL TLSV1_ALERT_PROTOCOL_VERSION",
    TlsFailure.NO_APPLICATION_PROTOCOL: "NO_APPLICATION_PROTOCOL TLSV1_ALERT_NO_APPLICATION_PROTOCOL",
    TlsFailure.NOT_TLS: "WRONG_VERSION_NUMBER",
    TlsFailure.RECORD_TOO_LARGE: "PACKET_LENGTH_TOO_LONG ENCRYPTED_LENGTH_TOO_LONG DATA_LENGTH_TOO_LONG",
    # The last is OpenSSL's reason for any bad record since 3.2.
    TlsFailure.BAD_RECORD: (
        "BAD_RECORD_TYPE DECRYPTION_FAILED_OR_BAD_RECORD_MAC BAD_PACKET RECORD_LAYER_FAILURE"
    ),
    TlsFailure.UNEXPECTED_MESSAGE: "UNEXPECTED_MESSAGE INVALID_CCS_MESSAGE BAD_KEY_UPDATE",
    TlsFailure.TRUNCATED: "UNEXPECTED_EOF_WHILE_READING",
    TlsFailure.PEER_REJECTED_CERTIFICATE: (
        "TLSV1_ALERT_UNKNOWN_CA SSLV3_ALERT_BAD_CERTIFICATE SSLV3_ALERT_CERTIFICATE_UNKNOWN"
        " SSLV3_ALERT_CERTIFICATE_EXPIRED SSLV3_ALERT_CERTIFICATE_REVOKED SSLV3_ALERT_UNSUPPORTED_CERTIFICATE"
        " TLSV1_ALERT_ACCESS_DENIED"
    ),
    # Seen by the server that misses it, and by the client as an alert.
    TlsFailure.CERTIFICATE_REQUIRED: "PEER_DID_NOT_RETURN_A_CERTIFICATE TLSV13_ALERT_CERTIFICATE_REQUIRED",
}
_BY_REASON: Final = {reason: failure for failure, reasons in _REASONS.items() for reason in reasons.split()}

# X509_V_ERR_* numbers (include/openssl/x509_vfy.h).
_BY_VERIFY_CODE: Final = {
    3: TlsFailure.REVOCATION_UNKNOWN,  # no CRL of the certificate's issuer
    8: TlsFailure.REVOCATION_UNKNOWN,  # CRL with a bad signature
    9: TlsFailure.CERTIFICATE_EXPIRED,  # not yet valid
    10: TlsFailure.CERTIFICATE_EXPIRED,
    11: TlsFailure.REVOCATION_UNKNOWN,  # CRL not yet valid
    12: TlsFailure.REVOCATION_UNKNOWN,  # CRL expired
    23: TlsFailure.CERTIFICATE_REVOKED,
    33: TlsFailure.REVOCATION_UNKNOWN,  # CRL with unknown issuer
    35: TlsFailure.REVOCATION_UNKNOWN,  # CRL whose issuer may not sign CRLs
    36: TlsFailure.REVOCATION_UNKNOWN,  # CRL with an unknown critical extension
    44: TlsFailure.REVOCATION_UNKNOWN,  # CRL for other certificates
    62: TlsFailure.CERTIFICATE_NAME_MISMATCH,
    64: TlsFailure.CERTIFICATE_NAME_MISMATCH,  # address
}


_MESSAGE: Final = re.compile(r"\[SSL\] (.*?)( \(_ssl\.c:\d+\))?")


def reason_of(error: ssl.SSLError) -> str:
    """Return OpenSSL's reason name of an error; empty if it has none."""
    if error.reason:
        return error.reason
    # A Python built for an older OpenSSL has only the message. Since OpenSSL 3.2 messages contain "ssl/tls" where
    # names still have SSLV3.
    found = _MESSAGE.fullmatch(str(error))
    return found[1].upper().replace(" ", "_").replace("SSL/TLS_", "SSLV3_") if found else ""


def failure_of(error: ssl.SSLError) -> TlsFailure:
    """Return the cause of an error of the ssl module."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _BY_VERIFY_CODE.get(error.verify_code, TlsFailure.CERTIFICATE_UNTRUSTED)
    if isinstance(error, ssl.SSLEOFError):
        return TlsFailure.TRUNCATED
    reason = reason_of(error)
    known = _BY_REASON.get(reason)
    if known is not None:
        return known
    return TlsFailure.PEER_ALERT if "_ALERT_" in reason else TlsFailure.OTHER
