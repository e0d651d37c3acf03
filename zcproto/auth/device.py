"""The scheme `ed25519`: a device signs for this connection, and proves its key again on each further one.

What this file decides: whether a signature is by the device, and whose session that opens or may use.

Rules:
- What is signed has the connection's salt and the certificate that the server showed in it: a signature that was
  seen elsewhere, or relayed through another server, is worth nothing (wire.md section 6).
- An unknown device, a wrong signature and a device of a user who is unknown now take the same steps and get one
  answer. What it was is for the operator.
- The session is bound to the device: its token is good only where the device proved its key.
- A device proves its key for sessions of its own user alone: its name may have been another's before.
- While the files do not change, nothing here suspends.

It must not know: connections, how often someone tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from zcproto.auth.current_users import CurrentUsers
from zcproto.auth.devices import CurrentDevices
from zcproto.auth.ed25519 import is_signed
from zcproto.auth.identity import MAX_USER, NO_CHANNEL, Channel, Identity
from zcproto.errors import InvalidArgument
from zcproto.sessions.session import DEVICE_KEY
from zcproto.wire.signing import SIGNATURE_SIZE, attach_message, open_message

_FIELDS: Final = frozenset({"scheme", "client", "device", "signature"})
_NOBODY: Final = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
"""What unknown devices are checked with: RFC 8032's first public key. What it signs counts for nothing."""


class DeviceAuthenticator:
    """Checks devices against their file, and their users against that of users.

    `on_refused` is called with the reason and the client's address.
    """

    scheme: Final = "ed25519"

    __slots__ = ("_devices", "_on_refused", "_users")

    def __init__(
        self,
        devices: CurrentDevices,
        users: CurrentUsers,
        *,
        on_refused: Callable[[str, str], None] = lambda reason, address: None,
    ) -> None:
        self._devices = devices
        self._users = users
        self._on_refused = on_refused

    async def authenticate(
        self, params: Mapping[str, Any], address: str, channel: Channel = NO_CHANNEL
    ) -> Identity | None:
        name, signature = _fields(params)
        device = await self._devices.find(name)
        user = await self._users.find("" if device is None else device.user)
        messages = [open_message(channel.salt, leaf, name) for leaf in channel.leaves()]
        fits = _fits(_NOBODY if device is None else device.public_key, signature, messages)
        if device is None:
            reason = "is not known here"
        elif not fits:
            reason = "gives a signature that is by another key, or for another connection or server"
        elif user is None:
            reason = f"is of {device.user!r}, who is no user here"
        else:
            return Identity(device.user, user.operator, DEVICE_KEY + name)
        self._on_refused(f"the device {name!r} {reason}", address)
        return None

    async def attaches(self, key: str, user: str, signature: bytes, token: bytes, channel: Channel) -> bool:
        """Whether the signature is by the device that a session of this user is bound to, for this connection."""
        name = key.removeprefix(DEVICE_KEY)
        device = await self._devices.find(name)
        if name == key or (device is not None and device.user != user):
            device = None
        messages = [attach_message(channel.salt, leaf, token) for leaf in channel.leaves()]
        fits = _fits(_NOBODY if device is None else device.public_key, signature, messages)
        return fits and device is not None

    def is_gone(self, key: str) -> bool:
        """Whether a session's key is that of a device which was removed, as of the last look."""
        return key.startswith(DEVICE_KEY) and self._devices.known(key.removeprefix(DEVICE_KEY)) is None


def _fits(public_key: bytes, signature: bytes, messages: list[bytes]) -> bool:
    """Whether the signature is over one of the messages. For one that is over none, all are tried."""
    return any(is_signed(public_key, signature, message) for message in messages)


def _fields(params: Mapping[str, Any]) -> tuple[str, bytes]:
    device, signature = params.get("device"), params.get("signature")
    if not isinstance(device, str) or not 0 < len(device) <= MAX_USER:
        raise InvalidArgument(f"device: the scheme ed25519 needs a str of 1 to {MAX_USER} characters")
    if not isinstance(signature, bytes) or len(signature) != SIGNATURE_SIZE:
        raise InvalidArgument(f"signature: the scheme ed25519 needs {SIGNATURE_SIZE} bytes")
    if not _FIELDS.issuperset(params):
        raise InvalidArgument("the scheme ed25519 takes device and signature, and nothing else")
    return device, signature
