"""Store devices in `devices.toml`: names, users, public keys.

    [devices.laptop]
    user = "alice"
    public_key = "47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU"
    added = 2026-01-01T12:00:00Z
    roles = ["reader"]

Decides: how devices are read, added, changed and removed, and which bytes are a public key.

Rules:
- A device's name is unique among all users. Its public key is an Ed25519 key of 32 bytes. Points of small order are
  refused: anyone can sign for them.
- A device has the roles of its user; with `roles` only those of them that it lists.
- A device is gone if removed or given another user, key or roles.

Must not know: sessions, who tries to log in.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from zcproto.auth.files import (
    RewrittenFile,
    is_moment,
    name_faults,
    quoted,
    roles_faults,
    toml_key,
    toml_moment,
    toml_roles,
)
from zcproto.common.roles import Roles
from zcproto.common.text import toml_string
from zcproto.sessions.token import token_from_text, token_text
from zcproto.wire.message import PUBLIC_KEY_SIZE

_P: Final = 2**255 - 19
_D: Final = -121665 * pow(121666, -1, _P) % _P
_SIGN: Final = 1 << 255
_ORDER_8: Final = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
_SMALL_ORDER: Final = frozenset({0, 1, _P - 1, _ORDER_8, _P - _ORDER_8})
"""The y of the eight points whose order divides 8."""


class RegisteredDevice(NamedTuple):
    """A device as stored."""

    user: str
    public_key: bytes
    added: datetime
    """Aware, in UTC."""
    roles: Roles | None = None
    """The roles of its user that it has; None for all of them."""

    def narrow(self, roles: Roles) -> Roles:
        """Return the roles of this device, given those of its user."""
        return roles if self.roles is None else roles & self.roles

    def as_dict(self, name: str) -> dict[str, Any]:
        """Return this device as lists show it."""
        return {
            "name": name,
            "user": self.user,
            "public_key": token_text(self.public_key),
            "added": f"{self.added:%Y-%m-%dT%H:%M:%SZ}",
            "roles": None if self.roles is None else sorted(self.roles),
        }


class DeviceFile(RewrittenFile[RegisteredDevice]):
    """Devices in a file."""

    what = "file of devices"
    kind = "device"
    keys = ("user", "public_key", "added", "roles")
    max_bytes = 64 << 20
    """Enough for about 400,000 devices."""
    header = "# The devices that may open sessions. Written by zcproto: comments are lost.\n"

    def read_names(self) -> list[str]:
        """Return the names that are in the file now. `entries` stays as it is."""
        return list(self._read()[2])

    @staticmethod
    def is_gone(before: RegisteredDevice, now: RegisteredDevice | None) -> bool:
        return now is None or (now.user, now.public_key, now.roles) != (
            before.user,
            before.public_key,
            before.roles,
        )

    def _parse_values(self, table: dict[str, Any]) -> RegisteredDevice | list[str]:
        user, public_key, added, roles = (table.get(key) for key in self.keys)
        faults = [] if roles is None else roles_faults(roles)
        if not isinstance(user, str) or name_faults(user):
            faults.append("user must be the name of a user")
        raw = token_from_text(public_key) if isinstance(public_key, str) else None
        if raw is None or not is_public_key(raw):
            faults.append("public_key must be 43 characters of base64url, an Ed25519 public key")
        if not is_moment(added):
            faults.append("added must be a date and time with an offset, such as 2026-01-01T12:00:00Z")
        if faults:
            return faults
        assert raw is not None
        narrowed = None if roles is None else frozenset(roles)
        return RegisteredDevice(table["user"], raw, table["added"].astimezone(UTC), narrowed)

    def add(self, name: str, user: str, public_key: bytes, added: datetime) -> None:
        """Add a device. Raises AlreadyExists for a name in use."""
        faults = [*name_faults(name), *name_faults(user)]
        if not is_public_key(public_key):
            faults.append("the public key is not an Ed25519 key")
        if faults:
            raise self._fault(*(f"device {quoted(name)}: {fault}" for fault in faults))
        with self._changing() as devices:
            self._add(name, RegisteredDevice(user, public_key, added.astimezone(UTC)), devices)

    def set_roles(self, name: str, roles: Roles | None) -> RegisteredDevice:
        """Narrow a device to some roles of its user, or with None to all. Return the device as it was before.

        Raises NotFound for an unknown name.
        """
        with self._changing() as devices:
            before = self._known(devices, name)
            devices[name] = before._replace(roles=roles)
        return before

    @staticmethod
    def _text_of(name: str, entry: RegisteredDevice) -> str:
        return (
            f"\n[devices.{toml_key(name)}]\n"
            f"user = {toml_string(entry.user)}\n"
            f'public_key = "{token_text(entry.public_key)}"\n'
            f"added = {toml_moment(entry.added)}\n"
            + ("" if entry.roles is None else f"roles = {toml_roles(entry.roles)}\n")
        )


def is_public_key(data: bytes) -> bool:
    """Return whether bytes are the canonical encoding of a curve point that is not of small order (RFC 8032)."""
    if len(data) != PUBLIC_KEY_SIZE:
        return False
    y = int.from_bytes(data, "little") & ~_SIGN
    if y >= _P or y in _SMALL_ORDER:
        return False
    x_squared = (y * y - 1) * pow(_D * y * y + 1, -1, _P) % _P
    return pow(x_squared, (_P - 1) // 2, _P) == 1


def is_signed(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Return whether a signature over a message is valid for a public key."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except InvalidSignature:
        return False
    return True
