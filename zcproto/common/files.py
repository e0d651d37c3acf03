"""Read, replace and lock files that belong to one user.

Decides: which owner and mode a file or folder may have, how a file is replaced, and how processes exclude each
other.

Rules:
- Checks apply to the open descriptor, so that a path cannot be swapped between check and use.
- In a sticky folder such as /tmp others cannot move or delete the files of trusted owners. Such a folder is good
  enough for a file that is not secret.
- A file of root may also be readable for a group, which root alone can choose, and a folder on a read-only mount
  may have any mode. Container platforms mount secrets like that for a user who is not root.
- A new file has mode 0600, whatever the umask, and never follows or overwrites what is at its path.
- To replace a file, write a staging file beside it, sync it, rename it and sync the folder: after a crash the
  path holds either the old content or the new. Staging files have a fixed name, `.NAME.new`, which the holder
  of the lock may complete or delete.
- Locks are `flock` on a lock file that stays: the kernel releases a lock when its process ends.
- On Windows, `windows` does what needs modes and `flock`. There, checks apply to the path.

Must not know: what files contain.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from zcproto.common import windows
from zcproto.common.clock import system_clock, system_entropy
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError

try:
    import fcntl
    import pwd
except ImportError:  # Windows
    HAS_MODES = False
else:
    HAS_MODES = True

NO_LINKS: Final = getattr(os, "O_NOFOLLOW", 0)
NO_WAIT: Final = getattr(os, "O_NONBLOCK", 0)
"""Opening a FIFO would wait for the other end."""
OPEN: Final = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
"""Flags of open(2), as far as the system has them, and those of each file: bytes, not for child processes."""

OTHERS_ANY: Final = 0o077
OTHERS_READ_WRITE: Final = 0o066
OTHERS_WRITE: Final = 0o022

MAX_SECRET: Final = 4_096
"""Characters of a secret that has a file to itself."""

_READ: Final = 0o044
_GROUP_READ: Final = 0o040
_ROOT: Final = 0
_LOCK_POLL_S: Final = 0.05
_NO_FOLDER_SYNC: Final = frozenset({errno.EINVAL, errno.ENOTSUP})
"""Network file systems that persist names without being asked."""


class UnusableFileError(ConfigError):
    """A file or folder breaks a rule of this module. The message says how to fix it."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__([f"{escape_text(str(path))}: {reason}"])


@contextmanager
def file_errors(
    path: Path,
    action: str,
    error: Callable[[str], Exception] = lambda fault: ConfigError([fault]),
    *,
    fix: str = "",
) -> Iterator[None]:
    """Raise `error` for an OSError ("PATH: cannot be ACTION: ...; FIX") and for an UnusableFileError."""
    try:
        yield
    except OSError as fault:
        if isinstance(fault, PermissionError):
            fix = access_fix(Path(fault.filename) if isinstance(fault.filename, str) else path)
        reason = f"cannot be {action}: {fault.strerror or fault}{fix and '; ' + fix}"
        raise error(f"{escape_text(str(path))}: {reason}") from fault
    except UnusableFileError as fault:
        raise error(str(fault)) from fault


# --- ownership and mode ----------------------------------------------------------------------------------


def trusted_owners() -> frozenset[int]:
    """Return the users whose files are trusted: this one, and root, who can change them anyway."""
    return frozenset({_ROOT, os.geteuid()})


def owner_fix(path: Path, owner: int) -> str:
    """Return what to do about a file of another user. Root never takes one: a service would lose its files."""
    if os.geteuid() == _ROOT:
        return f"run as that user: sudo -u {user_name(owner)} zcproto --home DIR ..."
    return f"run as that user, or run: chown {os.geteuid()} {_quoted(path)}"


def access_fix(path: Path) -> str:
    """Return what to do about a file or folder that this user may not use."""
    if not HAS_MODES:
        return "run this as the user of the server"
    try:
        status = path.stat()
    except FileNotFoundError:
        return f"let the user of the server write to {_quoted(path.parent)}"
    except OSError:
        return "run this as the user of the server"
    if status.st_uid == os.geteuid():
        return f"run: chmod u+rw{'x' if stat.S_ISDIR(status.st_mode) else ''} {_quoted(path)}"
    if status.st_uid != _ROOT:
        return f"run this as its owner: sudo -u {user_name(status.st_uid)} zcproto --home DIR ..."
    command = f"chown {os.geteuid()} {_quoted(path)}"
    return f"run this as the user of the server; if this is that user, let root run: {command}"


def user_name(uid: int) -> str:
    """Return the name of a user for sudo."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"'#{uid}'"


def check_mode(path: Path, status: os.stat_result, forbidden: int) -> None:
    """Raise UnusableFileError if a file or folder grants one of the `forbidden` rights."""
    if not HAS_MODES:
        _check_list(path, forbidden)
        return
    if stat.S_ISREG(status.st_mode) and status.st_uid == _ROOT != os.geteuid():
        forbidden &= ~_GROUP_READ
    if not status.st_mode & forbidden:
        return
    is_folder = stat.S_ISDIR(status.st_mode)
    rights = "change"
    mode = "go-w"
    if forbidden & _READ:
        rights = f"{'list' if is_folder else 'read'} or change"
        mode = "700" if is_folder else "600"
    raise UnusableFileError(
        path,
        f"others can {rights} this {'folder' if is_folder else 'file'}"
        f" (mode {stat.S_IMODE(status.st_mode):04o}); run: chmod {mode} {_quoted(path)}",
    )


def _check_list(path: Path, forbidden: int) -> None:
    """Apply `check_mode` on Windows."""
    if not forbidden:
        return
    rights, kind = ("read or change", windows.ANY) if forbidden & _READ else ("change", windows.CHANGE)
    if others := windows.others_with(path, kind):
        named = escape_text(", ".join(others), 200)
        raise UnusableFileError(
            path, f"others can {rights} it ({named}); run: {private_command(path)}, and check its owner"
        )


def is_private(path: Path, status: os.stat_result) -> bool:
    """Return whether only the owner, the system and administrators can read or change a file."""
    return not (status.st_mode & OTHERS_ANY if HAS_MODES else windows.others_with(path, windows.ANY))


def private_command(path: Path) -> str:
    """Return the command that makes a file private."""
    if HAS_MODES:
        return f"chmod 600 {_quoted(path)}"
    return f'icacls "{escape_text(str(path))}" /inheritance:r /grant:r "%USERNAME%":F'


def check_access(path: Path, status: os.stat_result, forbidden: int = OTHERS_ANY) -> None:
    """Raise UnusableFileError if a file or folder has an untrusted owner, or grants a forbidden right."""
    if HAS_MODES and status.st_uid not in trusted_owners():
        fix = owner_fix(path, status.st_uid)
        raise UnusableFileError(path, f"belongs to another user (uid {status.st_uid}); {fix}")
    check_mode(path, status, forbidden)


def check_folder(path: Path, forbidden: int = OTHERS_WRITE, *, may_be_sticky: bool = False) -> None:
    """Raise UnusableFileError unless `path` is a folder with a trusted owner and no forbidden right."""
    status = path.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise UnusableFileError(path, "is not a folder; move it away, or name another folder")
    is_read_only = HAS_MODES and os.statvfs(path).f_flag & os.ST_RDONLY
    is_safe = is_read_only or (may_be_sticky and status.st_mode & stat.S_ISVTX)
    check_access(path, status, 0 if is_safe else forbidden)


def check_folders(path: Path, forbidden: int = OTHERS_WRITE, *, may_be_sticky: bool = False) -> None:
    """Check the folder of a file, and if the path is a link also the folder of the link."""
    named = Path(os.path.abspath(path)).parent
    real = Path(os.path.realpath(path)).parent
    if not os.path.samefile(named, real):
        # Who can change the folder of a link can redirect it. Listing that folder reveals nothing.
        check_folder(named, OTHERS_WRITE, may_be_sticky=may_be_sticky)
    check_folder(real, forbidden, may_be_sticky=may_be_sticky)


def read_trusted_file(path: Path, max_bytes: int) -> bytes:
    """Return the content of a file that others may read, but neither change nor replace.

    Raises OSError, UnusableFileError.
    """
    data, _ = read_file(path, max_bytes, forbidden=OTHERS_WRITE)
    check_place(path)
    return data


def check_place(path: Path) -> None:
    """Raise UnusableFileError if others can put another file at a path: in its folder, or through a link there."""
    check_access(path, path.lstat(), 0)  # in a sticky folder others can create links
    check_folders(path, may_be_sticky=True)


def _quoted(path: Path) -> str:
    return escape_text(shlex.quote(str(path)))


# --- reading ---------------------------------------------------------------------------------------------


def read_file(
    path: Path, max_bytes: int, *, forbidden: int | None = OTHERS_ANY, follow_links: bool = True
) -> tuple[bytes, os.stat_result]:
    """Return the content and the status of a regular file of at most `max_bytes`.

    The owner and mode are checked too, unless `forbidden` is None. Raises OSError, UnusableFileError.
    """
    if not follow_links and not NO_LINKS and path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    descriptor = os.open(path, os.O_RDONLY | OPEN | NO_WAIT | (0 if follow_links else NO_LINKS))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnusableFileError(path, "is not a regular file; check the path")
        if forbidden is not None:
            check_access(path, status, forbidden)
        size = status.st_size
        if size <= max_bytes:  # else do not even begin to read
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(max_bytes + 1)
            size = len(data)
    finally:
        os.close(descriptor)
    if size > max_bytes:
        raise UnusableFileError(path, f"is larger than {max_bytes} bytes; check the path")
    return data, status


PRIVATE_FIX: Final = "create it for the user of the server alone (mode 0600), or correct its path"


def read_secret(path: Path, key: str, *, least: int = 1) -> str:
    """Return the one line of a file that only its owner can read. `key` is the setting that names the file.

    Raises ConfigError if the file is missing, readable by others, or not one line of `least` to MAX_SECRET
    characters.
    """
    with file_errors(path, "read", lambda fault: ConfigError([f"{key}: {fault}"]), fix=PRIVATE_FIX):
        data, status = read_file(path, MAX_SECRET + 2, forbidden=None)
        check_mode(path, status, OTHERS_ANY)
    text = data.decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")
    if not least <= len(text) <= MAX_SECRET or not text.isprintable() or "\ufffd" in text:
        count = f"up to {MAX_SECRET}" if least == 1 else f"{least} to {MAX_SECRET}"
        raise ConfigError([f"{key}: {escape_text(str(path))}: must hold one line of {count} characters"])
    return text


# --- writing ---------------------------------------------------------------------------------------------


def create_file(path: Path) -> int:
    """Create a file of mode 0600 and return a descriptor for it. Raises FileExistsError, also for a link."""
    if not HAS_MODES:
        return windows.create_private(path)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINKS | OPEN, 0o600)
    try:
        os.fchmod(descriptor, 0o600)  # a umask may have taken the owner's bits
    except BaseException:
        os.close(descriptor)
        with suppress(OSError):
            path.unlink()
        raise
    return descriptor


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Create a file of mode 0600, and sync it when the body has written it; delete it if the body raises."""
    descriptor = create_file(path)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            sync(descriptor)
    except BaseException:
        with suppress(OSError):  # the first error is the one to report
            path.unlink(missing_ok=True)
        raise


@contextmanager
def replaced_file(path: Path, *, is_locked: bool = True) -> Iterator[BinaryIO]:
    """Replace a file, in one step, by what the body writes; keep the old one if the body raises.

    Without a lock the staging file has a random name, which a crash leaves behind.
    """
    staged = staging_path(path)
    if is_locked:
        staged.unlink(missing_ok=True)  # left by a crash
    else:
        staged = path.with_name(f".{path.name}.{system_entropy(8).hex()}")
    with new_file(staged) as file:
        yield file
    try:
        install_file(staged, path)
    except BaseException:
        with suppress(OSError):
            staged.unlink(missing_ok=True)
        raise


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file, in one step, by `data`. The caller holds the lock."""
    with replaced_file(path) as file:
        file.write(data)


def staging_path(path: Path) -> Path:
    """Return the path at which the next content of `path` is written."""
    return path.with_name(f".{path.name}.new")


def install_file(staged: Path, path: Path) -> None:
    """Rename a synced staging file to its final path, and sync the folder before anything else is renamed."""
    staged.replace(path)
    sync_folder(path.parent)


def sync(descriptor: int) -> None:
    """Write a file through to the disk. On macOS fsync(2) leaves it in the cache of the disk."""
    full: int | None = getattr(fcntl, "F_FULLFSYNC", None) if HAS_MODES else None
    if full is not None:
        with suppress(OSError):  # a file system without it, as of a network
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Persist the names in a folder. Windows does it by itself."""
    if not HAS_MODES:
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | OPEN)
    try:
        sync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


# --- locking ---------------------------------------------------------------------------------------------


def try_lock(path: Path, *, create: bool = True) -> int | None:
    """Return a descriptor that holds the lock until it is closed, or None if another one holds it."""
    flags = os.O_RDWR | NO_LINKS | OPEN | (os.O_CREAT if create else 0)
    descriptor = os.open(path, flags, 0o600)
    try:
        if HAS_MODES:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            windows.lock(descriptor)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock. A missing lock file is not created."""
    try:
        descriptor = try_lock(path, create=False)
    except FileNotFoundError:
        return False
    if descriptor is None:
        return True
    os.close(descriptor)
    return False


@contextmanager
def locked(
    path: Path,
    wait_s: float,
    *,
    on_wait: Callable[[], None] | None = None,
    now: Callable[[], float] = system_clock.now,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[None]:
    """Hold a lock, exclusive among threads and processes. `on_wait` is called once if it is not free.

    Raises UnusableFileError after `wait_s` seconds.
    """
    deadline: float | None = None
    while (descriptor := try_lock(path)) is None:
        if deadline is None:
            deadline = now() + wait_s
            if on_wait is not None:
                on_wait()
        elif now() >= deadline:
            raise UnusableFileError(
                path,
                f"another process has held this lock for {wait_s:g} s; wait until it ends, then try again",
            )
        sleep(_LOCK_POLL_S)
    try:
        yield
    finally:
        os.close(descriptor)
