"""Store users in `users.toml`: names, key digests, roles, disabled users.

    [users.alice]
    key_sha256 = "47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU"
    roles = ["operator"]

    [users.bob]
    disabled = true

Decides: how users are read, added and changed, and which changes end a user's sessions.

Rules:
- A key is 32 random bytes, shown once as text. The file holds the SHA-256 of the bytes: a plain hash is enough for
  256 random bits.
- A user needs no key: devices and client certificates open sessions too.
- Users are appended to the text and edited in place, so that comments and layout survive. An edit that does not
  have exactly the intended effect is refused.
- `operator = true`, as earlier versions wrote it, is the role "operator". A change of roles replaces it.
- A user is gone if removed, disabled or given another key or other roles.

Must not know: who tries to log in.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import tomli

from zcproto.auth.files import TableFile, name_faults, quoted, roles_faults, toml_key, toml_roles
from zcproto.common.clock import Entropy, system_entropy
from zcproto.common.roles import NO_ROLES, OPERATOR, Roles
from zcproto.common.secret import SecretText
from zcproto.common.text import toml_string
from zcproto.common.watcher import file_identity
from zcproto.errors import ConfigError
from zcproto.sessions.token import DIGEST_SIZE, TOKEN_SIZE, digest_of, token_from_text, token_text

KEY: Final = "key_sha256"
ROLES: Final = "roles"
DISABLED: Final = "disabled"
_VALUE: Final = re.compile(
    r"""(?P<key>[ \t]*["']?(?P<name>[a-z0-9_]+)["']?[ \t]*=[ \t]*)(\[[^\]\r\n]*\]|[^ \t\r\n#]+)"""
)

NO_KEY: Final = bytes(DIGEST_SIZE)
"""The digest of a user without a key. No key has it."""


class User(NamedTuple):
    """A user as stored."""

    digest: bytes
    roles: Roles = NO_ROLES
    disabled: bool = False

    @property
    def has_key(self) -> bool:
        return self.digest != NO_KEY

    def as_dict(self, name: str) -> dict[str, Any]:
        """Return this user as lists show it."""
        return {
            "name": name,
            "roles": sorted(self.roles),
            "key": self.has_key,
            "disabled": self.disabled,
        }

    def __repr__(self) -> str:
        return f"User(roles={sorted(self.roles)}, disabled={self.disabled}, has_key={self.has_key})"


class UserFile(TableFile[User]):
    """Users in a file."""

    what = "file of users"
    kind = "user"
    keys = (KEY, ROLES, OPERATOR, DISABLED)
    max_bytes = 256 << 20
    """Enough for about two million users."""

    def __init__(self, path: str | os.PathLike[str], *, entropy: Entropy = system_entropy) -> None:
        super().__init__(path)
        self._entropy = entropy

    def find(self, name: str) -> User | None:
        """Return a user who may open sessions: known and not disabled."""
        user = self.entries.get(name)
        return None if user is None or user.disabled else user

    @staticmethod
    def is_gone(before: User, now: User | None) -> bool:
        return not before.disabled and now != before

    def _parse_values(self, table: dict[str, Any]) -> User | list[str]:
        text = table.get(KEY)
        digest = token_from_text(text) if isinstance(text, str) else None
        faults = []
        if KEY in table and digest is None:
            faults.append(f"{KEY} must be 43 characters of base64url, a SHA-256")
        faults += [
            f"{key} must be true or false"
            for key in (OPERATOR, DISABLED)
            if not isinstance(table.get(key, False), bool)
        ]
        faults += roles_faults(table.get(ROLES, []))
        if faults:
            return faults
        roles = frozenset(table.get(ROLES, [])) | ({OPERATOR} if table.get(OPERATOR) else NO_ROLES)
        return User(digest or NO_KEY, roles, table.get(DISABLED, False))

    # Writing

    def add(self, name: str, roles: Roles = NO_ROLES) -> SecretText:
        """Add a user. Return the key as text; it is not shown again."""
        return self.add_many([name], roles)[0][1]

    def add_digest(self, name: str, digest: bytes | None, roles: Roles = NO_ROLES) -> None:
        """Add a user with a key made elsewhere, of which only the digest (32 bytes) is given.

        With None the user has no key, and opens sessions by devices and client certificates only.
        """
        self._add([(name, digest)], roles)

    def add_many(self, names: Sequence[str], roles: Roles = NO_ROLES) -> list[tuple[str, SecretText]]:
        """Add users, all or none. Return each name with its key as text; keys are not shown again."""
        added = [(name, self._entropy(TOKEN_SIZE)) for name in names]
        self._add([(name, digest_of(key)) for name, key in added], roles)
        return [(name, SecretText(token_text(key))) for name, key in added]

    def _add(self, added: Sequence[tuple[str, bytes | None]], roles: Roles) -> None:
        names = [name for name, _ in added]
        faults = [f"user {quoted(name)}: {fault}" for name in names for fault in name_faults(name)]
        if len(set(names)) < len(names):
            faults.append("a name is given twice")
        if faults:
            raise self._fault(*faults)
        with self._locked():
            self._identity, text, self.entries = self._read()
            taken = [name for name in names if name in self.entries]
            if taken:
                raise self._fault(
                    *(f"user {quoted(name)} exists already; choose another name" for name in taken)
                )
            if text and not text.endswith("\n"):
                text += "\n"
            text += "".join(_entry(name, digest, roles) for name, digest in added)
            self._replace(text, self._parse(text))

    def disable(self, name: str) -> None:
        """Stop a user from opening sessions. Raises NotFound for an unknown name, like the methods below."""
        self._change(name, lambda user: user._replace(disabled=True), partial(_set, DISABLED, "true"))

    def enable(self, name: str) -> None:
        self._change(name, lambda user: user._replace(disabled=False), partial(_set, DISABLED, None))

    def set_roles(self, name: str, roles: Roles) -> None:
        """Replace the roles of a user."""

        def edit(lines: list[str]) -> list[str]:
            return _set(ROLES, toml_roles(roles) if roles else None, _set(OPERATOR, None, lines))

        self._change(name, lambda user: user._replace(roles=roles), edit)

    def remove(self, name: str) -> None:
        self._change(name, lambda user: None, lambda lines: [])

    def new_key(self, name: str) -> SecretText:
        """Replace a user's key. Return the new one as text; it is not shown again."""
        key = self._entropy(TOKEN_SIZE)
        self.replace_digest(name, digest_of(key))
        return SecretText(token_text(key))

    def replace_digest(self, name: str, digest: bytes) -> None:
        """Replace a user's key by one made elsewhere, of which only the digest is given."""
        edit = partial(_set, KEY, toml_string(token_text(digest)))
        self._change(name, lambda user: user._replace(digest=digest), edit)

    def _change(
        self, name: str, change: Callable[[User], User | None], edit: Callable[[list[str]], list[str]]
    ) -> None:
        """Edit the lines of one user, if that has the effect of `change` and no other."""
        with self._locked():
            self._identity, text, self.entries = self._read()
            changed = change(self._known(self.entries, name))
            intended = dict(self.entries)
            if changed is None:
                del intended[name]
            else:
                intended[name] = changed
            new = _edited(text, name, edit)
            if new is None or self._parsed(new) != intended:
                raise self._fault(
                    f"the entry of user {quoted(name)} cannot be changed by a command; edit the file"
                )
            if new != text:
                self._replace(new, intended)

    def _parsed(self, text: str) -> Mapping[str, User] | None:
        try:
            return self._parse(text)
        except ConfigError:
            return None

    def _replace(self, text: str, users: Mapping[str, User]) -> None:
        self._replace_text(text)
        self.entries = users
        self._identity = file_identity(self._path)


def _entry(name: str, digest: bytes | None, roles: Roles) -> str:
    """Return a user as TOML."""
    secret = "" if digest is None else f'{KEY} = "{token_text(digest)}"\n'
    granted = f"{ROLES} = {toml_roles(roles)}\n" if roles else ""
    return f"\n[users.{toml_key(name)}]\n{secret}{granted}"


# Edits of the text. An edit takes the lines of one user, beginning with `[users.NAME]`.


def _edited(text: str, name: str, edit: Callable[[list[str]], list[str]]) -> str | None:
    """Return the text with one user's lines edited, or None if they are not found."""
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    header = f"[users.{toml_key(name)}]"
    start = next((index for index, line in enumerate(lines) if line.strip() == header), None)
    if start is None:  # only then: parsing each line takes seconds for a million users
        start = next((index for index, line in enumerate(lines) if _user_of(line) == name), None)
    if start is None:
        return None
    end = start + 1
    for index in range(start + 1, len(lines)):
        line = lines[index].strip()
        if line.startswith("["):
            break
        if line and not line.startswith("#"):  # trailing comments belong to the next user
            end = index + 1
    if not lines[end - 1].endswith("\n"):
        lines[end - 1] += "\n"
    changed = edit(lines[start:end])
    if not changed and start and not lines[start - 1].strip():
        start -= 1  # the empty line above
    return "".join([*lines[:start], *changed, *lines[end:]])


def _user_of(line: str) -> str | None:
    """Return the user whose lines begin with this one."""
    if not line.lstrip().startswith("["):
        return None
    users = tomli.loads(line)["users"]  # the only tables of a valid file
    return next(iter(users), None)


def _set(key: str, value: str | None, lines: list[str]) -> list[str]:
    """Set a key to a TOML value, in place or right below the header. With None, remove it."""
    edited = []
    for line in lines:
        match = _VALUE.match(line)
        if match is None or match["name"] != key:
            edited.append(line)
        elif value is not None:
            edited.append(match["key"] + value + line[match.end() :])
            value = None
    if value is not None:
        edited.insert(1, f"{key} = {value}\n")
    return edited
