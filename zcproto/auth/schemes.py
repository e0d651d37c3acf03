"""Authenticate the schemes `api_key`, `tls` and `ed25519` by the files of users and devices (zcp1.md, section 9.4).

Decides: whether a key is the user's, which user a client certificate opens sessions for, whether a signature is by
the device, and what the session is bound to.

Rules:
- An unknown user or device, and a wrong or malformed secret, take the same steps and get the same answer. Only the
  operator learns the reason.
- Nothing here suspends unless a file has changed.

Must not know: connections, TLS, how a certificate names a user, how many attempts there were.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from hmac import compare_digest
from typing import Any, ClassVar, Final, TypeGuard

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from zcproto.auth.devices import RegisteredDevice, is_signed
from zcproto.auth.directory import Directory
from zcproto.auth.identity import MAX_USER, NO_CHANNEL, Channel, Identity
from zcproto.auth.users import User
from zcproto.common.clock import Entropy, system_clock, system_entropy
from zcproto.errors import CertificateError, InvalidArgument
from zcproto.sessions.session import CERTIFICATE_KEY, DEVICE_KEY
from zcproto.sessions.token import DIGEST_SIZE, TOKEN_SIZE, digest_of, token_from_text
from zcproto.wire.message import SIGNATURE_SIZE, attach_message, open_message

MAX_KEY: Final = 128
"""Longest text accepted as a key, in characters: room for a typing error."""

LOOK_HOLDS_S: Final = 0.01
"""Seconds for which one look at the file suffices to accept keys. A session that a removed user opens within them
ends when directory.py finds the change."""

_API_KEY_FIELDS: Final = frozenset({"scheme", "client", "user", "key"})
_TLS_FIELDS: Final = frozenset({"scheme", "client", "user"})
_ED25519_FIELDS: Final = frozenset({"scheme", "client", "device", "signature"})
_NO_KEY: Final = bytes(TOKEN_SIZE)
_DECOY: Final = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
"""The key checked for unknown devices, RFC 8032's first public key. A valid signature still does not log in."""


class ApiKeyAuthenticator:
    """The scheme `api_key`: a user's name and a key of 32 random bytes, as text of 43 characters.

    A valid key is accepted without a look at the file if the last look is recent: concurrent logins share one. A
    key is never refused without a look, so that a new user is accepted immediately. `now` is monotonic seconds.
    """

    scheme: Final = "api_key"

    def __init__(
        self,
        users: Directory[User],
        *,
        entropy: Entropy = system_entropy,
        now: Callable[[], float] = system_clock.now,
    ) -> None:
        self._users = users
        self._decoy = entropy(DIGEST_SIZE)  # compared for unknown users; no key has this digest
        self._now = now
        self._looked_until = 0.0

    def authenticate(
        self, params: Mapping[str, Any], address: str, channel: Channel = NO_CHANNEL
    ) -> Identity | Awaitable[Identity | None] | None:
        user, key = params.get("user"), params.get("key")
        if not _is_name(user):
            raise InvalidArgument(f"user: the scheme api_key needs a str of 1 to {MAX_USER} characters")
        if not isinstance(key, str) or len(key) > MAX_KEY:
            raise InvalidArgument(f"key: the scheme api_key needs a str of at most {MAX_KEY} characters")
        if not _API_KEY_FIELDS.issuperset(params):
            raise InvalidArgument("the scheme api_key takes user and key, and nothing else")
        now = self._now()
        if now < self._looked_until:
            identity = self._identity(user, key)
            if identity is not None:
                return identity
        if self._users.changed():
            return self._after_reading(user, key)
        self._looked_until = now + LOOK_HOLDS_S
        return self._identity(user, key)

    async def _after_reading(self, user: str, key: str) -> Identity | None:
        await self._users.refresh()
        return self._identity(user, key)

    def _identity(self, user: str, key: str) -> Identity | None:
        known = self._users.known(user)
        secret = token_from_text(key)
        digest = digest_of(_NO_KEY if secret is None else secret)
        matches = compare_digest(digest, self._decoy if known is None else known.digest)
        if not matches or known is None or secret is None:
            return None
        return Identity(user, known.roles)


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


@dataclass(frozen=True, slots=True, eq=False)
class CertificateAuthenticator:
    """The scheme `tls`: the client's certificate in this connection, verified by TLS, names the user.

    The user must be in the file of users; a key there is not required. A client may send the user name that it
    expects. Failures are counted for the user named by the certificate, whatever the client sends, so that they
    never delay another user's logins. The session is bound to the certificate's public key, and survives a renewal
    with the same key.

    `user_of` returns the user named by a certificate (DER), `key_of` the binding of the session; both raise
    CertificateError. `on_refused` is called with the reason and the client's address.
    """

    users: Directory[User]
    user_of: Callable[[bytes], str]
    key_of: Callable[[bytes], str] = certificate_key
    on_refused: Callable[[str, str], None] = lambda reason, address: None
    scheme: ClassVar[str] = "tls"

    def user_named(self, params: Mapping[str, Any], channel: Channel) -> str:
        """Return the user named by the certificate, or an empty text."""
        try:
            return self._named(channel)[0]
        except CertificateError:
            return ""

    async def authenticate(
        self, params: Mapping[str, Any], address: str, channel: Channel = NO_CHANNEL
    ) -> Identity | None:
        expected = params.get("user")
        if expected is not None and not _is_name(expected):
            raise InvalidArgument(f"user: the scheme tls takes a str of 1 to {MAX_USER} characters, or none")
        if not _TLS_FIELDS.issuperset(params):
            raise InvalidArgument("the scheme tls takes user, and nothing else")
        try:
            user, certificate = self._named(channel)
            key = self.key_of(certificate)
        except CertificateError as error:
            self.on_refused(str(error), address)
            return None
        known = await self.users.find(user)
        if known is None:
            reason = "who is not a user here"
        elif expected is not None and expected != user:
            reason = "but the client expects another user"
        else:
            return Identity(user, known.roles, key)
        self.on_refused(f"the client's certificate names {user!r}, {reason}", address)
        return None

    def _named(self, channel: Channel) -> tuple[str, bytes]:
        data = channel.certificate()
        if data is None:
            raise CertificateError("the client sent no certificate")
        user = self.user_of(data)
        if not _is_name(user):
            raise CertificateError(f"the client's certificate names no user of 1 to {MAX_USER} characters")
        return user, data


@dataclass(frozen=True, slots=True, eq=False)
class DeviceAuthenticator:
    """The scheme `ed25519`: a device signs for this connection, and proves its key on each further one.

    The signed message includes the connection's salt and the server's certificate, so that a signature replayed, or
    relayed through another server, is worthless. The session is bound to the device: its token is valid only where
    the device has proved its key, and for its own user only, since its name may have belonged to another user.

    `on_refused` is called with the reason and the client's address.
    """

    devices: Directory[RegisteredDevice]
    users: Directory[User]
    on_refused: Callable[[str, str], None] = lambda reason, address: None
    scheme: ClassVar[str] = "ed25519"

    async def authenticate(
        self, params: Mapping[str, Any], address: str, channel: Channel = NO_CHANNEL
    ) -> Identity | None:
        name, signature = params.get("device"), params.get("signature")
        if not _is_name(name):
            raise InvalidArgument(f"device: the scheme ed25519 needs a str of 1 to {MAX_USER} characters")
        if not isinstance(signature, bytes) or len(signature) != SIGNATURE_SIZE:
            raise InvalidArgument(f"signature: the scheme ed25519 needs {SIGNATURE_SIZE} bytes")
        if not _ED25519_FIELDS.issuperset(params):
            raise InvalidArgument("the scheme ed25519 takes device and signature, and nothing else")
        device = await self.devices.find(name)
        user = await self.users.find("" if device is None else device.user)
        messages = [open_message(channel.salt, leaf, name) for leaf in channel.leaves()]
        is_valid = _has_signed_one(device, signature, messages)
        if device is None:
            reason = "is unknown"
        elif not is_valid:
            reason = "sent a signature by another key, or for another connection or server"
        elif user is None:
            reason = f"belongs to {device.user!r}, who is not a user here"
        else:
            return Identity(device.user, device.narrow(user.roles), DEVICE_KEY + name)
        self.on_refused(f"the device {name!r} {reason}", address)
        return None

    async def attaches(self, key: str, user: str, signature: bytes, token: bytes, channel: Channel) -> bool:
        """Return whether the device to which a session of this user is bound has signed for this connection."""
        name = key.removeprefix(DEVICE_KEY)
        device = await self.devices.find(name)
        if name == key or (device is not None and device.user != user):
            device = None
        messages = [attach_message(channel.salt, leaf, token) for leaf in channel.leaves()]
        return _has_signed_one(device, signature, messages) and device is not None

    def is_gone(self, key: str) -> bool:
        """Return whether a session's key belongs to a removed device, as of the last reading."""
        return key.startswith(DEVICE_KEY) and not self.devices.is_known(key.removeprefix(DEVICE_KEY))


def _has_signed_one(device: RegisteredDevice | None, signature: bytes, messages: list[bytes]) -> bool:
    public_key = _DECOY if device is None else device.public_key
    return any(is_signed(public_key, signature, message) for message in messages)


def _is_name(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and 0 < len(value) <= MAX_USER
