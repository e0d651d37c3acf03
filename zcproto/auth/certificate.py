"""Authenticate the scheme `tls`: the client's certificate in this connection names the user.

Decides: whether that user may log in, and what the session is bound to.

Rules:
- TLS has verified the certificate, which is the proof. This module only decides which user it names.
- The user must be in the file of users; a key in that file is not required.
- A client may send the user name that it expects. The login fails if the certificate names another user.
- A missing certificate, one without a user, an unknown user and an unexpected user get the same answer. Only the
  operator learns the reason.
- Failures are counted for the user named by the certificate, whatever the client sends, so that they never delay
  another user's logins.
- The session is bound to the certificate's public key, and survives a renewal with the same key.

Must not know: how a certificate names a user, TLS, how many attempts there were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from zcproto.auth.identity import MAX_USER, NO_CHANNEL, Channel, Identity
from zcproto.auth.users import CurrentUsers
from zcproto.errors import CertificateError, InvalidArgument
from zcproto.sessions.session import CERTIFICATE_KEY

_FIELDS: Final = frozenset({"scheme", "client", "user"})


def certificate_key(certificate: bytes) -> str:
    """Return the binding of sessions opened with a certificate (DER): the digest of its public key.

    Raises CertificateError if the key cannot be read.
    """
    try:
        public_key = x509.load_der_x509_certificate(certificate).public_key()
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise CertificateError("the client's certificate has a key that cannot be read") from error
    info = public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return CERTIFICATE_KEY + sha256(info).hexdigest()


class CertificateAuthenticator:
    """Checks the user of a client certificate against a file of users.

    `user_of` returns the user named by a certificate (DER), `key_of` the binding of the session; both raise
    CertificateError. `on_refused` is called with the reason and the client's address.
    """

    scheme: Final = "tls"

    def __init__(
        self,
        users: CurrentUsers,
        user_of: Callable[[bytes], str],
        *,
        key_of: Callable[[bytes], str] = certificate_key,
        on_refused: Callable[[str, str], None] = lambda reason, address: None,
    ) -> None:
        self._users = users
        self._user_of = user_of
        self._key_of = key_of
        self._on_refused = on_refused

    def user_named(self, channel: Channel) -> str:
        """Return the user named by the certificate, or an empty text."""
        try:
            return self._named(channel)[0]
        except CertificateError:
            return ""

    async def authenticate(
        self, params: Mapping[str, Any], address: str, channel: Channel = NO_CHANNEL
    ) -> Identity | None:
        expected = _expected_user(params)
        try:
            user, certificate = self._named(channel)
            key = self._key_of(certificate)
        except CertificateError as error:
            self._on_refused(str(error), address)
            return None
        known = await self._users.find(user)
        if known is None:
            self._on_refused(f"the client's certificate names {user!r}, who is not a user here", address)
            return None
        if expected is not None and expected != user:
            self._on_refused(
                f"the client's certificate names {user!r}, but the client expects another user", address
            )
            return None
        return Identity(user, known.operator, key)

    def _named(self, channel: Channel) -> tuple[str, bytes]:
        data = channel.certificate()
        if data is None:
            raise CertificateError("the client sent no certificate")
        user = self._user_of(data)
        if not 0 < len(user) <= MAX_USER:
            raise CertificateError(f"the client's certificate names no user of 1 to {MAX_USER} characters")
        return user, data


def _expected_user(params: Mapping[str, Any]) -> str | None:
    user = params.get("user")
    if user is not None and (not isinstance(user, str) or not 0 < len(user) <= MAX_USER):
        raise InvalidArgument(f"user: the scheme tls takes a str of 1 to {MAX_USER} characters, or none")
    if not _FIELDS.issuperset(params):
        raise InvalidArgument("the scheme tls takes user, and nothing else")
    return user
