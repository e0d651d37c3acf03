"""What must hold: every row, its target, what is aimed at beyond it, and how it is found out."""

from __future__ import annotations

from typing import Final, NamedTuple


class Requirement(NamedTuple):
    """One row. `aim` is empty where the target is all that is wanted."""

    key: str
    section: str
    name: str
    target: str
    aim: str
    how: str


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
        "a running server is offered 1.0, 1.1, 1.2, 1.2 with 1.3, and unknown versions",
    ),
    Requirement(
        "cipher_suites", _SECURITY, "cipher suites", "AES_256_GCM_SHA384 and CHACHA20_POLY1305_SHA256 alone", "",
        "a running server is offered each of TLS 1.3's five suites alone, all in both orders, and the other three",
    ),
    Requirement(
        "key_size", _SECURITY, "certificate key size", "2048 bits at least, 4096 by default", "",
        "the files that a server serves by default; servers started with RSA-1024, RSA-2047, P-192 and P-224",
    ),
    Requirement(
        "token_size", _SECURITY, "session token size", "32 bytes, base64url", "",
        "tokens of many openings: size, repetitions, share of bits set; the text form by HTTPS, padded and not",
    ),
    Requirement(
        "expiration", _SECURITY, "token expiration", "24 hours, configurable", "",
        "expires_at by default; a server with a lifetime of seconds, used all the time, and an idle one",
    ),
    Requirement(
        "refresh", _SECURITY, "refresh token", "optional, separate, rotates", "",
        "refreshed, old pair tried, spent token used by another client, family tried; and switched off",
    ),
    Requirement(
        "forward_secrecy", _SECURITY, "perfect forward secrecy", "ephemeral keys for each connection", "",
        "key shares of 20 ServerHellos compared, resumption without (EC)DHE offered, tickets looked for",
    ),
    Requirement(
        "hsts", _SECURITY, "HSTS max-age", "31536000 in every response", "",
        "16 kinds of request, good and bad; the header is in each response exactly once",
    ),
    Requirement(
        "pinning", _SECURITY, "certificate pinning", "optional, SHA-256", "",
        "clients with pins of the key and of the certificate: right, wrong, and with a backup",
    ),
    Requirement(
        "replays", _SECURITY, "replay protection", "nonce and timestamp", "",
        "frames sent twice, in another order, taken to another connection, a minute early and late",
    ),
    Requirement(
        "connections", _SCALE, "concurrent TLS connections", "10,000", "",
        "each with a session of its own, each verified by its answers, counted by server and client alike",
    ),
    Requirement(
        "per_user", _SCALE, "session tokens per user", "5, configurable", "",
        "sessions opened until one is refused; a server that is set to 2 and to evict the oldest",
    ),
    Requirement(
        "token_memory", _SCALE, "token store memory", "< 100 MB for 100,000 tokens", "< 30 MB",
        "resident memory of a fresh process with 100,000 tokens and their refresh tokens, above the empty registry",
    ),
    Requirement(
        "rotation", _SCALE, "certificate rotation", "1 a second, nothing lost", "100 in a row",
        "files replaced once a second under load, while new connections look at what they are shown",
    ),
    Requirement(
        "rotation_stall", _SCALE, "loop stall while rotating", "< 10 ms", "",
        "the server's own pauses, without what other programs had of the processor, as Linux counts it",
    ),
    Requirement(
        "cleanup", _SCALE, "session cleanup", "1,000 expired a second, slices < 5 ms", "100,000 a second",
        "100,000 that lapse, and 100,000 that end, cleaned from a registry in slices",
    ),
    Requirement(
        "expiry_alerts", _RELIABILITY, "expiry monitoring", "alert 30 days before", "14, 7, 3, 1, too",
        "a running server is given certificates that end ever sooner; alerts arrive at a command",
    ),
    Requirement(
        "renewal", _RELIABILITY, "auto-renewal", "30 days before expiry", "",
        "a server started on own certificates with 29 days left; files of others replaced and damaged under one",
    ),
    Requirement(
        "recovery", _RELIABILITY, "session recovery", "graceful degradation on store failure", "",
        "no file of a running server can grow any more, as on a full disk; then it can, then it is restarted",
    ),
    Requirement(
        "tls_errors", _RELIABILITY, "TLS errors", "clear, nothing leaked", "",
        "five kinds of failure at a running server: alert, what is told, and its counts by cause",
    ),
    Requirement(
        "fallback", _RELIABILITY, "fallback", "no certificate, no server", "",
        "servers started with certificates missing, damaged, expired, of another key",
    ),
    Requirement(
        "profile", _OPERATION, "X.509 v3, RFC 5280", "own certificates conform", "",
        "version, extensions, criticality; the chain verified by another library's verifier",
    ),
    Requirement(
        "configuration", _OPERATION, "configuration", "validated at the start, all faults at once", "",
        "a file with four faults, checked and started with",
    ),
    Requirement(
        "first_run", _OPERATION, "certificates on first run", "made, paths configurable, private", "",
        "a server in an empty folder: what it makes, where, and with which modes",
    ),
    Requirement(
        "metrics", _OPERATION, "metrics", "handshakes, token validation", "",
        "/metrics read, the server used, and read again",
    ),
    Requirement(
        "alerting", _OPERATION, "alerts", "TLS errors, token revocation, expiry", "",
        "each caused at a running server; they arrive at a command",
    ),
    Requirement(
        "logs", _OPERATION, "structured logs", "no tokens, keys or payloads", "",
        "every line of a used server's log parsed, and searched for every secret there was, as the home folder is",
    ),
)  # fmt: skip
"""In the order of the table."""

KEYS: Final = frozenset(each.key for each in REQUIREMENTS)
SECTIONS: Final = tuple(dict.fromkeys(each.section for each in REQUIREMENTS))
