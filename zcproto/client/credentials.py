"""What opens a session: an API key, a client certificate, the key of a device, or a scheme of the application; and
the file that keeps a session, so that a client continues it after a restart.

Decides: how the file of a device key is created and which one is accepted; whether the session of a file belongs to
the server and the credentials of this client.

Rules:
- A device key is Ed25519 in PKCS#8 PEM without a passphrase, in a new file that only its owner can read.
- Keys are in no repr and no message; a device key signs and never leaves its object.
- A session file has mode 0600 and is replaced atomically. One that others can read is refused. One client uses it
  at a time, by a lock beside it; others have sessions of their own, which they do not keep. A session of another
  server or user, or one that cannot be parsed, is ignored and replaced.

Must not know: connections, when a session is opened or refreshed.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import re
import stat
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import scrypt
from inspect import isawaitable
from pathlib import Path
from typing import Any, Final, Protocol

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from zcproto.common.files import (
    UnusableFileError,
    file_errors,
    is_private,
    new_file,
    private_command,
    read_file,
    replace_file,
    try_lock,
)
from zcproto.common.secret import SecretText
from zcproto.common.text import escape_text
from zcproto.errors import CertificateError, ConfigError, LoginError
from zcproto.wire.message import MessageError, attach_message, encode_body, open_message

MAX_KEY_FILE: Final = 1 << 16
MAX_KEY: Final = 4_096
"""Characters read from the file of an API key: a key is much shorter, and a wrong file may be huge."""

FILE_VERSION: Final = 1
MAX_SESSION_FILE: Final = 16_384
MAX_POSITIONS: Final = 64
"""Durable streams whose positions a client keeps: those that it has read last."""

_FILE_BYTES: Final = ("token", "refresh_token")

LOGIN_HOLDS: Final = 10.0
"""Seconds for which a login that a function has returned may wait for a connection. Then the function is called
again: a ticket may be short-lived."""


class Device:
    """The key of a device. Make one with `create`, once, and read it with `load` afterwards.

        device = zcproto.Device.create("laptop.key")
        await zcproto.enroll("host:7443", code, device, "laptop", ca_file="ca.crt")

    `public_key` is its 32 bytes, by which servers identify it.
    """

    __slots__ = ("_key", "public_key")

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key: Final = key.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        return f"Device(public_key={self.public_key.hex()!r})"

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> Device:
        """Create a device and a new file of mode 0600 for its key. Raises CertificateError if that fails."""
        path = Path(path)
        key = Ed25519PrivateKey.generate()
        try:
            with new_file(path) as file:
                file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        except FileExistsError:
            raise _unusable(path, "exists already; load it, or name another file") from None
        except (OSError, ValueError) as error:
            raise _unusable(path, f"cannot be written: {_reason(error)}; check the path") from error
        return cls(key)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Device:
        """Read a device from the file of its key. Raises CertificateError if it cannot be used."""
        path = Path(path)
        try:
            data, _ = read_file(path, MAX_KEY_FILE)
        except UnusableFileError as error:
            raise CertificateError(str(error)) from error
        except (OSError, ValueError) as error:
            raise _unusable(path, f"cannot be read: {_reason(error)}; check the path") from error
        try:
            key = load_pem_private_key(data, None)
        except TypeError:
            raise _unusable(path, "is encrypted; use a device key without a passphrase") from None
        except (ValueError, UnsupportedAlgorithm):
            raise _unusable(
                path, "does not contain a private key in PEM; create one with Device.create"
            ) from None
        if not isinstance(key, Ed25519PrivateKey):
            raise _unusable(path, "is not an Ed25519 key; create one with Device.create")
        return cls(key)

    def sign(self, message: bytes) -> bytes:
        """Return a signature of 64 bytes (RFC 8032)."""
        return self._key.sign(message)


def _unusable(path: Path, reason: str) -> CertificateError:
    return CertificateError(f"{escape_text(str(path))}: {reason}")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__


class SigningChannel(Protocol):
    """The values of a connection that a device signs, so that the signature is valid on that connection only."""

    @property
    def salt(self) -> bytes: ...

    @property
    def leaf(self) -> bytes: ...


_KEY: Final = re.compile("[A-Za-z0-9_-]{43}")


def read_key_file(path: str | Path) -> str:
    """Return the API key in a file. Raises ConfigError."""
    path = Path(path)
    where = escape_text(str(path))
    # Not common.files.read_secret: a pipe such as <(pass show key) is a valid key file.
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISREG(status.st_mode) and not is_private(path, status):
                raise ConfigError([f"{where}: others can read this key; run: {private_command(path)}"])
            return usable_key(file.read(MAX_KEY), where)
    except OSError as error:
        if _KEY.fullmatch(str(path)):  # a secret, which neither the message nor the cause may show
            raise ConfigError(
                ["key_file: this is the key itself; give the path of a file that holds it"]
            ) from None
        raise ConfigError([f"{where}: {error.strerror}; check the path of the key file"]) from error
    except ValueError as error:
        raise ConfigError([f"{where}: not a path; give the path of the key file"]) from error


def usable_key(text: str, where: str) -> str:
    """Return the API key in a text from `where`, without white space around it. Raises ConfigError."""
    key = text.strip()
    if not key:
        raise ConfigError([f"{where}: holds no key; write the key into it, alone"])
    if "-----BEGIN " in key:
        raise ConfigError(
            [
                f"{where}: holds PEM, and no API key; give a device's key as device, a certificate's as"
                " certificate_key"
            ]
        )
    if key.splitlines() != [key]:
        raise ConfigError([f"{where}: has more than one line; write the key into it, alone"])
    return key


@dataclass(frozen=True, slots=True)
class ApiKey:
    """The name of a user and the key."""

    user: str
    key: SecretText = field(repr=False)

    def params(self, channel: SigningChannel) -> dict[str, Any]:
        return {"scheme": "api_key", "user": self.user, "key": self.key}


@dataclass(frozen=True, slots=True)
class CertificateLogin:
    """The client certificate, which TLS has presented already. The server checks that it names `user`, if given."""

    user: str | None = None

    def params(self, channel: SigningChannel) -> dict[str, Any]:
        return {"scheme": "tls"} if self.user is None else {"scheme": "tls", "user": self.user}


@dataclass(frozen=True, slots=True)
class DeviceKey:
    """A device and the name under which it was enrolled. It signs for each connection."""

    device: Device = field(repr=False)
    name: str

    def params(self, channel: SigningChannel) -> dict[str, Any]:
        signature = self.device.sign(open_message(channel.salt, channel.leaf, self.name))
        return {"scheme": "ed25519", "device": self.name, "signature": signature}

    def attach_params(self, channel: SigningChannel, token: bytes) -> dict[str, Any]:
        """Return the params of `session.attach`."""
        return {"signature": self.device.sign(attach_message(channel.salt, channel.leaf, token))}


LoginParams = Mapping[str, Any]
"""The params of `session.open`: `scheme`, and the fields of the scheme."""

LoginSource = LoginParams | Callable[[], LoginParams | Awaitable[LoginParams]]
"""A login, or a function that returns another one for each session."""


class SchemeLogin:
    """A login by a scheme of the application.

    A function is called for each `session.open`: `fetch` it first. Raises ConfigError for a login that cannot be
    sent.
    """

    __slots__ = ("_fetched", "_holds_until", "_source", "is_fetching")

    def __init__(self, source: LoginSource) -> None:
        self._source = source
        self.is_fetching = False
        self._fetched: LoginParams = {}
        self._holds_until = -math.inf
        if not callable(source):
            if fault := _login_fault(source):
                raise ConfigError([f"login: {fault}"])
            self._fetched, self._holds_until = source, math.inf

    def __repr__(self) -> str:
        return "SchemeLogin()"

    def is_fetched(self, now: float) -> bool:
        """Return whether `params` may be called. A login that waited too long for a connection is discarded."""
        return now < self._holds_until

    async def fetch(self, now: Callable[[], float]) -> None:
        """Call the function. Raises LoginError."""
        assert callable(self._source), "a mapping is always fetched"
        self.is_fetching = True
        try:
            found = self._source()
            login = await found if isawaitable(found) else found
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise LoginError("login: the function was cancelled; find out by what") from None
        except Exception as error:
            raise LoginError(f"login: the function raised {type(error).__name__}; see the cause") from error
        finally:
            self.is_fetching = False
        if fault := _login_fault(login):
            raise LoginError(f"login: the function returned what cannot be sent: {fault}")
        self._fetched, self._holds_until = login, now() + LOGIN_HOLDS

    def params(self, channel: SigningChannel) -> dict[str, Any]:
        if callable(self._source):
            self._holds_until = -math.inf  # each login is sent once
        return dict(self._fetched)

    def digest(self) -> str:
        """Return a digest of a mapping that is slow to guess a password from; empty for a function."""
        if callable(self._source):
            return ""
        login = encode_body(dict(sorted(self._source.items())))
        return scrypt(login, salt=b"zcproto login", n=1 << 14, r=8, p=1, dklen=16).hex()


def _login_fault(login: object) -> str:
    """Return why a login cannot be sent, without its values; an empty text if it can."""
    if not isinstance(login, Mapping):
        return f"give a mapping with 'scheme' and its fields, not {type(login).__name__}"
    if not isinstance(login.get("scheme"), str):
        return "'scheme' is missing; give the name of the server's scheme"
    if "client" in login:
        return "'client' is the product and version of the client; use connect(client=...)"
    if not all(isinstance(name, str) for name in login):
        return "the name of a field is not a str"
    try:
        encode_body(dict(login))
    except MessageError as error:
        return f"{error}; send msgpack types"
    return ""


Credentials = ApiKey | CertificateLogin | DeviceKey | SchemeLogin
"""What a client presents to open a session. `params` returns the params of `session.open`, without `client`."""


class SessionFile:
    """The session of one client of `server` with these credentials. Methods access the disk."""

    def __init__(self, path: str | Path, server: str, credentials: Credentials) -> None:
        self._path = Path(path)
        self._credentials = credentials
        self._about = {"version": FILE_VERSION, "server": server}
        self._lock: int | None = None
        self._is_closed = False

    @property
    def is_held(self) -> bool:
        """Whether this client keeps its session in the file."""
        return self._lock is not None

    @property
    def positions_path(self) -> Path:
        """Where the positions of durable streams are kept."""
        return self._path.with_name(f"{self._path.name}.streams")

    def load(self) -> dict[str, Any] | None:
        """Lock the file and return the result of `session.open` in it; None without one, or without the lock.

        Raises ConfigError if the file cannot be used, or if others can read it.
        """
        path, fix = self._path, "check the path"
        with file_errors(path, "used", lambda fault: ConfigError([f"session_file: {fault}"]), fix=fix):
            self._lock = try_lock(path.with_name(f"{path.name}.lock"))
            if self._is_closed:  # meanwhile
                self.close()
            if self._lock is None:
                return None
            try:
                content, _ = read_file(path, MAX_SESSION_FILE)
            except FileNotFoundError:
                return None
            except BaseException:
                self.close()
                raise
            finally:
                self._about["identity"] = identity_of(self._credentials)
        try:
            found = json.loads(content)
            session = {
                name: base64.b64decode(value, validate=True)
                if name in _FILE_BYTES and value is not None
                else value
                for name, value in found.pop("session").items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return session if found == self._about else None

    def save(self, session: Mapping[str, Any] | None) -> None:
        """Replace the session of the file; remove it if it is None, or the disk fails. Needs the lock."""
        if self._lock is None:
            return
        try:
            if session is not None:
                texts = {
                    name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
                    for name, value in session.items()
                }
                replace_file(self._path, json.dumps({**self._about, "session": texts}).encode())
                return
        except OSError:  # the old content must not be used again
            pass
        with suppress(OSError):
            self._path.unlink()

    def close(self) -> None:
        """Release the lock. Idempotent."""
        self._is_closed = True
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


class PositionFile:
    """Positions of durable streams by their ids, in a file beside a session file, of whose lock it makes use."""

    def __init__(self, session_file: SessionFile) -> None:
        self._session_file = session_file
        self._positions: dict[str, int] | None = None
        self._saving = asyncio.Lock()
        self._is_changed = False

    def position(self, id: str) -> int:
        """Return the position that was kept for a stream; 0 for another one. Reads a small file once."""
        return self._loaded().get(id, 0)

    async def keep(self, id: str, position: int) -> bool:
        """Write a position, unless another client has the session file. Return False if the disk fails."""
        positions = self._loaded()
        if positions.get(id, 0) != position:
            positions.pop(id, None)
            positions[id] = position  # the newest is the last one
            for oldest in [*positions][:-MAX_POSITIONS]:
                del positions[oldest]
            self._is_changed = True
        async with self._saving:  # one write for all streams that wait
            if self._is_changed and self._session_file.is_held:
                self._is_changed = False
                content = json.dumps({"version": FILE_VERSION, "streams": positions}).encode()
                writing = asyncio.ensure_future(
                    asyncio.to_thread(replace_file, self._session_file.positions_path, content)
                )
                try:
                    await asyncio.shield(writing)
                except OSError:
                    self._is_changed = True
                except asyncio.CancelledError:
                    await asyncio.wait([writing])  # the next write must not overtake it
                    self._is_changed = True
                    raise
        return not (self._is_changed and self._session_file.is_held)

    def _loaded(self) -> dict[str, int]:
        if self._positions is None:
            self._positions = {}
            with suppress(OSError, UnusableFileError, ValueError, KeyError, TypeError, RecursionError):
                content, _ = read_file(self._session_file.positions_path, MAX_SESSION_FILE)
                self._positions = {
                    id: position
                    for id, position in json.loads(content)["streams"].items()
                    if type(position) is int and position >= 0
                }
        return self._positions


def identity_of(credentials: Credentials) -> str:
    """Return whose session these credentials open, without secrets. Takes a moment for a login with secrets."""
    match credentials:
        case ApiKey():
            return f"user {credentials.user}"
        case DeviceKey():
            return f"device {credentials.name} {credentials.device.public_key.hex()}"
        case CertificateLogin():
            return f"certificate {credentials.user or ''}"
        case SchemeLogin():
            return f"login {credentials.digest()}"
