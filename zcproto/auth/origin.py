"""Compare what has opened a session with what would open it now.

Decides: which changes of a user or a device end sessions that an older copy of a store brings back.

Rules:
- The changes are those after which an entry counts as gone: another key, other roles. A removed or disabled user is
  refused by name.
- A prefix of a digest is enough: it is compared with one value, which only the operator chooses.
- A file that was changed and has not been read yet decides nothing: another process may have read it before it
  opened the session.

Must not know: sessions, stores.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from zcproto.auth.devices import RegisteredDevice
from zcproto.auth.directory import Directory
from zcproto.auth.users import User
from zcproto.common.roles import Roles
from zcproto.sessions.record import NO_ORIGIN, ORIGIN_SIZE
from zcproto.sessions.session import DEVICE_KEY

_CONTEXT: Final = b"zcproto origin 1\0"


@dataclass(frozen=True, slots=True)
class Origins:
    """The origins of sessions by the files of users and devices, as of the last reading."""

    users: Directory[User]
    devices: Directory[RegisteredDevice]

    def of(self, user: str, key: str) -> bytes:
        """Return the origin of a session that this user opens now. `key` is what it is bound to, empty for none."""
        known = self.users.known(user)
        if known is None:
            return NO_ORIGIN
        data = _CONTEXT + known.digest + _roles(known.roles)
        if key.startswith(DEVICE_KEY):
            device = self.devices.known(key.removeprefix(DEVICE_KEY))
            if device is None:
                return NO_ORIGIN
            data += device.public_key + (b"all" if device.roles is None else _roles(device.roles))
        return sha256(data).digest()[:ORIGIN_SIZE]

    def applies(self, user: str, key: str, origin: bytes) -> bool:
        """Return whether a session of this origin may be used."""
        return origin == self.of(user, key) or self.users.changed() or self.devices.changed()


def _roles(roles: Roles) -> bytes:
    return " ".join(sorted(roles)).encode() + b"\0"
