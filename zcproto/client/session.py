"""A session as its client knows it, and what opens one."""

from __future__ import annotations

import base64
from typing import Any, Final, Protocol

from zcproto.client.device import Device
from zcproto.common.secret import SecretBytes, SecretText
from zcproto.errors import Code, ConfigError, ProtocolError
from zcproto.wire.frame import TOKEN_SIZE
from zcproto.wire.signing import attach_message, open_message

_MS: Final = 1000
REFRESH_AT: Final = 0.8
"""The part of a session's life after which it is refreshed ahead of its end."""

_FOREVER: Final = float("inf")


class Channel(Protocol):
    """A connection, as what ties a proof to it."""

    @property
    def salt(self) -> bytes: ...

    @property
    def leaf(self) -> bytes: ...


class Credentials(Protocol):
    """What a client shows to open a session."""

    def params(self, channel: Channel) -> dict[str, Any]:
        """The params of `session.open` on this connection, but for `client`."""
        ...


class ApiKey:
    """A user's name and key. The key is in no repr."""

    __slots__ = ("_key", "user")

    def __init__(self, user: str, key: str) -> None:
        self.user = user
        self._key = SecretText(key)

    def __repr__(self) -> str:
        return f"ApiKey(user={self.user!r})"

    def params(self, channel: Channel) -> dict[str, Any]:
        return {"scheme": "api_key", "user": self.user, "key": self._key}


class Certificate:
    """The client certificate that each connection shows. `user` is whom it must name, if that is to be checked."""

    __slots__ = ("user",)

    def __init__(self, user: str | None = None) -> None:
        self.user = user

    def __repr__(self) -> str:
        return f"Certificate(user={self.user!r})"

    def params(self, channel: Channel) -> dict[str, Any]:
        return {"scheme": "tls"} if self.user is None else {"scheme": "tls", "user": self.user}


class DeviceKey:
    """A device that was enrolled under a name: it signs for each connection."""

    __slots__ = ("_device", "name")

    def __init__(self, device: Device, name: str) -> None:
        self._device = device
        self.name = name

    def __repr__(self) -> str:
        return f"DeviceKey(name={self.name!r})"

    def params(self, channel: Channel) -> dict[str, Any]:
        signature = self._device.sign(open_message(channel.salt, channel.leaf, self.name))
        return {"scheme": "ed25519", "device": self.name, "signature": signature}

    def attach_params(self, channel: Channel, token: bytes) -> dict[str, Any]:
        """The params of `session.attach`."""
        return {"signature": self._device.sign(attach_message(channel.salt, channel.leaf, token))}


def choose_credentials(
    user: str | None,
    key: str | None,
    *,
    has_certificate: bool,
    device: Device | None = None,
    device_name: str | None = None,
) -> Credentials | None:
    """What opens sessions: the device, the key, or without them the certificate; None if there is none of them.

    Raises ConfigError for a user without any, for a key without its user, and for a device that is not alone or has
    no name.
    """
    if device is not None and device_name is not None:
        if user is not None or key is not None:
            raise ConfigError(["device: it says whose sessions it opens; leave out user and key"])
        return DeviceKey(device, device_name)
    if device is not None:
        raise ConfigError(["device: give device_name, the name under which it was enrolled, too"])
    if device_name is not None:
        raise ConfigError(["device_name: give the device, or the file of its key, too"])
    if key is not None and user is not None:
        return ApiKey(user, key)
    if key is not None:
        raise ConfigError(["key: give its user, too"])
    if has_certificate:
        return Certificate(user)
    if user is not None:
        raise ConfigError(["user: give its key, or a certificate"])
    return None


class ClientSession:
    """An open session.

    `id` is public; `expires_at` and `refresh_expires_at` are milliseconds since the Unix epoch by the server's
    clock; `idle_timeout_ms` is 0 if the session does not end for not being used. The times below are in
    monotonic seconds of this client.
    """

    __slots__ = (
        "_ends",
        "_idle_s",
        "_refresh_ends",
        "_refresh_token",
        "_token",
        "bound",
        "expires_at",
        "good_until",
        "id",
        "idle_timeout_ms",
        "refresh_at",
        "refresh_expires_at",
        "user",
    )

    def __init__(self, result: Any, *, server_wall: int, now: float, jitter: float) -> None:
        """From the result of `session.open` or `session.refresh`. `jitter` is from 0 to 1.

        Raises ProtocolError if the result is not as the contract says.
        """
        fields = _check_opened(result)
        self._token = SecretBytes(fields["token"])
        spare = fields["refresh_token"]
        self._refresh_token = None if spare is None else SecretBytes(spare)
        self.id: str = fields["id"]
        self.user: str = fields["user"]
        self.expires_at: int = fields["expires_at"]
        self.idle_timeout_ms: int = fields["idle_timeout_ms"]
        self.refresh_expires_at: int | None = fields["refresh_expires_at"]
        self.bound: bool = fields["bound"]
        life = max(0, self.expires_at - server_wall) / _MS
        self._ends = now + life
        self._idle_s = self.idle_timeout_ms / _MS if self.idle_timeout_ms else _FOREVER
        self.good_until = min(self._ends, now + self._idle_s)
        self._refresh_ends = _FOREVER
        if self.refresh_expires_at is not None:
            self._refresh_ends = now + max(0, self.refresh_expires_at - server_wall) / _MS
        self.refresh_at = now + life * (REFRESH_AT + (1 - REFRESH_AT) / 4 * jitter)

    def __repr__(self) -> str:
        return f"ClientSession(id={self.id!r}, user={self.user!r}, expires_at={self.expires_at})"

    @property
    def token(self) -> str:
        """The token as text: base64url without padding, as HTTP's `Authorization: Bearer` takes it."""
        return base64.urlsafe_b64encode(self._token).rstrip(b"=").decode()

    @property
    def token_bytes(self) -> bytes:
        return self._token

    @property
    def refresh_token_bytes(self) -> bytes | None:
        return self._refresh_token

    def used(self, now: float) -> None:
        """The server saw the token just now."""
        self.good_until = min(self._ends, now + self._idle_s)

    def expire(self) -> None:
        """The server says that it is over."""
        self.good_until = self._ends = -_FOREVER

    def can_refresh(self, now: float) -> bool:
        return self._refresh_token is not None and now < self._refresh_ends

    def drop_refresh_token(self) -> None:
        """It may be spent: used a second time, it would end the whole family of tokens."""
        self._refresh_token = None


def _check_opened(result: Any) -> dict[str, Any]:
    fields: dict[str, Any] = result if result.__class__ is dict else {}
    token, refresh_token = fields.get("token"), fields.get("refresh_token")
    refresh_expires_at = fields.get("refresh_expires_at")
    if not (
        token.__class__ is bytes
        and len(fields["token"]) == TOKEN_SIZE
        and fields.get("id").__class__ is str
        and fields.get("user").__class__ is str
        and fields.get("expires_at").__class__ is int
        and fields.get("idle_timeout_ms").__class__ is int
        and fields.get("bound").__class__ is bool
        and (refresh_token is None or (refresh_token.__class__ is bytes and len(refresh_token) == TOKEN_SIZE))
        and (refresh_expires_at is None or refresh_expires_at.__class__ is int)
    ):
        raise ProtocolError(Code.PROTOCOL_ERROR, "the server's answer to session.open is not as it must be")
    return {"refresh_token": None, "refresh_expires_at": None, **fields}
