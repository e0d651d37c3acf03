"""Decides how next keys are stored: keys that are announced and not used yet.

Rules:
- A next key is stored beside the key that it will replace, as `server.next.key` or `server-ecdsa.next.key`, with
  mode 0600, in PKCS#8. A line before the PEM block (allowed by RFC 7468 section 2) states when it was announced and
  from when it may be used. One file is written atomically, so a key is never without its times.
- Its pin may be sent to clients as soon as the file is in place, and from then on the key is never lost. The file
  is deleted only after the key has become the one in use.
- A file that is not a next key, or that others could read, is set aside and reported. It never stops a server: the
  keys in use are not affected.
- If the clock was set back since the announcement, the announcement keeps its intended length.

Must not know: certificates, when to replace keys. Writers hold the folder's lock.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from zcproto.certs import files, keys, pair
from zcproto.certs.authority import Progress
from zcproto.common.files import file_errors, sync_folder
from zcproto.errors import CertificateError
from zcproto.tls.pins import key_pin

STEMS = {"rsa": "server", "ecdsa": "server-ecdsa"}
"""File names of each key family, without suffix."""

CLOCK_TOLERANCE = timedelta(hours=1)
"""A clock that was set back by less does not change an announcement."""

_TIME = r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)"
_FORM = "%Y-%m-%dT%H:%M:%SZ"
_LINE = re.compile(
    rf"zcproto next key, announced at {_TIME}, to be used from {_TIME}\n-----BEGIN PRIVATE KEY".encode()
)


@dataclass(frozen=True, slots=True)
class NextPins:
    """Pins of keys that are announced and not used yet."""

    pins: tuple[str, ...]
    use_from: datetime
    """When the first of them may be used; aware, in UTC."""


@dataclass(frozen=True, slots=True)
class NextKey:
    """A key that is announced and not used yet."""

    path: Path
    key: keys.PrivateKey
    announced_at: datetime
    use_from: datetime
    """Both aware, in UTC, in whole seconds."""
    pin: str

    @property
    def key_type(self) -> str:
        return keys.key_type_of(self.key)


def pair_paths(directory: Path, key_type: str) -> tuple[Path, Path]:
    """Return where the certificate and the key of this type are stored."""
    stem = STEMS[keys.family(key_type)]
    return directory / f"{stem}.crt", directory / f"{stem}.key"


def path_of(directory: Path, family: str) -> Path:
    """Return where the next key of a family is stored."""
    return directory / f"{STEMS[family]}.next.key"


def paths(directory: Path) -> tuple[Path, ...]:
    """Return where next keys can be, whether they exist or not."""
    return tuple(path_of(directory, family) for family in STEMS)


def announced(directory: Path, progress: Progress = lambda sentence: None) -> NextPins | None:
    """Return what is announced in this folder, or None. Needs no lock. Invalid files are reported to `progress`."""
    found = []
    for path in paths(directory):
        try:
            next_key = read(path)
        except CertificateError as error:
            progress(f"{error}. It is not announced.")
            continue
        if next_key is not None:
            found.append(next_key)
    return pins_of(found)


def pins_of(next_keys: Iterable[NextKey]) -> NextPins | None:
    waiting = list(next_keys)
    if not waiting:
        return None
    return NextPins(tuple(one.pin for one in waiting), min(one.use_from for one in waiting))


def read(path: Path) -> NextKey | None:
    """Return the next key in this file, or None without the file. Raises CertificateError if it is invalid."""
    with file_errors(path, "read", CertificateError):
        if not path.exists():
            return None
    data = files.read_key_file(path)
    line = _LINE.match(data)
    if line is None:
        raise files.DamagedFileError(f"{path}: is not a next key that was announced here")
    try:
        announced_at, use_from = (
            datetime.strptime(moment.decode("ascii"), _FORM).replace(tzinfo=UTC) for moment in line.groups()
        )
        key = pair.parse_key(data)
    except pair.UNREADABLE as error:
        raise files.DamagedFileError(f"{path}: contains no key and times that can be parsed") from error
    weak = keys.weakness(key)
    if weak is not None:
        raise files.DamagedFileError(f"{path}: {weak}")
    assert isinstance(key, keys.PrivateKey)
    if not keys.belongs(key, key.public_key()):
        raise files.DamagedFileError(f"{path}: its private half is damaged")
    return NextKey(path, key, announced_at, use_from, key_pin(key.public_key()))


def cancel(directory: Path, progress: Progress = lambda sentence: None) -> tuple[Path, ...]:
    """Cancel the announcement and return its files. The keys are set aside because clients may have their pins."""
    files.check_folder(directory)
    with files.locked(directory, progress):
        cancelled = [path for path in paths(directory) if path.exists()]
        for path in cancelled:
            progress(f"{path} will not be used. It was set aside as {files.set_aside(path)}.")
        return tuple(cancelled)


# --- under the folder's lock -------------------------------------------------------------------------------


def find(directory: Path, key_types: Sequence[str], now: datetime, progress: Progress) -> dict[str, NextKey]:
    """Return the next keys of these types, by type. Set others aside."""
    found: dict[str, NextKey] = {}
    for path in paths(directory):
        try:
            with file_errors(path, "used", CertificateError):
                files.discard_staged(path)  # left by an announcement that was interrupted
            next_key = read(path)
        except CertificateError as error:
            _set_aside(path, f"{error}.", progress)
            continue
        if next_key is None:
            continue
        if next_key.key_type not in key_types or path != path_of(directory, keys.family(next_key.key_type)):
            _set_aside(path, f"{path} is a next key of a type that is not configured.", progress)
            continue
        found[next_key.key_type] = _with_valid_time(next_key, now, progress)
    return found


def announce(
    directory: Path, key: keys.PrivateKey, use_from: datetime, now: datetime, progress: Progress
) -> NextKey:
    """Store a key as the next one of its family. If that raises CertificateError, nothing has changed."""
    path = path_of(directory, keys.family(keys.key_type_of(key)))
    next_key = NextKey(
        path, key, now.replace(microsecond=0), use_from.replace(microsecond=0), key_pin(key.public_key())
    )
    times = f"announced at {next_key.announced_at:{_FORM}}, to be used from {next_key.use_from:{_FORM}}"
    files.replace(path, f"zcproto next key, {times}\n".encode("ascii") + keys.key_pem(key))
    progress(
        f"Announced {path}: the next {next_key.key_type} key, pin {next_key.pin},"
        f" will be used from {next_key.use_from:%Y-%m-%d %H:%M} UTC."
    )
    return next_key


def delete(next_key: NextKey) -> None:
    """Delete the file of a next key that has become the key in use."""
    next_key.path.unlink(missing_ok=True)
    sync_folder(next_key.path.parent)


def _with_valid_time(next_key: NextKey, now: datetime, progress: Progress) -> NextKey:
    """Return the next key, with its times moved if it was announced in the future by a wrong clock."""
    ahead = next_key.announced_at - now
    if ahead <= CLOCK_TOLERANCE:
        return next_key
    try:
        return announce(next_key.path.parent, next_key.key, next_key.use_from - ahead, now, progress)
    except CertificateError as error:
        progress(f"the times of {next_key.path} could not be corrected: {error}.")
        return next_key


def _set_aside(path: Path, why: str, progress: Progress) -> None:
    try:
        progress(f"{why} It was set aside as {files.set_aside(path)}.")
    except OSError as error:
        progress(f"{why} It cannot be set aside: {error.strerror or error}; move it away.")
