"""The file of users, `users.toml`: names, digests of their keys, who is an operator.

    [users.alice]
    key_sha256 = "47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU"
    operator = true

What this file decides: how users are read and added.

Rules:
- A key is 32 random bytes, shown once as text. The file has the SHA-256 of the bytes: a plain hash is
  enough for 256 random bits.
- The file is its owner's alone, and replaced in one step (private_text.py).
- Users are added at the end of the text, so that nothing that an operator wrote is lost.
- Reading keeps the users known before if the file has any fault; every fault is told, with the user it is
  in.

It must not know: who tries to log in.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from zcproto.auth.names import name_faults, quoted, toml_key
from zcproto.auth.private_text import LOCK_WAIT_S, NO_FILE, NOT_READ, PrivateText, Stamp
from zcproto.clock import Entropy, system_entropy
from zcproto.sessions.token import TOKEN_SIZE, digest_of, token_from_text, token_text

MAX_FILE_BYTES: Final = 256 << 20
"""About two million users; anything larger is another kind of file."""

_USER_KEYS: Final = ("key_sha256", "operator")


class User(NamedTuple):
    """What is kept of a user."""

    digest: bytes
    operator: bool

    def __repr__(self) -> str:
        return f"User(operator={self.operator})"


class UserFile:
    """Users in a file. Making one touches nothing; `load` reads. Faults raise ConfigError."""

    __slots__ = ("_entropy", "_file", "_stamp", "_users")

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        entropy: Entropy = system_entropy,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> None:
        self._file = PrivateText(path, "file of users", max_bytes=MAX_FILE_BYTES, lock_wait_s=lock_wait_s)
        self._entropy = entropy
        self._users: dict[str, User] = {}
        self._stamp = NOT_READ

    def __repr__(self) -> str:
        return f"UserFile({str(self.path)!r})"

    def __len__(self) -> int:
        return len(self._users)

    @property
    def path(self) -> Path:
        return self._file.path

    @property
    def names(self) -> list[str]:
        """The users known, in the order of the file."""
        return list(self._users)

    def find(self, name: str) -> User | None:
        return self._users.get(name)

    # Reading

    def load(self) -> None:
        """Read the file. If there is none, there are no users yet."""
        self._stamp, _, self._users = self._read()

    def changed(self) -> bool:
        """Whether the file is another one than was read last. Takes one stat, and never raises."""
        return self._file.look() != self._stamp

    def reload(self) -> None:
        """Read the file again. After any fault, and if it is gone, the users known before stay known.

        The fault is raised once: `changed` is False then until the file changes again.
        """
        stamp = self._file.look()
        try:
            stamp, _, users = self._read()
            if stamp == NO_FILE and self._users:
                raise self._file.fault("is gone; the users known before stay known until the server ends")
            self._users = users
        finally:
            # Last: whoever finds the file unchanged must find its users.
            self._stamp = stamp

    def _read(self) -> tuple[Stamp, str, dict[str, User]]:
        """What the file is, its text, and the users in it."""
        stamp, text = self._file.read()
        return stamp, text, self._parse(text)

    def _parse(self, text: str) -> dict[str, User]:
        document = self._file.document(text)
        tables = document.pop("users", {})
        faults = [f"unknown key {quoted(key)}; only tables [users.NAME] belong here" for key in document]
        users: dict[str, User] = {}
        if isinstance(tables, dict):
            for name, table in tables.items():
                found = _user_faults(name, table)
                faults += [f"user {quoted(name)}: {fault}" for fault in found]
                if not found:
                    digest = token_from_text(table["key_sha256"])
                    assert digest is not None
                    users[name] = User(digest, table.get("operator", False))
        else:
            faults.append("users must be tables: [users.NAME]")
        if faults:
            raise self._file.fault(*faults)
        return users

    # Writing

    def add(self, name: str, operator: bool = False) -> str:
        """Add a user; the key as text, which is shown this once."""
        return self.add_many([name], operator)[0][1]

    def add_many(self, names: Sequence[str], operator: bool = False) -> list[tuple[str, str]]:
        """Add users, all or none; each with the key as text, which is shown this once."""
        faults = [f"user {quoted(name)}: {fault}" for name in names for fault in name_faults(name)]
        if len(set(names)) < len(names):
            faults.append("a name is given twice")
        if faults:
            raise self._file.fault(*faults)
        with self._file.locked():
            self._stamp, text, self._users = self._read()
            taken = [name for name in names if name in self._users]
            if taken:
                raise self._file.fault(*(f"user {quoted(name)} is there already" for name in taken))
            added = [(name, self._entropy(TOKEN_SIZE)) for name in names]
            if text and not text.endswith("\n"):
                text += "\n"
            text += "".join(_entry(name, digest_of(key), operator) for name, key in added)
            users = self._parse(text)
            self._file.replace(text)
            self._users = users
            self._stamp = self._file.look()
        return [(name, token_text(key)) for name, key in added]


def _user_faults(name: str, table: Any) -> list[str]:
    """What is wrong with one user's table. No value is shown."""
    if not isinstance(table, dict):
        return ["must be a table with key_sha256"]
    faults = name_faults(name)
    digest = table.get("key_sha256")
    if not isinstance(digest, str) or token_from_text(digest) is None:
        faults.append("key_sha256 must be 43 characters of base64url, a SHA-256")
    if not isinstance(table.get("operator", False), bool):
        faults.append("operator must be true or false")
    faults += [
        f"unknown key {quoted(key)}; it takes {' and '.join(_USER_KEYS)}"
        for key in table
        if key not in _USER_KEYS
    ]
    return faults


def _entry(name: str, digest: bytes, operator: bool) -> str:
    """One user as TOML."""
    role = "operator = true\n" if operator else ""
    return f'\n[users.{toml_key(name)}]\nkey_sha256 = "{token_text(digest)}"\n{role}'
