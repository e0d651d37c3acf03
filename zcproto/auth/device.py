"""Authenticate the scheme `ed25519`: a device signs for this connection, and proves its key on each further one.

Decides: whether a signature is by the device, and which user's session it opens or may use.

Rules:
- The signed message includes the connection's salt and the server's certificate, so that a signature replayed, or
  relayed through another server, is worthless (zcp1.md, section 9.4).
- An unknown device, a wrong signature and a device of an unknown user take the same steps and get the same answer.
  Only the operator learns the reason.
- The session is bound to the device: its token is valid only where the device has proved its key.
- A device proves its key for sessions of its own user only: its name may have belonged to another user before.
- Nothing here suspends unless a file has changed.

Must not know: connections, how many attempts there were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from zcproto.auth.devices import CurrentDevices, is_signed
from zcproto.auth.identity import MAX_USER, NO_CHANNEL, Channel, Identity
from zcproto.auth.users import CurrentUsers
from zcproto.errors import InvalidArgument
from zcproto.sessions.session import DEVICE_KEY
from zcproto.wire.message import SIGNATURE_SIZE, attach_message, open_message

_FIELDS: Final = frozenset({"scheme", "client", "device", "signature"})
_DECOY: Final = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
"""The key checked for unknown devices, RFC 8032's first public key. A valid signature still does not log in."""


class DeviceAuthenticator:
    """Checks devices against their file, and their users against the file of users.

    `on_refused` is called with the reason and the client's address.
    """

    scheme: Final = "ed25519"

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
        is_valid = _is_signed_any(_DECOY if device is None else device.public_key, signature, messages)
        if device is None:
            reason = "is unknown"
        elif not is_valid:
            reason = "sent a signature by another key, or for another connection or server"
        elif user is None:
            reason = f"belongs to {device.user!r}, who is not a user here"
        else:
            return Identity(device.user, user.operator, DEVICE_KEY + name)
        self._on_refused(f"the device {name!r} {reason}", address)
        return None

    async def attaches(self, key: str, user: str, signature: bytes, token: bytes, channel: Channel) -> bool:
        """Return whether the device to which a session of this user is bound has signed for this connection."""
        name = key.removeprefix(DEVICE_KEY)
        device = await self._devices.find(name)
        if name == key or (device is not None and device.user != user):
            device = None
        messages = [attach_message(channel.salt, leaf, token) for leaf in channel.leaves()]
        is_valid = _is_signed_any(_DECOY if device is None else device.public_key, signature, messages)
        return is_valid and device is not None

    def is_gone(self, key: str) -> bool:
        """Return whether a session's key belongs to a removed device, as of the last reading."""
        return key.startswith(DEVICE_KEY) and self._devices.known(key.removeprefix(DEVICE_KEY)) is None


def _is_signed_any(public_key: bytes, signature: bytes, messages: list[bytes]) -> bool:
    """Return whether the signature is over one of the messages."""
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
