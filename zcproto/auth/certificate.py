"""The scheme `tls`: the client's certificate in this connection names the user.

What this file decides: whether that user may come in, and what the session is bound to.

Rules:
- TLS has verified the certificate: that is the proof. What is left to decide is whom it names.
- The user must be in the file of users now; the key that the file has is not asked for.
- A client may say whom it means to be. If the certificate names another one, nobody is let in.
- No certificate, one that names nobody, an unknown user and another user than meant get one answer. What it
  was is for the operator.
- Failures are counted for the user whom the certificate names, whatever the client says: nobody else's
  logins are slowed down by them.
- The session is bound to the certificate's public key: a certificate renewed with the same key goes on using it.

It must not know: how a certificate names a user, TLS, how often someone tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from zcproto.auth.current_users import CurrentUsers
from zcproto.auth.identity import MAX_USER, NO_CHANNEL, Channel, Identity
from zcproto.errors import CertificateError, InvalidArgument
from zcproto.sessions.session import CERTIFICATE_KEY

_FIELDS: Final = frozenset({"scheme", "client", "user"})


def certificate_key(certificate: bytes) -> str:
    """What the sessions that a certificate (DER) opens are bound to: its public key.

    Raises CertificateError if it cannot be read.
    """
    try:
        public_key = x509.load_der_x509_certificate(certificate).public_key()
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise CertificateError("the client's certificate has a key that cannot be read") from error
    info = public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return CERTIFICATE_KEY + sha256(info).hexdigest()


class CertificateAuthenticator:
    """Checks the user of a client certificate against a file of users.

    `user_of` gives the user whom a certificate (DER) names, `key_of` what the session is bound to; both raise
    CertificateError. `on_refused` is called with the reason and the client's address.
    """

    scheme: Final = "tls"

    __slots__ = ("_key_of", "_on_refused", "_user_of", "_users")

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
        """The user whom the certificate names; empty if it is nobody."""
        try:
            return self._named(channel)[0]
        except CertificateError:
            return ""

    async def authenticate(
        self, params: Mapping[str, Any], address: str, channel: Channel = NO_CHANNEL
    ) -> Identity | None:
        meant = _meant(params)
        try:
            user, certificate = self._named(channel)
            key = self._key_of(certificate)
        except CertificateError as error:
            self._on_refused(str(error), address)
            return None
        known = await self._users.find(user)
        if known is None:
            self._on_refused(f"the client's certificate names {user!r}, who is no user here", address)
            return None
        if meant is not None and meant != user:
            self._on_refused(
                f"the client's certificate names {user!r}, and the client means another", address
            )
            return None
        return Identity(user, known.operator, key)

    def _named(self, channel: Channel) -> tuple[str, bytes]:
        data = channel.certificate()
        if data is None:
            raise CertificateError("the client has shown no certificate")
        user = self._user_of(data)
        if not 0 < len(user) <= MAX_USER:
            raise CertificateError(f"the client's certificate names no user of 1 to {MAX_USER} characters")
        return user, data


def _meant(params: Mapping[str, Any]) -> str | None:
    user = params.get("user")
    if user is not None and (not isinstance(user, str) or not 0 < len(user) <= MAX_USER):
        raise InvalidArgument(f"user: the scheme tls takes a str of 1 to {MAX_USER} characters, or none")
    if not _FIELDS.issuperset(params):
        raise InvalidArgument("the scheme tls takes user, and nothing else")
    return user
