"""The file of users, `users.toml`: names, digests of their keys, who is an operator.

    [users.alice]
    key_sha256 = "47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU"
    operator = true

What this file decides: how users are read and added.

Rules:
- A key is 32 random bytes, shown once as text. The file has the SHA-256 of the bytes: a plain hash is
  enough for 256 random bits.
- The file is refused if anyone but its owner can read or change it.
- Users are added at the end of the text, so that nothing that an operator wrote is lost. Writers hold a
  lock; the new text is written beside the file, brought to the disk and renamed, so that readers and a
  crash find either the old file or the new one.
- Reading keeps the users known before if the file has any fault; every fault is told, with the user it is
  in.

It must not know: who tries to log in.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shlex
import stat
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import tomli

from zcproto.auth.identity import MAX_USER
from zcproto.clock import Entropy, system_clock, system_entropy
from zcproto.errors import ConfigError
from zcproto.printable import printable
from zcproto.sessions.token import TOKEN_SIZE, digest_of, token_from_text, token_text

MAX_FILE_BYTES: Final = 256 << 20
"""About two million users; anything larger is another kind of file."""

LOCK_WAIT_S: Final = 10.0
"""What another process needs to add a million users."""

_LOCK_POLL_S: Final = 0.05
_OTHERS: Final = 0o077
_SHOWN: Final = 60
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
_USER_KEYS: Final = ("key_sha256", "operator")
_NO_FOLDER_SYNC: Final = (
    errno.EINVAL,
    errno.ENOTSUP,
)  # network file systems that keep names in order themselves

_Stamp = tuple[int, ...]
_NO_FILE: Final[_Stamp] = ()
_NOT_READ: Final[_Stamp] = (-1,)


class User(NamedTuple):
    """What is kept of a user."""

    digest: bytes
    operator: bool

    def __repr__(self) -> str:
        return f"User(operator={self.operator})"


class UserFile:
    """Users in a file. Making one touches nothing; `load` reads. Faults raise ConfigError."""

    __slots__ = ("_entropy", "_lock_wait_s", "_stamp", "_users", "path")

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        entropy: Entropy = system_entropy,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> None:
        self.path = Path(path)
        self._entropy = entropy
        self._lock_wait_s = lock_wait_s
        self._users: dict[str, User] = {}
        self._stamp = _NOT_READ

    def __repr__(self) -> str:
        return f"UserFile({str(self.path)!r})"

    def __len__(self) -> int:
        return len(self._users)

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
        return self._look() != self._stamp

    def reload(self) -> None:
        """Read the file again. After any fault, and if it is gone, the users known before stay known.

        The fault is raised once: `changed` is False then until the file changes again.
        """
        stamp = self._look()
        try:
            stamp, _, users = self._read()
            if stamp == _NO_FILE and self._users:
                raise self._fault("is gone; the users known before stay known until the server ends")
            self._users = users
        finally:
            # Last: whoever finds the file unchanged must find its users.
            self._stamp = stamp

    def _look(self) -> _Stamp:
        try:
            return _stamp_of(os.stat(self.path))
        except FileNotFoundError:
            return _NO_FILE
        except OSError as error:
            return (-2, error.errno or 0)

    def _read(self) -> tuple[_Stamp, str, dict[str, User]]:
        """What the file is, its text, and the users in it."""
        with self._translated("read"):
            try:
                # O_NONBLOCK is for a FIFO, which would wait for a writer.
                descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError:
                return _NO_FILE, "", {}
            try:
                status = os.fstat(descriptor)
                self._check(status)
                with open(descriptor, "rb", closefd=False) as file:
                    data = file.read(MAX_FILE_BYTES)
            finally:
                os.close(descriptor)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise self._fault(f"is not UTF-8 at byte {error.start}") from None
        return _stamp_of(status), text, self._parse(text)

    def _check(self, status: os.stat_result) -> None:
        """Refuse what is no file of this user alone. Checked on what was opened."""
        if not stat.S_ISREG(status.st_mode):
            raise self._fault("is not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise self._fault(f"is larger than {MAX_FILE_BYTES} bytes; it is no file of users")
        if status.st_uid not in trusted_owners():
            raise self._fault(
                f"belongs to another user (uid {status.st_uid});"
                f" run: chown {os.geteuid()} {shlex.quote(str(self.path))}"
            )
        if status.st_mode & _OTHERS:
            raise self._fault(
                f"others can read or change it (mode {stat.S_IMODE(status.st_mode):04o});"
                f" run: chmod 600 {shlex.quote(str(self.path))}"
            )

    def _parse(self, text: str) -> dict[str, User]:
        try:
            document = tomli.loads(text)
        except tomli.TOMLDecodeError as error:
            raise self._fault(printable(str(error), 2 * _SHOWN)) from None
        except RecursionError:
            raise self._fault("is nested too deep; it is no file of users") from None
        tables = document.pop("users", {})
        faults = [f"unknown key {_quoted(key)}; only tables [users.NAME] belong here" for key in document]
        users: dict[str, User] = {}
        if isinstance(tables, dict):
            for name, table in tables.items():
                found = _user_faults(name, table)
                faults += [f"user {_quoted(name)}: {fault}" for fault in found]
                if not found:
                    digest = token_from_text(table["key_sha256"])
                    assert digest is not None
                    users[name] = User(digest, table.get("operator", False))
        else:
            faults.append("users must be tables: [users.NAME]")
        if faults:
            raise self._fault(*faults)
        return users

    # Writing

    def add(self, name: str, operator: bool = False) -> str:
        """Add a user; the key as text, which is shown this once."""
        return self.add_many([name], operator)[0][1]

    def add_many(self, names: Sequence[str], operator: bool = False) -> list[tuple[str, str]]:
        """Add users, all or none; each with the key as text, which is shown this once."""
        faults = [f"user {_quoted(name)}: {fault}" for name in names for fault in _name_faults(name)]
        if len(set(names)) < len(names):
            faults.append("a name is given twice")
        if faults:
            raise self._fault(*faults)
        with self._translated("written"), self._locked():
            self._stamp, text, self._users = self._read()
            taken = [name for name in names if name in self._users]
            if taken:
                raise self._fault(*(f"user {_quoted(name)} is there already" for name in taken))
            added = [(name, self._entropy(TOKEN_SIZE)) for name in names]
            if text and not text.endswith("\n"):
                text += "\n"
            text += "".join(_entry(name, digest_of(key), operator) for name, key in added)
            users = self._parse(text)
            self._replace(text)
            self._users = users
            self._stamp = self._look()
        return [(name, token_text(key)) for name, key in added]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of all who write."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = self.path.with_name(f".{self.path.name}.lock")
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        deadline = system_clock.now() + self._lock_wait_s
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if system_clock.now() >= deadline:
                        raise self._fault("another process is writing to it; try again") from None
                time.sleep(_LOCK_POLL_S)
            yield
        finally:
            os.close(descriptor)

    def _replace(self, text: str) -> None:
        """Put a new file in the place of the old one, in one step."""
        data = text.encode()
        if len(data) > MAX_FILE_BYTES:
            raise self._fault(f"would be larger than {MAX_FILE_BYTES} bytes")
        staged = self.path.with_name(f".{self.path.name}.new")
        staged.unlink(missing_ok=True)  # what a crash left; the lock is held
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            with open(os.open(staged, flags, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            staged.replace(self.path)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        _sync_folder(self.path.parent)

    def _fault(self, *faults: str) -> ConfigError:
        path = printable(str(self.path))
        return ConfigError([f"{path}: {fault}" for fault in faults])

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Make a ConfigError of what the system says; the one place where that is done."""
        try:
            yield
        except OSError as error:
            raise self._fault(f"cannot be {what}: {error.strerror or error}") from error


def trusted_owners() -> frozenset[int]:
    """Users whose files are taken: the one that runs this, and root, who could change them anyway."""
    return frozenset({0, os.geteuid()})


def _stamp_of(status: os.stat_result) -> _Stamp:
    # st_ctime_ns tells of a change of mode too: the cure for a file that others could read.
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _quoted(name: str) -> str:
    return f'"{printable(name, _SHOWN)}"'


def _name_faults(name: str) -> list[str]:
    """What is wrong with a name. Names that look the same must be the same: so NFC, and no space around."""
    if not 0 < len(name) <= MAX_USER:
        return [f"a name has 1 to {MAX_USER} characters"]
    if not name.isprintable() or name != name.strip() or not unicodedata.is_normalized("NFC", name):
        return ["a name has printable characters, in Unicode's form NFC, and no space at its ends"]
    return []


def _user_faults(name: str, table: Any) -> list[str]:
    """What is wrong with one user's table. No value is shown."""
    if not isinstance(table, dict):
        return ["must be a table with key_sha256"]
    faults = _name_faults(name)
    digest = table.get("key_sha256")
    if not isinstance(digest, str) or token_from_text(digest) is None:
        faults.append("key_sha256 must be 43 characters of base64url, a SHA-256")
    if not isinstance(table.get("operator", False), bool):
        faults.append("operator must be true or false")
    faults += [
        f"unknown key {_quoted(key)}; it takes {' and '.join(_USER_KEYS)}"
        for key in table
        if key not in _USER_KEYS
    ]
    return faults


def _entry(name: str, digest: bytes, operator: bool) -> str:
    """One user as TOML."""
    if _BARE_KEY.fullmatch(name) is None:
        escaped = name.replace("\\", "\\\\").replace('"', '\\"')
        name = f'"{escaped}"'
    role = "operator = true\n" if operator else ""
    return f'\n[users.{name}]\nkey_sha256 = "{token_text(digest)}"\n{role}'


def _sync_folder(folder: Path) -> None:
    """Bring the folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
