from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from io import BufferedWriter
from pathlib import Path
from typing import Any

import pytest

from tests.common.support import mount_read_only
from zcproto.common import files
from zcproto.common.files import (
    OTHERS_ANY,
    OTHERS_READ_WRITE,
    OTHERS_WRITE,
    UnusableFileError,
    check_access,
    check_folder,
    check_mode,
    create_file,
    file_errors,
    install_file,
    is_locked,
    locked,
    new_file,
    owner_fix,
    read_file,
    read_secret,
    read_trusted_file,
    replace_file,
    replaced_file,
    staging_path,
    sync_folder,
    try_lock,
)
from zcproto.errors import CertificateError, ConfigError


def put(path: Path, data: bytes = b"old", mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def failing(number: int) -> Callable[..., Any]:
    def fail(*arguments: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a file"


# Ownership and mode


def test_file_of_a_trusted_owner_is_accepted(path: Path) -> None:
    assert files.trusted_owners() == {0, os.geteuid()}
    check_access(path, put(path).stat())


def test_file_of_a_foreign_owner_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = put(path).stat()
    monkeypatch.setattr(files, "trusted_owners", lambda: {status.st_uid + 1})
    with pytest.raises(UnusableFileError) as caught:
        check_access(path, status)
    fix = owner_fix(path, status.st_uid)
    assert caught.value.faults == [f"{path}: belongs to another user (uid {status.st_uid}); {fix}"]


@pytest.mark.parametrize(
    ("user", "owner", "fix"),
    [
        (1000, 4711, "run as that user, or run: chown 1000 '{path}'"),
        (0, 4711, "run as that user: sudo -u '#4711' zcproto --home DIR ..."),
        (0, 0, "run as that user: sudo -u root zcproto --home DIR ..."),
    ],
)
def test_root_is_never_advised_to_take_a_file(
    user: int, owner: int, fix: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert owner_fix(path, owner) == fix.format(path=path)


@pytest.mark.parametrize(
    ("kind", "forbidden", "mode", "fault"),
    [
        ("file", OTHERS_ANY, 0o640, "others can read or change this file (mode 0640); run: chmod 600"),
        ("file", OTHERS_ANY, 0o601, "others can read or change this file (mode 0601); run: chmod 600"),
        ("file", OTHERS_WRITE, 0o664, "others can change this file (mode 0664); run: chmod go-w"),
        (
            "folder",
            OTHERS_READ_WRITE,
            0o750,
            "others can list or change this folder (mode 0750); run: chmod 700",
        ),
        ("folder", OTHERS_WRITE, 0o722, "others can change this folder (mode 0722); run: chmod go-w"),
    ],
)
def test_forbidden_mode_is_refused_with_the_command_that_fixes_it(
    path: Path, kind: str, forbidden: int, mode: int, fault: str
) -> None:
    path.mkdir() if kind == "folder" else path.touch()
    path.chmod(mode)
    with pytest.raises(UnusableFileError) as caught:
        check_access(path, path.stat(), forbidden)
    assert caught.value.faults == [f"{path}: {fault} '{path}'"]


@pytest.mark.parametrize(("forbidden", "mode"), [(OTHERS_READ_WRITE, 0o711), (OTHERS_WRITE, 0o755)])
def test_permitted_mode_is_accepted(path: Path, forbidden: int, mode: int) -> None:
    path.mkdir()
    path.chmod(mode)
    check_mode(path, path.stat(), forbidden)
    check_folder(path, forbidden)


@pytest.mark.parametrize(
    ("owner", "mode", "user", "is_accepted"),
    [
        (0, 0o440, 10_001, True),  # a Secret of Kubernetes
        (0, 0o640, 10_001, True),
        (0, 0o660, 10_001, False),
        (0, 0o444, 10_001, False),
        (0, 0o440, 0, False),  # root needs no group
        (10_001, 0o440, 10_001, False),
    ],
)
def test_file_of_root_may_be_readable_for_a_group(
    owner: int, mode: int, user: int, is_accepted: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    status = os.stat_result((stat.S_IFREG | mode, 1, 1, 1, owner, 10_001, 9, 0, 0, 0))
    if is_accepted:
        check_access(path, status)
        return
    with pytest.raises(UnusableFileError, match="others can"):
        check_access(path, status)


def test_folder_on_a_read_only_mount_may_have_any_mode(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.mkdir()
    path.chmod(0o1777)
    with pytest.raises(UnusableFileError, match="others can list or change"):
        check_folder(path, OTHERS_READ_WRITE)
    mount_read_only(monkeypatch)
    check_folder(path, OTHERS_READ_WRITE)
    monkeypatch.setattr(files, "trusted_owners", lambda: {path.stat().st_uid + 1})
    with pytest.raises(UnusableFileError, match="belongs to another user"):
        check_folder(path, OTHERS_READ_WRITE)


@pytest.mark.parametrize("mode", [0o755, 0o1777])
def test_file_in_a_folder_where_others_cannot_replace_it_is_read(path: Path, mode: int) -> None:
    path.mkdir()
    path.chmod(mode)
    assert read_trusted_file(put(path / "file", b"text", 0o644), 9) == b"text"


@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_file_in_a_folder_where_others_can_replace_it_is_refused(path: Path, mode: int) -> None:
    path.mkdir()
    path.chmod(mode)
    with pytest.raises(
        UnusableFileError, match=rf"others can change this folder \(mode 0{mode:o}\); run: chmod go-w"
    ):
        read_trusted_file(put(path / "file"), 9)


@pytest.mark.parametrize("mode", [0o620, 0o606])
def test_file_that_others_can_change_is_not_trusted(path: Path, mode: int) -> None:
    with pytest.raises(UnusableFileError, match="others can change this file"):
        read_trusted_file(put(path, mode=mode), 9)


@pytest.mark.parametrize("open_folder", ["of the link", "of the target"])
def test_both_folders_of_a_linked_file_are_checked(tmp_path: Path, open_folder: str) -> None:
    folders = {name: tmp_path / name for name in ("of the link", "of the target")}
    for each in folders.values():
        each.mkdir()
    target = put(folders["of the target"] / "file")
    link = folders["of the link"] / "file"
    link.symlink_to(target)
    assert read_trusted_file(link, 9) == b"old"
    folders[open_folder].chmod(0o777)
    with pytest.raises(UnusableFileError, match=f"{open_folder}: others can change this folder"):
        read_trusted_file(link, 9)


def test_link_of_another_user_in_a_sticky_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shared").mkdir(0o777)
    (tmp_path / "shared").chmod(0o1777)
    link = tmp_path / "shared" / "link"
    link.symlink_to(put(tmp_path / "file"))
    read_trusted_file(link, 9)
    lstat = Path.lstat

    def of_another_user(path: Path) -> os.stat_result:
        fields = list(lstat(path))
        fields[stat.ST_UID] = 4711
        return os.stat_result(fields)

    monkeypatch.setattr(Path, "lstat", of_another_user)
    with pytest.raises(UnusableFileError, match=r"link: belongs to another user \(uid 4711\)"):
        read_trusted_file(link, 9)


def test_file_in_place_of_a_folder_is_refused(path: Path) -> None:
    with pytest.raises(UnusableFileError, match="is not a folder; move it away"):
        check_folder(put(path))


# Errors


def test_system_error_names_path_action_and_fix(tmp_path: Path) -> None:
    path = tmp_path / "a\nb"
    with pytest.raises(ConfigError) as caught, file_errors(path, "read"):
        read_file(path, 10)
    assert caught.value.faults == [f"{tmp_path}/a\\nb: cannot be read: No such file or directory"]
    with pytest.raises(CertificateError) as other, file_errors(path, "read", CertificateError, fix="mend it"):
        read_file(path, 10)
    assert str(other.value) == f"{tmp_path}/a\\nb: cannot be read: No such file or directory; mend it"


@pytest.mark.parametrize(
    ("owner", "reader", "what", "cure"),
    [
        (None, 1000, "missing", "let the user of the server write to {folder}"),
        (1000, 1000, "file", "run: chmod u+rw {path}"),
        (1000, 1000, "folder", "run: chmod u+rwx {path}"),
        (4711, 1000, "file", "run this as its owner: sudo -u '#4711' zcproto --home DIR ..."),
        (
            0,
            1000,
            "file",
            "run this as the user of the server; if this is that user, let root run: chown 1000 {path}",
        ),
        (None, 1000, "hidden", "run this as the user of the server"),
    ],
)
def test_denied_access_names_who_can_grant_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: int | None, reader: int, what: str, cure: str
) -> None:
    path = tmp_path / "file"
    if what == "folder":
        path.mkdir()
    elif what != "missing":
        path.touch()
    real = Path.stat

    def stat_of(each: Path, **options: Any) -> os.stat_result:
        if each == path and what == "hidden":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        values = list(real(each, **options))
        values[4] = values[4] if owner is None else owner
        return os.stat_result(values)

    monkeypatch.setattr(Path, "stat", stat_of)
    monkeypatch.setattr(os, "geteuid", lambda: reader)
    with pytest.raises(ConfigError) as denied, file_errors(tmp_path, "used", fix="check it"):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    fix = cure.format(path=path, folder=tmp_path)
    assert denied.value.faults == [f"{tmp_path}: cannot be used: Permission denied; {fix}"]


def test_unusable_file_becomes_the_error_of_the_caller(path: Path) -> None:
    put(path, mode=0o644)
    with (
        pytest.raises(CertificateError, match="others can read"),
        file_errors(path, "read", CertificateError),
    ):
        read_file(path, 10)


def test_system_error_without_a_text_is_still_named(path: Path) -> None:
    with pytest.raises(ConfigError, match=": cannot be read: no text"), file_errors(path, "read"):
        raise OSError("no text")


# Reading


def test_content_and_status_of_one_open_file_are_returned(path: Path) -> None:
    data, status = read_file(put(path), 3)
    assert data == b"old"
    assert status.st_ino == path.stat().st_ino


def test_mode_is_not_checked_unless_asked(path: Path) -> None:
    assert read_file(put(path, mode=0o666), 10, forbidden=None)[0] == b"old"
    assert read_file(put(path, mode=0o644), 10, forbidden=OTHERS_WRITE)[0] == b"old"


def test_too_large_file_is_refused_unread(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(path)
    os.truncate(path, 1 << 40)
    with pytest.raises(UnusableFileError, match="is larger than 10 bytes; check the path"):
        read_file(path, 10)


def test_file_that_grows_while_it_is_read_is_refused() -> None:
    with pytest.raises(UnusableFileError, match="is larger than 10 bytes"):
        read_file(Path("/proc/self/status"), 10, forbidden=None)  # its size is reported as 0


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_fifo_and_folder_are_refused_without_blocking(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    with pytest.raises(UnusableFileError, match="is not a regular file"):
        read_file(path, 10)


def test_symbolic_link_is_followed_unless_forbidden(path: Path, tmp_path: Path) -> None:
    path.symlink_to(put(tmp_path / "target"))
    assert read_file(path, 10)[0] == b"old"
    with pytest.raises(OSError, match="symbolic link"):
        read_file(path, 10, follow_links=False)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_secret_is_one_line(path: Path, end: bytes) -> None:
    assert read_secret(put(path, b"hunter2" + end), "key") == "hunter2"


@pytest.mark.parametrize("data", [b"", b"\n", b"x" * 4_097, b"\xff", b"two\nlines"])
def test_secret_that_is_not_one_line_is_refused(path: Path, data: bytes) -> None:
    with pytest.raises(ConfigError) as caught:
        read_secret(put(path, data), "alerts.webhook_secret_file")
    assert caught.value.faults == [
        f"alerts.webhook_secret_file: {path}: must hold one line of up to 4096 characters"
    ]
    with pytest.raises(ConfigError, match="of 16 to 4096 characters"):
        read_secret(put(path, b"short"), "key", least=16)


def test_readable_or_missing_or_large_secret_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^key: .*: cannot be read: No such file"):
        read_secret(path, "key")
    with pytest.raises(ConfigError, match=r"^key: .*: others can read .*; run: chmod 600 "):
        read_secret(put(path, mode=0o640), "key")
    with pytest.raises(ConfigError, match=r"^key: .*: is larger than 4098 bytes"):
        read_secret(put(path, b"x" * 10_000), "key")


# Writing


@pytest.mark.parametrize("umask", [0, 0o077, 0o277])
def test_new_file_has_mode_0600_with_any_umask(path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        with new_file(path) as file:
            file.write(b"new")
    finally:
        os.umask(old)
    assert path.read_bytes() == b"new"
    assert mode_of(path) == 0o600


def test_new_file_does_not_overwrite_or_follow_a_link(path: Path, tmp_path: Path) -> None:
    put(path)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for taken in (path, tmp_path / "link"):
        with pytest.raises(FileExistsError), new_file(taken):
            pass
    assert path.read_bytes() == b"old"
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("call", ["fsync", "fchmod"])
def test_new_file_is_deleted_when_the_disk_fails(
    path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, call, failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"), new_file(path) as file:
        file.write(b"new")
    assert len(os.listdir("/proc/self/fd")) == before
    assert not path.exists()


def test_new_file_is_deleted_when_the_body_raises(path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_file(path):
        raise KeyboardInterrupt
    assert not path.exists()


@pytest.mark.parametrize("is_locked", [True, False])
def test_replaced_file_has_new_content_and_mode(path: Path, is_locked: bool) -> None:
    put(path, mode=0o644)
    with replaced_file(path, is_locked=is_locked) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert mode_of(path) == 0o600
    assert os.listdir(path.parent) == [path.name]


def test_replacing_a_link_leaves_its_target_alone(path: Path, tmp_path: Path) -> None:
    target = put(tmp_path / "target")
    path.symlink_to(target)
    replace_file(path, b"new")
    assert target.read_bytes() == b"old"
    assert not path.is_symlink()
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("is_locked", [True, False])
@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_full_disk_keeps_the_old_file_and_leaves_no_staging_file(
    path: Path, step: str, is_locked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(path)
    with monkeypatch.context() as patch:
        write = failing(errno.ENOSPC) if step == "write" else BufferedWriter.write
        if step != "write":
            patch.setattr(os if step == "fsync" else Path, step, failing(errno.ENOSPC))
        with (
            pytest.raises(OSError, match="No space left"),
            replaced_file(path, is_locked=is_locked) as file,
        ):
            write(file, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("step", ["fsync", "replace", "sync_folder"])
def test_crash_between_steps_leaves_the_old_or_the_new_file(path: Path, step: str) -> None:
    put(path)
    child = os.fork()
    if not child:
        target: Any = {"fsync": os, "replace": Path, "sync_folder": files}[step]
        setattr(target, step, lambda *arguments: os._exit(9))
        replace_file(path, b"new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert path.read_bytes() == (b"new" if step == "sync_folder" else b"old")
    assert staging_path(path).exists() == (step != "sync_folder")
    replace_file(path, b"next")
    assert path.read_bytes() == b"next"
    assert os.listdir(path.parent) == [path.name]


def test_content_reaches_the_disk_before_its_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    sync, replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        steps.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    replace_file(path, b"new")
    assert steps == ["file", "rename", "folder"]


def test_staging_file_can_be_written_and_installed_separately(path: Path) -> None:
    os.close(create_file(staging_path(path)))
    install_file(staging_path(path), path)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_file_system_that_cannot_sync_folders_is_accepted(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    sync_folder(tmp_path)


def test_failing_folder_sync_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)


# Locking


def test_lock_is_exclusive_until_its_descriptor_is_closed(path: Path) -> None:
    assert not is_locked(path)
    assert not path.exists()
    descriptor = try_lock(path)
    assert descriptor is not None
    assert mode_of(path) == 0o600
    assert is_locked(path)
    assert try_lock(path) is None
    os.close(descriptor)
    assert not is_locked(path)


def test_lock_of_a_killed_process_is_released(path: Path) -> None:
    child = os.fork()
    if not child:
        with locked(path, 0):
            os._exit(0)
    os.waitpid(child, 0)
    assert not is_locked(path)


def test_lock_file_that_is_a_link_is_refused(path: Path, tmp_path: Path) -> None:
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"), locked(path, 0):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_file_system_without_locks_is_reported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    with pytest.raises(OSError, match="No locks available"), locked(path, 0):
        pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_busy_lock_is_waited_for(path: Path) -> None:
    waits: list[str] = []
    holder = try_lock(path)
    assert holder is not None

    def sleep(seconds: float) -> None:
        waits.append("slept")
        os.close(holder)

    with locked(path, 5.0, on_wait=lambda: waits.append("noticed"), now=lambda: 0.0, sleep=sleep):
        assert is_locked(path)
    assert waits == ["noticed", "slept"]
    assert not is_locked(path)


def test_lock_that_stays_busy_is_an_error(path: Path) -> None:
    times = iter([0.0, 4.0, 5.0])
    holder = try_lock(path)
    assert holder is not None
    with (
        pytest.raises(
            UnusableFileError, match="another process has held this lock for 5 s; wait until it ends"
        ),
        locked(path, 5.0, now=lambda: next(times), sleep=lambda seconds: None),
    ):
        pass
    os.close(holder)


def test_lock_is_released_when_the_body_raises(path: Path) -> None:
    with pytest.raises(KeyError), locked(path, 0):
        raise KeyError
    assert not is_locked(path)


@pytest.mark.parametrize("is_supported", [True, False])
def test_file_is_synced_through_the_cache_of_the_disk_on_macos(
    monkeypatch: pytest.MonkeyPatch, is_supported: bool
) -> None:
    calls: list[tuple[int, ...]] = []

    def control(*arguments: int) -> None:
        calls.append(arguments)
        if not is_supported:  # by this file system
            raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append((descriptor,)))
    files.sync(7)
    assert calls == [(7, 51), *([] if is_supported else [(7,)])]
