"""What must hold: every row, its target, the aim beyond it, and how it is shown."""

from __future__ import annotations

from typing import Final, NamedTuple


class Requirement(NamedTuple):
    """One row. `aim` is empty where there is nothing beyond the target."""

    key: str
    section: str
    name: str
    target: str
    aim: str
    how: str
    is_tested: bool = False
    """Whether tests show it, those marked `@pytest.mark.requirement(key)`."""


_PERFORMANCE, _SECURITY, _SCALE = "Performance", "Security", "Scale"
_RELIABILITY, _OPERATION = "Reliability", "Compliance and operation"

REQUIREMENTS: Final = (
    Requirement(
        "handshake_at_rest", _PERFORMANCE, "TLS handshake, at rest", "p99 < 100 ms", "< 20 ms with ECDSA",
        "1,000 with each key type, one after the other, from TCP connect to the end of the handshake at the client",
    ),
    Requirement(
        "handshake_arriving", _PERFORMANCE, "TLS handshake, 10,000 arriving", "p99 < 100 ms", "",
        "10,000 connections at a steady rate, each from when it was due to the end of its handshake",
    ),
    Requirement(
        "token_validation", _PERFORMANCE, "session token validation", "p99.9 < 1 ms", "< 5 us",
        "1,000,000 checks among 100,000 live tokens, in random order, each with the median of three times",
    ),
    Requirement(
        "certificate_loading", _PERFORMANCE, "certificate loading", "p99 < 50 ms", "p50 < 10 ms",
        "RSA-4096 and ECDSA P-256 from the disk, checked, into a new context",
    ),
    Requirement(
        "hsts_cost", _PERFORMANCE, "HSTS header injection", "< 1 ms", "< 1 us",
        "medians of responses with and without it, made in turn; and the header's own part alone",
    ),
    Requirement(
        "tls_version", _SECURITY, "TLS version", "1.3, no fallback", "",
        "ClientHellos of TLS 1.0 to 1.2 and of unknown versions get alert 70", True,
    ),
    Requirement(
        "cipher_suites", _SECURITY, "cipher suites", "AES_256_GCM_SHA384 and CHACHA20_POLY1305_SHA256 alone", "",
        "both suites are negotiated; all others, alone or together, get alert 40", True,
    ),
    Requirement(
        "key_size", _SECURITY, "certificate key size", "2048 bits at least, 4096 by default", "",
        "keys of the default configuration; weaker RSA keys and other curves are refused", True,
    ),
    Requirement(
        "token_size", _SECURITY, "session token size", "32 bytes, base64url", "",
        "size, uniqueness and bit distribution; the text form is 43 characters, no other is accepted", True,
    ),
    Requirement(
        "expiration", _SECURITY, "token expiration", "24 hours, configurable", "",
        "absolute and idle limits, exact to the millisecond; the documented default; a reloaded lifetime", True,
    ),
    Requirement(
        "refresh", _SECURITY, "refresh token", "optional, separate, rotates", "",
        "both tokens are replaced; a spent one ends the session; kinds are separate; switched off", True,
    ),
    Requirement(
        "forward_secrecy", _SECURITY, "perfect forward secrecy", "ephemeral keys for each connection", "",
        "each handshake has its own key share, also where resumption is offered; no tickets", True,
    ),
    Requirement(
        "hsts", _SECURITY, "HSTS max-age", "31536000 in every response", "",
        "exactly once in each response, good or bad; curl remembers it", True,
    ),
    Requirement(
        "pinning", _SECURITY, "certificate pinning", "optional, SHA-256", "",
        "clients with pins of the key and of the certificate: right, wrong, several, and malformed ones", True,
    ),
    Requirement(
        "replays", _SECURITY, "replay protection", "nonce and timestamp", "",
        "frames repeated, reordered, on another connection, after a restart; timestamps at both edges", True,
    ),
    Requirement(
        "connections", _SCALE, "concurrent TLS connections", "10,000", "",
        "each with a session of its own, each verified by its answers, counted by server and client alike",
    ),
    Requirement(
        "per_user", _SCALE, "session tokens per user", "5, configurable", "",
        "the documented default; one session more evicts the oldest without a connection, else is refused", True,
    ),
    Requirement(
        "token_memory", _SCALE, "token store memory", "< 100 MB for 100,000 tokens", "< 30 MB",
        "resident memory of a fresh process with 100,000 tokens and their refresh tokens, above the empty registry",
    ),
    Requirement(
        "rotation", _SCALE, "certificate rotation", "1 a second, nothing lost", "100 in a row",
        "files replaced once a second under load, while new connections check their certificate",
    ),
    Requirement(
        "rotation_stall", _SCALE, "loop stall while rotating", "< 10 ms", "",
        "the server's own pauses, without the time that Linux gave to other programs",
    ),
    Requirement(
        "cleanup", _SCALE, "session cleanup", "1,000 expired a second, slices < 5 ms", "100,000 a second",
        "100,000 that lapse, and 100,000 that end, cleaned from a registry in slices",
    ),
    Requirement(
        "expiry_alerts", _RELIABILITY, "expiry monitoring", "alerts 30, 14, 7, 3 and 1 days before", "",
        "certificates of others that end ever sooner raise an alert at each threshold", True,
    ),
    Requirement(
        "renewal", _RELIABILITY, "auto-renewal", "30 days before expiry", "",
        "own certificates renewed when due, with their keys; files of others: new ones served, bad ones not", True,
    ),
    Requirement(
        "recovery", _RELIABILITY, "session recovery", "graceful degradation on store failure", "",
        "a failing store, a full disk, a killed server: nothing acknowledged is lost", True,
    ),
    Requirement(
        "tls_errors", _RELIABILITY, "TLS errors", "clear, nothing leaked", "",
        "garbage, plaintext and every kind of unsuitable hello: one alert or answer each, counted by cause", True,
    ),
    Requirement(
        "fallback", _RELIABILITY, "fallback", "no certificate, no server", "",
        "certificates missing, damaged, expired or of another key: no server starts", True,
    ),
    Requirement(
        "profile", _OPERATION, "X.509 v3, RFC 5280", "own certificates conform", "",
        "version, extensions and criticality; verified by OpenSSL and GnuTLS, and checked by pkilint", True,
    ),
    Requirement(
        "configuration", _OPERATION, "configuration", "validated at the start, all faults at once", "",
        "all faults at once, each with its key and its cure; nothing is started or created", True,
    ),
    Requirement(
        "first_run", _OPERATION, "certificates on first run", "made, paths configurable, private", "",
        "what a first start creates, where, with which modes; files that others can read stop it", True,
    ),
    Requirement(
        "metrics", _OPERATION, "metrics", "handshakes, token validation", "",
        "sessions, logins, refused frames and TLS failures are counted by cause, and readable with a session", True,
    ),
    Requirement(
        "alerting", _OPERATION, "alerts", "TLS errors, token revocation, expiry", "",
        "TLS failures, revocations, reused refresh tokens and failed renewals reach webhook and command", True,
    ),
    Requirement(
        "logs", _OPERATION, "structured logs", "no tokens, keys or payloads", "",
        "each line is one JSON object; keys, tokens and other secrets are in no line", True,
    ),
)  # fmt: skip
"""In the order of the table."""

KEYS: Final = frozenset(each.key for each in REQUIREMENTS)
SECTIONS: Final = tuple(dict.fromkeys(each.section for each in REQUIREMENTS))
