"""A session in a file, so that a client continues it after a restart.

Decides: which file is used, and whether its session belongs to the server and the credentials of this client.

Rules:
- The file has mode 0600 and is replaced atomically. One that others can read is refused.
- One client uses the file at a time, by a lock beside it. Further ones have sessions of their own, which they do
  not keep.
- A session of another server or user, or one that cannot be parsed, is ignored and replaced.

Must not know: connections, when a session is opened or refreshed.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from zcproto.client.credentials import ApiKey, CertificateLogin, Credentials, DeviceKey, SchemeLogin
from zcproto.common.files import file_errors, read_file, replace_file, try_lock
from zcproto.errors import ConfigError

VERSION: Final = 1
MAX_SIZE: Final = 16_384

_BYTES: Final = ("token", "refresh_token")


class SessionFile:
    """The session of one client of `server` with these credentials. Methods access the disk."""

    def __init__(self, path: str | Path, server: str, credentials: Credentials) -> None:
        self._path = Path(path)
        self._credentials = credentials
        self._about = {"version": VERSION, "server": server}
        self._lock: int | None = None
        self._is_closed = False

    @property
    def is_held(self) -> bool:
        """Whether this client keeps its session in the file."""
        return self._lock is not None

    def load(self) -> dict[str, Any] | None:
        """Lock the file and return the result of `session.open` in it. None without one, and without the lock.

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
                content, _ = read_file(path, MAX_SIZE)
            except FileNotFoundError:
                return None
            except BaseException:
                self.close()
                raise
            finally:
                self._about["identity"] = identity_of(self._credentials)
        try:
            kept = json.loads(content)
            session = {
                name: base64.b64decode(value, validate=True)
                if name in _BYTES and value is not None
                else value
                for name, value in kept.pop("session").items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return session if kept == self._about else None

    def save(self, session: Mapping[str, Any] | None) -> None:
        """Replace the kept session, without the lock do nothing. None, or a disk that fails, leaves none."""
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
