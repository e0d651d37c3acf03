"""Decides how keys wait that are announced and not used yet: the next keys.

Rules:
- A next key is in the folder of the certificates, beside the key that it will replace: `server.next.key` or
  `server-ecdsa.next.key`, 0600, PKCS#8. A line before it (RFC 7468 section 2 allows such text) says when it
  was announced and from when it may be used. One file is written at one moment, so there is never a key
  without its time.
- Its pin may be told to clients as soon as the file is in place; from then on the key is never lost. It is
  deleted only when it is in the place of the key in use; until then the file stays.
- A file that is no next key, or one that others could read, is put aside with a word. It never stops a
  server: the keys in use are as good as before.
- If the clock was set back since the announcement, the announcement lasts as long as it was meant to.

Must not know: certificates, when keys are to be replaced. Whoever writes holds the folder's lock.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from zcproto.certs import files, keys, pair
from zcproto.certs.certificates import NextPins
from zcproto.errors import CertificateError

FILE_NAMES = {"rsa": "server", "ecdsa": "server-ecdsa"}
"""What the files of each key family are called, without their ends."""

CLOCK_TOLERANCE = timedelta(hours=1)
"""A clock that was set back by less leaves an announcement as it is."""

_TIME = r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)"
_FORM = "%Y-%m-%dT%H:%M:%SZ"
_LINE = re.compile(
    rf"zcproto next key, announced at {_TIME}, to be used from {_TIME}\n-----BEGIN PRIVATE KEY".encode()
)


@dataclass(frozen=True, slots=True)
class NextKey:
    """A key that is announced and waits for its time."""

    path: Path
    key: keys.PrivateKey
    announced_at: datetime
    use_from: datetime
    """Both aware, in UTC, in whole seconds."""
    pin: str

    @property
    def key_type(self) -> str:
        return keys.key_type_of(self.key)


def path_of(directory: Path, family: str) -> Path:
    """Where the next key of a family waits."""
    return directory / f"{FILE_NAMES[family]}.next.key"


def paths(directory: Path) -> tuple[Path, ...]:
    """Where next keys may be, whether they are there or not."""
    return tuple(path_of(directory, family) for family in FILE_NAMES)


def key_pin(key: keys.PrivateKey) -> str:
    """The pin that a certificate for this key will have."""
    info = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return "sha256/" + base64.b64encode(hashlib.sha256(info).digest()).decode("ascii")


def announced(directory: Path, progress: Callable[[str], None] = lambda sentence: None) -> NextPins | None:
    """What is announced in this folder; None if nothing is. Needs no lock, and changes nothing.

    `progress` is told of a file that is no next key.
    """
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
    """The next key in this file; None if there is no such file. CertificateError if it cannot be used."""
    with files.translated(path, "read"):
        if not path.exists():
            return None
    data = files.read_key_file(path)
    line = _LINE.match(data)
    if line is None:
        raise files.DamagedFileError(f"{path}: is no next key that was announced here")
    try:
        announced_at, use_from = (
            datetime.strptime(moment.decode("ascii"), _FORM).replace(tzinfo=UTC) for moment in line.groups()
        )
        key = pair.parse_key(data)
    except pair.UNREADABLE as error:
        raise files.DamagedFileError(f"{path}: holds no key and times that can be read") from error
    weak = keys.weakness(key)
    if weak is not None:
        raise files.DamagedFileError(f"{path}: {weak}")
    assert isinstance(key, keys.PrivateKey)
    if not keys.belongs(key, key.public_key()):
        raise files.DamagedFileError(f"{path}: its private half is damaged")
    return NextKey(path, key, announced_at, use_from, key_pin(key))


# --- under the folder's lock ------------------------------------------------------------------------------


def find(
    directory: Path, key_types: Sequence[str], now: datetime, progress: Callable[[str], None]
) -> dict[str, NextKey]:
    """The next keys that wait for their time, by key type. Others are put aside."""
    found: dict[str, NextKey] = {}
    for path in paths(directory):
        try:
            with files.translated(path, "used"):
                files.discard_staged(path, path)  # of an announcement that was never made
            next_key = read(path)
        except CertificateError as error:
            _put_aside(path, f"{error}.", progress)
            continue
        if next_key is None:
            continue
        if next_key.key_type not in key_types or path != path_of(directory, keys.family(next_key.key_type)):
            _put_aside(path, f"{path} is a next key of a type that is not wanted.", progress)
            continue
        found[next_key.key_type] = _in_its_time(next_key, now, progress)
    return found


def announce(
    directory: Path, key: keys.PrivateKey, use_from: datetime, now: datetime, progress: Callable[[str], None]
) -> NextKey:
    """Puts a new key in its place as the next one of its family; its pin may be told from then on.

    Raises CertificateError if it cannot be written; nothing has changed then.
    """
    path = path_of(directory, keys.family(keys.key_type_of(key)))
    next_key = NextKey(path, key, _whole(now), _whole(use_from), key_pin(key))
    _write(next_key)
    progress(
        f"Announced {path}: the next {next_key.key_type} key, pin {next_key.pin},"
        f" will be used from {next_key.use_from:%Y-%m-%d %H:%M} UTC."
    )
    return next_key


def move(next_key: NextKey, use_from: datetime, now: datetime, progress: Callable[[str], None]) -> NextKey:
    """Announces the same key for another time."""
    return announce(next_key.path.parent, next_key.key, use_from, now, progress)


def used(next_key: NextKey) -> None:
    """Deletes the file of a next key that is now in the place of the key in use."""
    next_key.path.unlink(missing_ok=True)
    files.sync_folder(next_key.path.parent)


def cancel(directory: Path, progress: Callable[[str], None]) -> tuple[Path, ...]:
    """Takes back what is announced. The keys are put aside, as clients may have been told of them."""
    cancelled = [path for path in paths(directory) if path.exists()]
    for path in cancelled:
        progress(f"{path} will not be used. It is put aside as {files.set_aside(path)}.")
    return tuple(cancelled)


def _in_its_time(next_key: NextKey, now: datetime, progress: Callable[[str], None]) -> NextKey:
    """The next key, moved if it was announced in what is now the future: that clock was wrong."""
    ahead = next_key.announced_at - now
    if ahead <= CLOCK_TOLERANCE:
        return next_key
    try:
        return move(next_key, next_key.use_from - ahead, now, progress)
    except CertificateError as error:
        progress(f"{next_key.path} could not be given its right time: {error}.")
        return next_key


def _write(next_key: NextKey) -> None:
    times = [f"{moment:{_FORM}}" for moment in (next_key.announced_at, next_key.use_from)]
    line = f"zcproto next key, announced at {times[0]}, to be used from {times[1]}\n"
    data = line.encode("ascii") + keys.key_pem(next_key.key)
    files.discard_staged(next_key.path, next_key.path)
    files.install(next_key.path, data, next_key.path, None)  # one file, as there is nothing beside it


def _put_aside(path: Path, why: str, progress: Callable[[str], None]) -> None:
    try:
        progress(f"{why} It is put aside as {files.set_aside(path)}.")
    except OSError as error:
        progress(f"{why} It cannot be put aside: {error.strerror or error}; move it away.")


def _whole(moment: datetime) -> datetime:
    return moment.replace(microsecond=0)
