"""Store users, devices, machine tokens and pairing codes as TOML in private files of the home folder.

Decides: what a name may be, how files are read and written, and which entries are gone.

Rules:
- Files are read and replaced as zcproto/common/files.py does; writers hold a lock. A fault is a ConfigError that
  names the file.
- Known entries are replaced only by those of a file without faults; all faults are reported at once.
- An entry is gone if it was removed, or changed so that its sessions must end.

Must not know: what entries are for.
"""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Final, Generic, NamedTuple, TypeVar

import tomli

from zcproto.auth.identity import MAX_USER
from zcproto.common.files import file_errors, locked, read_file, replace_file
from zcproto.common.roles import MAX_ROLES, ROLE_WORDS, Roles, is_role
from zcproto.common.text import escape_text, toml_string
from zcproto.common.watcher import NO_FILE, FileIdentity, file_identity, identity_of
from zcproto.errors import AlreadyExists, ConfigError, NotFound

LOCK_WAIT_S: Final = 10.0
"""Time another process needs to add a million users."""

_RESTORE: Final = "correct the file, or restore it from a backup"
_SHOWN: Final = 120
_SHOWN_NAME: Final = 60
_NOT_READ: Final[FileIdentity] = (-2,)
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")

MAX_NAMES: Final = 16
"""Names of each kind in a report of changes: as many as a list in the log has."""

Entry = TypeVar("Entry")


class FileChange(NamedTuple):
    """The names that a new content of a file adds, changes and removes: the first ones. `total` counts all."""

    total: int
    added: list[str]
    changed: list[str]
    removed: list[str]


def change_between(
    before: Mapping[str, Entry], now: Mapping[str, Entry], is_changed: Callable[[Entry, Entry], bool]
) -> FileChange:
    """Return the differences between the entries of a file before and now."""
    added = [name for name in now if name not in before]
    changed = [name for name, entry in now.items() if name in before and is_changed(before[name], entry)]
    removed = [name for name in before if name not in now]
    total = len(added) + len(changed) + len(removed)
    return FileChange(total, added[:MAX_NAMES], changed[:MAX_NAMES], removed[:MAX_NAMES])


# --- names -----------------------------------------------------------------------------------------------


def name_faults(name: str) -> list[str]:
    """Return what is wrong with a name. Names that look alike must be equal: NFC, no surrounding space."""
    if not 0 < len(name) <= MAX_USER:
        return [f"a name has 1 to {MAX_USER} characters"]
    if not name.isprintable() or name != name.strip() or not unicodedata.is_normalized("NFC", name):
        return ["a name has printable characters, in Unicode's form NFC, and no space at its ends"]
    return []


def roles_faults(roles: object) -> list[str]:
    """Return what is wrong with a list of roles."""
    if not isinstance(roles, list) or not all(map(is_role, roles)):
        return [f"roles must be a list of names, each of {ROLE_WORDS}"]
    return [f"roles must be at most {MAX_ROLES} names"] if len(roles) > MAX_ROLES else []


def toml_roles(roles: Roles) -> str:
    """Return roles as TOML, without spaces, so that an edit can find the end."""
    return f"[{','.join(map(toml_string, sorted(roles)))}]"


def is_moment(value: object) -> bool:
    """Return whether a value of a TOML file is a date and time with an offset."""
    if not isinstance(value, datetime):
        return False
    try:
        value.astimezone(UTC)
    except OverflowError:
        return False
    return value.tzinfo is not None


def toml_moment(moment: datetime) -> str:
    """Return an aware moment in UTC as TOML, in whole seconds."""
    return f"{moment.replace(microsecond=0, tzinfo=None).isoformat()}Z"


def quoted(name: str) -> str:
    """Quote and escape any text given as a name."""
    return f'"{escape_text(name, _SHOWN_NAME)}"'


def toml_key(name: str) -> str:
    """Return a valid name as a TOML key."""
    return name if _BARE_KEY.fullmatch(name) else toml_string(name)


# --- files -----------------------------------------------------------------------------------------------


class PrivateFile:
    """A private TOML file. Creating this object touches nothing. Faults raise ConfigError."""

    what: ClassVar[str]
    """What the file is, in messages: "file of users"."""
    max_bytes: ClassVar[int]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._path = str(self.path)  # every login looks at a file: convert its path once

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._path!r})"

    def _read_text(self) -> tuple[FileIdentity, str]:
        """Return the state of the file and its text; NO_FILE and no text if it is missing."""
        with file_errors(self.path, "read"):
            try:
                data, status = read_file(self.path, self.max_bytes)
            except FileNotFoundError:
                if self.path.is_symlink():  # without users a server would admit no one, and look healthy
                    raise self._fault(
                        "is a link to a file that is missing; restore that file, or remove the link"
                    ) from None
                return NO_FILE, ""
        try:
            return identity_of(status), data.decode()
        except UnicodeDecodeError as error:
            raise self._fault(f"is not UTF-8 at byte {error.start}; {_RESTORE}") from None

    def _document(self, text: str) -> dict[str, Any]:
        """Parse a text of this file as TOML."""
        try:
            return tomli.loads(text)
        except tomli.TOMLDecodeError as error:
            raise self._fault(f"is not TOML: {escape_text(str(error), _SHOWN)}; {_RESTORE}") from None
        except RecursionError:
            raise self._fault(f"is nested too deeply for a {self.what}; {_RESTORE}") from None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the writers. A missing folder is created."""
        with file_errors(self.path, "written"):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with locked(self.path.with_name(f".{self.path.name}.lock"), LOCK_WAIT_S):
                yield

    def _replace_text(self, text: str) -> None:
        """Replace the file in one step. The caller holds the lock."""
        data = text.encode()
        if len(data) > self.max_bytes:
            raise self._fault(f"would be larger than {self.max_bytes} bytes")
        replace_file(self.path, data)

    def _fault(self, *faults: str) -> ConfigError:
        """Return an error that lists faults of this file, each with its path."""
        path = escape_text(self._path)
        return ConfigError([f"{path}: {fault}" for fault in faults])


class TableFile(PrivateFile, ABC, Generic[Entry]):
    """Entries by name in a private file, each a TOML table such as `[users.alice]`. `load` reads them.

    Creating this object touches nothing. Faults raise ConfigError.
    """

    kind: ClassVar[str]
    """What an entry is: "user". Its tables are in one of the plural."""

    keys: ClassVar[tuple[str, ...]]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._identity = _NOT_READ
        self._gone: deque[tuple[str, Entry]] = deque()
        self._changes: deque[FileChange] = deque()
        self.entries: Mapping[str, Entry] = {}
        """The entries as of the last reading, in the order of the file. A new mapping after each change."""

    def find(self, name: str) -> Entry | None:
        """Return an entry that may open sessions, as of the last reading."""
        return self.entries.get(name)

    def load(self) -> None:
        """Read the file. Without a file there are no entries yet."""
        self._identity, _, self.entries = self._read()

    def changed(self) -> bool:
        """Return whether the file differs from the one read last: one stat, no exception."""
        return file_identity(self._path) != self._identity

    def reload(self) -> None:
        """Read the file again, in any thread. After a fault, or without the file, the entries stay.

        A fault is raised once: `changed` is False until the file changes again.
        """
        identity = file_identity(self._path)
        try:
            identity, _, entries = self._read()
            if identity == NO_FILE and self.entries:
                raise self._fault(
                    f"is missing; the last known {self.kind}s stay until the server ends; restore the file"
                )
            self._gone.extend(
                (name, entry)
                for name, entry in self.entries.items()
                if self.is_gone(entry, entries.get(name))
            )
            self._changes.append(change_between(self.entries, entries, self.is_changed))
            self.entries = entries
        finally:
            self._identity = identity  # last: a file that looks unchanged must have its entries

    def take_gone(self) -> list[tuple[str, Entry]]:
        """Return the entries that `reload` has found gone since the last call."""
        return [self._gone.popleft() for _ in range(len(self._gone))]

    def take_changes(self) -> list[FileChange]:
        """Return what `reload` has found changed since the last call."""
        found = [self._changes.popleft() for _ in range(len(self._changes))]
        return [change for change in found if change.total]

    @staticmethod
    @abstractmethod
    def is_gone(before: Entry, now: Entry | None) -> bool:
        """Return whether the sessions of an entry must end, given the entry that has its name now."""

    @staticmethod
    def is_changed(before: Entry, now: Entry) -> bool:
        """Return whether an entry differs in what is worth a line in the log."""
        return before != now

    @abstractmethod
    def _parse_values(self, table: dict[str, Any]) -> Entry | list[str]:
        """Return the entry of a table, or what is wrong with its values, without showing them."""

    def _known(self, entries: Mapping[str, Entry], name: str) -> Entry:
        """Return the entry of a name. Raises NotFound."""
        if name not in entries:
            raise NotFound(
                f"no {self.kind} is named {quoted(name)}; zcproto {self.kind} list shows the {self.kind}s"
            )
        return entries[name]

    def _read(self) -> tuple[FileIdentity, str, dict[str, Entry]]:
        identity, text = self._read_text()
        return identity, text, self._parse(text)

    def _parse(self, text: str) -> dict[str, Entry]:
        document = self._document(text)
        tables = document.pop(f"{self.kind}s", {})
        faults = [
            f"unknown key {quoted(key)}; only tables [{self.kind}s.NAME] belong here" for key in document
        ]
        entries: dict[str, Entry] = {}
        if isinstance(tables, dict):
            for name, table in tables.items():
                found = self._parse_table(name, table)
                if isinstance(found, list):
                    faults += [f"{self.kind} {quoted(name)}: {fault}" for fault in found]
                else:
                    entries[name] = found
        else:
            faults.append(f"{self.kind}s must be tables: [{self.kind}s.NAME]")
        if faults:
            raise self._fault(*faults)
        return entries

    def _parse_table(self, name: str, table: Any) -> Entry | list[str]:
        accepted = ", ".join(self.keys)
        if not isinstance(table, dict):
            return [f"must be a table; it takes {accepted}"]
        unknown = [f"unknown key {quoted(key)}; it takes {accepted}" for key in table if key not in self.keys]
        entry = self._parse_values(table)
        faults = [*name_faults(name), *(entry if isinstance(entry, list) else []), *unknown]
        return faults or entry


class RewrittenFile(TableFile[Entry]):
    """A file that is rewritten as a whole by each change, so that comments are lost."""

    header: ClassVar[str]

    def remove(self, name: str) -> Entry:
        """Remove and return an entry. Raises NotFound for an unknown name."""
        with self._changing() as entries:
            removed = self._known(entries, name)
            del entries[name]
        return removed

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Entry]]:
        """Lock the file and yield its entries. What the body has changed is written, unless it raises.

        `self.entries` stays as it is: any change, by this process or another, is seen by the next reading.
        """
        with self._locked():
            _, _, entries = self._read()
            before = dict(entries)
            yield entries
            if entries != before:
                text = self.header + "".join(itertools.starmap(self._text_of, entries.items()))
                self._parse(text)
                self._replace_text(text)

    def _add(self, name: str, entry: Entry, entries: dict[str, Entry]) -> None:
        """Add an entry. Raises AlreadyExists for a name in use."""
        if name in entries:
            raise AlreadyExists(f"a {self.kind} is named {quoted(name)} already; choose another name")
        entries[name] = entry

    @staticmethod
    @abstractmethod
    def _text_of(name: str, entry: Entry) -> str:
        """Return an entry as TOML."""
