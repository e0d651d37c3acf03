"""The file of users, `users.toml`: names, digests of their keys, who is an operator, who is disabled.

    [users.alice]
    key_sha256 = "47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU"
    operator = true

    [users.bob]
    disabled = true

What this file decides: how users are read, added and changed, and whose sessions must end for it.

Rules:
- A key is 32 random bytes, shown once as text. The file has the SHA-256 of the bytes: a plain hash is
  enough for 256 random bits.
- The file is its owner's alone, and replaced in one step (private_text.py).
- A user needs no key: devices and client certificates open sessions too.
- Users are added at the end of the text, and changed where they stand, so that nothing that an operator wrote is
  lost. A text that is not understood well enough for that is left alone.
- A user is gone who was removed or disabled, and so is one who has another key or role: whoever held the sessions
  may be somebody else.
- Reading keeps the users known before if the file has any fault; every fault is told, with the user it is
  in.

It must not know: who tries to log in.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import tomli

from zcproto.auth.names import name_faults, quoted, toml_key
from zcproto.auth.private_text import LOCK_WAIT_S, NOT_READ, PrivateText
from zcproto.common.clock import Entropy, system_entropy
from zcproto.common.secret import SecretText
from zcproto.common.watcher import NO_FILE, Identity
from zcproto.errors import ConfigError, NotFound
from zcproto.sessions.token import DIGEST_SIZE, TOKEN_SIZE, digest_of, token_from_text, token_text

MAX_FILE_BYTES: Final = 256 << 20
"""About two million users; anything larger is another kind of file."""

KEY: Final = "key_sha256"
DISABLED: Final = "disabled"
_USER_KEYS: Final = (KEY, "operator", DISABLED)
_VALUE: Final = re.compile(r"""(?P<key>[ \t]*["']?(?P<name>[a-z0-9_]+)["']?[ \t]*=[ \t]*)[^ \t\r\n#]+""")

NO_KEY: Final = bytes(DIGEST_SIZE)
"""The digest of a user without a key: none has it."""


class User(NamedTuple):
    """What is kept of a user."""

    digest: bytes
    operator: bool
    disabled: bool = False

    @property
    def has_key(self) -> bool:
        return self.digest != NO_KEY

    def __repr__(self) -> str:
        return f"User(operator={self.operator}, disabled={self.disabled}, has_key={self.has_key})"


class UserFile:
    """Users in a file. Making one touches nothing; `load` reads. Faults raise ConfigError."""

    __slots__ = ("_entropy", "_file", "_gone", "_stamp", "_users")

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
        self._gone: set[str] = set()
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
        """A user who may open sessions: one who is known, and not disabled."""
        user = self._users.get(name)
        return None if user is None or user.disabled else user

    def get(self, name: str) -> User | None:
        """A user who is known, disabled or not."""
        return self._users.get(name)

    def take_gone(self) -> list[str]:
        """Users who are gone by what `reload` has read since this was last called."""
        gone, self._gone = self._gone, set()
        return sorted(gone)

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
            self._gone |= _gone_between(self._users, users)
            self._users = users
        finally:
            # Last: whoever finds the file unchanged must find its users.
            self._stamp = stamp

    def _read(self) -> tuple[Identity, str, dict[str, User]]:
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
                    digest = token_from_text(table[KEY]) if KEY in table else NO_KEY
                    assert digest is not None
                    users[name] = User(digest, table.get("operator", False), table.get(DISABLED, False))
        else:
            faults.append("users must be tables: [users.NAME]")
        if faults:
            raise self._file.fault(*faults)
        return users

    # Writing

    def add(self, name: str, operator: bool = False) -> SecretText:
        """Add a user; the key as text, which is shown this once."""
        return self.add_many([name], operator)[0][1]

    def add_without_key(self, name: str, operator: bool = False) -> None:
        """Add a user who opens sessions by devices and client certificates only."""
        self._add([(name, None)], operator)

    def add_digest(self, name: str, digest: bytes, operator: bool = False) -> None:
        """Add a user whose key somebody else has made: of it only the digest is known here, 32 bytes."""
        self._add([(name, digest)], operator)

    def add_many(self, names: Sequence[str], operator: bool = False) -> list[tuple[str, SecretText]]:
        """Add users, all or none; each with the key as text, which is shown this once."""
        added = [(name, self._entropy(TOKEN_SIZE)) for name in names]
        self._add([(name, digest_of(key)) for name, key in added], operator)
        return [(name, SecretText(token_text(key))) for name, key in added]

    def _add(self, added: Sequence[tuple[str, bytes | None]], operator: bool) -> None:
        names = [name for name, _ in added]
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
            if text and not text.endswith("\n"):
                text += "\n"
            text += "".join(_entry(name, digest, operator) for name, digest in added)
            self._take(text, self._parse(text))

    def disable(self, name: str) -> None:
        """Let a user open no more sessions. Raises NotFound if there is none of this name, as all below."""
        self._change(name, lambda user: user._replace(disabled=True), _with(DISABLED, "true"))

    def enable(self, name: str) -> None:
        self._change(name, lambda user: user._replace(disabled=False), _without(DISABLED))

    def remove(self, name: str) -> None:
        self._change(name, lambda user: None, lambda lines: [])

    def new_key(self, name: str) -> SecretText:
        """Another key for a user, instead of the one there is; as text, which is shown this once."""
        key = self._entropy(TOKEN_SIZE)
        self.replace_digest(name, digest_of(key))
        return SecretText(token_text(key))

    def replace_digest(self, name: str, digest: bytes) -> None:
        """As `new_key`, with a key that somebody else has made: of it only the digest is known here."""
        edit = _with(KEY, f'"{token_text(digest)}"')
        self._change(name, lambda user: user._replace(digest=digest), edit)

    def _change(
        self, name: str, change: Callable[[User], User | None], edit: Callable[[list[str]], list[str]]
    ) -> None:
        """Change one user's lines, if that makes the change that is meant and no other."""
        with self._file.locked():
            self._stamp, text, self._users = self._read()
            user = self._users.get(name)
            if user is None:
                raise NotFound(f"there is no user {quoted(name)}")
            meant = dict(self._users)
            changed = change(user)
            if changed is None:
                del meant[name]
            else:
                meant[name] = changed
            new = _edited(text, name, edit)
            if new is None or self._understood(new) != meant:
                raise self._file.fault(
                    f"user {quoted(name)} is written there in a way that only an editor can change"
                )
            if new != text:
                self._take(new, meant)

    def _understood(self, text: str) -> dict[str, User] | None:
        try:
            return self._parse(text)
        except ConfigError:
            return None

    def _take(self, text: str, users: dict[str, User]) -> None:
        self._file.replace(text)
        self._users = users
        self._stamp = self._file.look()


def _gone_between(before: dict[str, User], now: dict[str, User]) -> set[str]:
    """Those who could open sessions before, and cannot now, or only as somebody else."""
    return {name for name, user in before.items() if not user.disabled and now.get(name) != user}


def _user_faults(name: str, table: Any) -> list[str]:
    """What is wrong with one user's table. No value is shown."""
    if not isinstance(table, dict):
        return [f"must be a table; it takes {', '.join(_USER_KEYS)}"]
    faults = name_faults(name)
    digest = table.get(KEY)
    if KEY in table and (not isinstance(digest, str) or token_from_text(digest) is None):
        faults.append(f"{KEY} must be 43 characters of base64url, a SHA-256")
    faults += [
        f"{key} must be true or false"
        for key in ("operator", DISABLED)
        if not isinstance(table.get(key, False), bool)
    ]
    faults += [
        f"unknown key {quoted(key)}; it takes {', '.join(_USER_KEYS)}"
        for key in table
        if key not in _USER_KEYS
    ]
    return faults


def _entry(name: str, digest: bytes | None, operator: bool) -> str:
    """One user as TOML."""
    secret = "" if digest is None else f'{KEY} = "{token_text(digest)}"\n'
    role = "operator = true\n" if operator else ""
    return f"\n[users.{toml_key(name)}]\n{secret}{role}"


# Changing the text. Each edit is of the lines of one user, the first of which is `[users.NAME]`.


def _edited(text: str, name: str, edit: Callable[[list[str]], list[str]]) -> str | None:
    """The text with one user's lines edited; None if they are not found."""
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    usual = f"[users.{toml_key(name)}]"
    start = next((index for index, line in enumerate(lines) if line.strip() == usual), None)
    if start is None:  # most texts are ours, and reading each line takes seconds for a million users
        start = next((index for index, line in enumerate(lines) if _user_of(line) == name), None)
    if start is None:
        return None
    end = start + 1
    for index in range(start + 1, len(lines)):
        line = lines[index].strip()
        if line.startswith("["):
            break
        if line and not line.startswith("#"):  # what comes behind is about the next one, or about nobody
            end = index + 1
    if not lines[end - 1].endswith("\n"):
        lines[end - 1] += "\n"
    changed = edit(lines[start:end])
    if not changed and start and not lines[start - 1].strip():
        start -= 1  # the empty line before it
    return "".join([*lines[:start], *changed, *lines[end:]])


def _user_of(line: str) -> str | None:
    """Whose lines begin with this one."""
    if not line.lstrip().startswith("["):
        return None
    users = tomli.loads(line)["users"]  # there is no other line that begins so in a good file of users
    return next(iter(users), None)


def _with(key: str, value: str) -> Callable[[list[str]], list[str]]:
    """Set a key, where it stands or right behind the name."""

    def edit(lines: list[str]) -> list[str]:
        for index, line in enumerate(lines):
            match = _VALUE.match(line)
            if match is not None and match["name"] == key:
                changed = match["key"] + value + line[match.end() :]
                return [*lines[:index], changed, *lines[index + 1 :]]
        return [lines[0], f"{key} = {value}\n", *lines[1:]]

    return edit


def _without(key: str) -> Callable[[list[str]], list[str]]:
    """Remove a key."""

    def edit(lines: list[str]) -> list[str]:
        matches = [_VALUE.match(line) for line in lines]
        return [
            line for line, match in zip(lines, matches, strict=True) if match is None or match["name"] != key
        ]

    return edit
