"""The scheme `tls`: the client's certificate in this connection names the user.

What this file decides: whether that user may come in.

Rules:
- TLS has verified the certificate: that is the proof. What is left to decide is whom it names.
- The user must be in the file of users now; the key that the file has is not asked for.
- A client may say whom it means to be. If the certificate names another one, nobody is let in.
- No certificate, one that names nobody, an unknown user and another user than meant get one answer. What it
  was is for the operator.
- Failures are counted for the user whom the certificate names, whatever the client says: nobody else's
  logins are slowed down by them.

It must not know: how a certificate names a user, TLS, how often someone tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from zcproto.auth.current_users import CurrentUsers
from zcproto.auth.identity import MAX_USER, Identity, PeerCertificate, no_certificate
from zcproto.errors import CertificateError, InvalidArgument

_FIELDS: Final = frozenset({"scheme", "client", "user"})


class CertificateAuthenticator:
    """Checks the user of a client certificate against a file of users.

    `user_of` gives the user whom a certificate (DER) names, or raises CertificateError. `on_refused` is
    called with the reason and the client's address.
    """

    scheme: Final = "tls"

    __slots__ = ("_on_refused", "_user_of", "_users")

    def __init__(
        self,
        users: CurrentUsers,
        user_of: Callable[[bytes], str],
        *,
        on_refused: Callable[[str, str], None] = lambda reason, address: None,
    ) -> None:
        self._users = users
        self._user_of = user_of
        self._on_refused = on_refused

    def user_named(self, certificate: PeerCertificate) -> str:
        """The user whom the certificate names; empty if it is nobody."""
        try:
            return self._named(certificate)
        except CertificateError:
            return ""

    async def authenticate(
        self, params: Mapping[str, Any], address: str, certificate: PeerCertificate = no_certificate
    ) -> Identity | None:
        meant = _meant(params)
        try:
            user = self._named(certificate)
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
        return Identity(user, known.operator)

    def _named(self, certificate: PeerCertificate) -> str:
        data = certificate()
        if data is None:
            raise CertificateError("the client has shown no certificate")
        user = self._user_of(data)
        if not 0 < len(user) <= MAX_USER:
            raise CertificateError(f"the client's certificate names no user of 1 to {MAX_USER} characters")
        return user


def _meant(params: Mapping[str, Any]) -> str | None:
    user = params.get("user")
    if user is not None and (not isinstance(user, str) or not 0 < len(user) <= MAX_USER):
        raise InvalidArgument(f"user: the scheme tls takes a str of 1 to {MAX_USER} characters, or none")
    if not _FIELDS.issuperset(params):
        raise InvalidArgument("the scheme tls takes user, and nothing else")
    return user
