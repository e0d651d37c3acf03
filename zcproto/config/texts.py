"""Define the kinds of text in the configuration: addresses, names, paths, URLs, and what each of them accepts.

Rules: as in zcproto/config/types.py. Every text has a maximum length.

Must not know: which keys exist, where a value came from, anything on the disk.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from pydantic_core import core_schema

from zcproto.common.home import MAX_PATH
from zcproto.common.roles import ROLE_WORDS, is_role
from zcproto.config.types import INTEGER, accepts, array_from, optional, require, text

MAX_NETWORK: Final = 49
"""Characters of the longest IPv6 network, with an IPv4 address at its end and a prefix."""

MAX_DNS_NAME: Final = 253
"""Characters of a DNS name without the dot at its end."""

_HOST_NAME: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252})")
_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
# Base64 of 32 bytes: the last of 43 digits carries four bits only, so its other two are 0.
_PIN: Final = re.compile(r"(cert-)?sha256/[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=")
_VARIABLE: Final = re.compile(r"(?!ZCPROTO_)[A-Za-z_][A-Za-z0-9_]{0,127}")
_MAX_CLAIM: Final = 256
"""Characters of the name or of a value of a claim."""

_METHOD_PATTERN: Final = re.compile(r"(?!\Z)[a-z0-9_.]{0,128}\*?")
_EMAIL: Final = re.compile(r"[A-Za-z0-9!#$%&'*+/=^_{|}~.-]{1,64}@[A-Za-z0-9][A-Za-z0-9.-]{0,252}")
_EAB_KID: Final = re.compile(r"[!-~]{0,1024}")
_WEBHOOK: Final = re.compile(r"https?://[!$-~]{1,2000}")
_STORE: Final = re.compile(
    r"memory|sqlite|((redis|rediss|valkey|valkeys)(\+(sentinel|cluster))?|((redis|valkey)\+)?unix)://.{1,1000}"
)


# --- what text is valid ----------------------------------------------------------------------------------


def is_loopback(host: str) -> bool:
    """Return whether a name or an address always means this machine."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return text.isprintable()


def _is_network(text: str) -> bool:
    if len(text) > MAX_NETWORK or not text.isascii() or "%" in text:
        return False
    ipaddress.ip_network(text)  # raises ValueError
    return True


def _is_certificate_name(text: str) -> bool:
    labels = text.removeprefix("*.").removesuffix(".").split(".")
    is_name = len(text) <= MAX_DNS_NAME + 1 and all(label.replace("-", "").isalnum() for label in labels)
    return is_name or _is_address(text)


def _is_site_name(name: str) -> bool:
    if len(name) > MAX_DNS_NAME:
        return False
    labels = name.split(".")
    if labels[0] == "*":
        labels = labels[1:]
        # `*.com` would cover a whole registry: clients refuse such certificates.
        if len(labels) < 2:
            return False
    # Clients read a name that ends in a number as an IPv4 address (RFC 1123, section 2.1).
    return all(map(_LABEL.fullmatch, labels)) and not _NUMBER.fullmatch(labels[-1])


def _read_path(text: str) -> Path:
    if len(text) > MAX_PATH or not text.isprintable():
        raise ValueError
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~name of an unknown user
        raise ValueError from None


def _is_webhook(text: str) -> bool:
    if text == "":
        return True
    parts = urlsplit(text)
    host, port = parts.hostname or "", parts.port  # both raise ValueError
    return (
        _WEBHOOK.fullmatch(text) is not None
        and port != 0
        and "@" not in parts.netloc
        and (_HOST_NAME.fullmatch(host) is not None or _is_address(host))
        and (parts.scheme == "https" or is_loopback(host))
    )


def _is_https_url(text: str) -> bool:
    return text.startswith("https:") and _is_webhook(text)


def is_issuer(text: str) -> bool:
    """Return whether a text is the address of an identity provider."""
    return text != "" and _is_webhook(text) and not {"?", "#"} & {*text}


def _is_command(arguments: tuple[str, ...]) -> bool:
    return all(map(str.isprintable, arguments)) and (not arguments or Path(arguments[0]).is_absolute())


# --- kinds of text ---------------------------------------------------------------------------------------

HOST_NAME: Final = text(
    'an address or a host name, such as "127.0.0.1", "::" or "server.example.com"',
    lambda name: _HOST_NAME.fullmatch(name) or _is_address(name),
)
NETWORK: Final = text(
    'a network or an address, such as "10.0.0.0/8", "2001:db8::/32" or "192.0.2.1", with no bit set behind the'
    " prefix",
    _is_network,
)
CERTIFICATE_NAME: Final = text(
    'a DNS name or an address, such as "server.example.com", "*.example.com" or "192.0.2.1"',
    _is_certificate_name,
)
"""Checked closely when a certificate is issued."""

SITE_NAME: Final = text(
    'a DNS name of letters, digits and hyphens, such as "a.example.com", or "*.example.com", where any one'
    " label may stand for the star",
    _is_site_name,
    lambda name: name.lower().removesuffix("."),
)
"""A name that clients send."""

PIN: Final = text(
    '"sha256/" and 44 characters of base64, for a public key, or "cert-sha256/" and such, for a whole'
    " certificate",
    _PIN.fullmatch,
)
"""The SHA-256 of a public key or of a certificate in its only form: pins are compared as text."""

VARIABLE_NAME: Final = optional(
    text(
        'the name of an environment variable, such as "SERVER_KEY_PASSPHRASE", that does not begin with ZCPROTO_',
        _VARIABLE.fullmatch,
    )
)
FILE_PATH: Final = text(
    'an absolute path, such as "/var/lib/zcproto" or "~/zcproto"', Path.is_absolute, _read_path
)
"""Absolute, since a relative path would mean another file when the server is started elsewhere."""

OPTIONAL_PATH: Final = optional(FILE_PATH)

STORE_URL: Final = text(
    '"sqlite", "memory", or an address that begins with redis://, rediss://, valkey:// or unix://, and with'
    " +sentinel or +cluster for several servers, such as valkey+sentinel://a,b/service",
    lambda url: url.isprintable() and _STORE.fullmatch(url),
)
"""The rest of an address is validated on connect."""

HTTPS_URL: Final = text(
    'an address such as "https://ca.example.com/directory", of printable ASCII and without a user or a fragment',
    _is_https_url,
)
EMAIL: Final = text('an e-mail address, such as "admin@example.com"', _EMAIL.fullmatch)
EAB_KID: Final = text('up to 1024 printable characters of ASCII, or ""', _EAB_KID.fullmatch)
WEBHOOK_URL: Final = text(
    'an address such as "https://alerts.example.com/zcproto", of printable ASCII and without a user or a'
    ' fragment; http:// is for this machine alone, such as "http://127.0.0.1:9000/"; or ""',
    _is_webhook,
)
BINDING: Final = text(
    '"off", "exact", or a prefix length such as "24"',
    lambda text: text in ("off", "exact") or (INTEGER.fullmatch(text) and 1 <= int(text) <= 128),
)
"""How much of a client's address a session is bound to."""

ISSUER_URL: Final = text(
    'the address of an identity provider, such as "https://login.example.com/realms/staff", of printable ASCII and'
    " without a user, a query or a fragment; http:// is for this machine alone",
    is_issuer,
)

ROLE_NAME: Final = text(f'the name of a role, such as "admin": {ROLE_WORDS}', is_role)

ROLE_OF_CLAIM: Final = text(
    'the name of a role, such as "admin", or a value of the claim, "=" and a role, such as "Finance Team=billing"',
    lambda value: value.isprintable() and len(value) <= _MAX_CLAIM and is_role(value.rpartition("=")[2]),
)

CLAIM_TEXT: Final = text(
    f"a text of 1 to {_MAX_CLAIM} printable characters",
    lambda value: value.isprintable() and 0 < len(value) <= _MAX_CLAIM,
)

USER_PREFIX: Final = text(
    'a text of up to 32 printable characters without spaces, such as "oidc:"',
    lambda value: value.isprintable() and len(value) <= 32 and " " not in value,
)

METHOD_PATTERN: Final = text(
    'the name of a method, such as "invoice.create", or its beginning and a star, such as "invoice.*" or "*"',
    _METHOD_PATTERN.fullmatch,
)

_ARGUMENTS: Final = core_schema.tuple_schema(
    [core_schema.str_schema(strict=True, max_length=4096)], variadic_item_index=0, max_length=64
)
COMMAND: Final = accepts(
    "a list of up to 64 texts, a program by its absolute path and its arguments, such as"
    ' ["/usr/local/bin/page", "--team", "ops"], or []',
    core_schema.no_info_after_validator_function(require(_is_command), _ARGUMENTS),
    from_variable=array_from,  # an argument may contain commas
)
"""A program with its arguments, run without a shell."""
