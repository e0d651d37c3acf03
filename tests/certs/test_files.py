from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest

from tests.certs.support import bytes_of
from zcproto.certs import files
from zcproto.common import files as common
from zcproto.errors import CertificateError

PEM_KEY = b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"


def put(path: Path, data: bytes = b"data", mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    directory = tmp_path / "the folder"
    directory.mkdir(0o700)
    return directory


# --- reading


def test_private_key_file_is_read(folder: Path) -> None:
    assert files.read_key_file(put(folder / "a.key")) == b"data"
    assert files.read_key_file(put(folder / "b.key", mode=0o400)) == b"data"


@pytest.mark.parametrize("mode", [0o640, 0o620, 0o610, 0o604, 0o602, 0o601, 0o666, 0o644, 0o660])
def test_key_accessible_by_others_is_refused_with_the_chmod(folder: Path, mode: int) -> None:
    path = put(folder / "a.key", PEM_KEY, mode)
    with pytest.raises(CertificateError) as caught:
        files.read_key_file(path)
    assert str(caught.value) == (
        f"{path}: others can read or change this file (mode {mode:04o}); run: chmod 600 '{path}'"
    )
    assert mode_of(path) == mode


@pytest.mark.parametrize("mode", [0o740, 0o720, 0o704, 0o702, 0o755, 0o777, 0o1777])
def test_key_in_a_folder_accessible_by_others_is_refused(folder: Path, mode: int) -> None:
    path = put(folder / "a.key")
    folder.chmod(mode)
    with pytest.raises(CertificateError) as caught:
        files.read_key_file(path)
    assert f"{folder}: others can list or change this folder (mode {mode:04o})" in str(caught.value)
    assert f"run: chmod 700 '{folder}'" in str(caught.value)


def test_key_in_a_folder_that_others_can_only_traverse_is_read(folder: Path) -> None:
    path = put(folder / "a.key")
    folder.chmod(0o711)
    assert files.read_key_file(path) == b"data"


def test_certificate_can_be_readable_but_not_writable_by_others(folder: Path) -> None:
    path = put(folder / "a.crt", mode=0o644)
    folder.chmod(0o755)
    assert files.read_certificate_file(path) == b"data"
    path.chmod(0o664)
    with pytest.raises(
        CertificateError, match=r"a\.crt: others can change this file \(mode 0664\); run: chmod go-w "
    ):
        files.read_certificate_file(path)
    path.chmod(0o644)
    folder.chmod(0o757)
    with pytest.raises(CertificateError, match=r"the folder: others can change this folder \(mode 0757\)"):
        files.read_certificate_file(path)


def test_certificate_file_with_a_key_is_protected_like_a_key(folder: Path) -> None:
    path = put(folder / "both.pem", b"certificate\n" + PEM_KEY, 0o644)
    with pytest.raises(CertificateError, match="others can read or change this file"):
        files.read_certificate_file(path)
    path.chmod(0o600)
    assert files.read_certificate_file(path).endswith(PEM_KEY)


def test_files_and_folders_of_another_user_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(folder / "a.key")
    owner = path.stat().st_uid
    monkeypatch.setattr(common, "trusted_owners", lambda: frozenset({owner + 1}))
    for refuse, what in (
        (files.read_key_file, path),
        (files.read_certificate_file, path),
        (files.check_folder, folder),
    ):
        with pytest.raises(CertificateError) as caught:
            refuse(what)
        assert str(caught.value) == (
            f"{what}: belongs to another user (uid {owner}); {common.owner_fix(what, owner)}"
        )


def test_link_is_followed_and_both_folders_are_checked(folder: Path, tmp_path: Path) -> None:
    key = put(folder / "real.key")
    links = tmp_path / "links"
    links.mkdir(0o755)
    link = links / "a.key"
    link.symlink_to(key)
    assert files.read_key_file(link) == b"data"
    links.chmod(0o775)
    with pytest.raises(CertificateError, match="links: others can change this folder"):
        files.read_key_file(link)
    links.chmod(0o755)
    folder.chmod(0o750)
    with pytest.raises(CertificateError, match="the folder: others can list or change this folder"):
        files.read_key_file(link)


def test_file_of_a_mebibyte_is_read_and_a_larger_one_refused(folder: Path) -> None:
    path = put(folder / "a.crt", bytes(files.MAX_FILE_BYTES))
    assert len(files.read_certificate_file(path)) == files.MAX_FILE_BYTES
    put(path, bytes(files.MAX_FILE_BYTES + 1))
    for read in (files.read_certificate_file, files.read_key_file):
        with pytest.raises(CertificateError, match="is larger than 1048576 bytes"):
            read(path)


def test_irregular_file_is_refused_without_waiting(folder: Path) -> None:
    fifo = folder / "fifo"
    os.mkfifo(fifo, 0o600)
    for path in (fifo, Path("/dev/null"), folder):
        for read in (files.read_certificate_file, files.read_key_file):
            with pytest.raises(CertificateError, match="is not a regular file"):
                read(path)


@pytest.mark.parametrize("name", ["missing.key", "missing/a.key", "loop", "x" * 300])
def test_missing_file_is_named_with_advice(folder: Path, name: str) -> None:
    (folder / "loop").symlink_to(folder / "loop")
    with pytest.raises(CertificateError) as caught:
        files.read_key_file(folder / name)
    assert str(caught.value).startswith(f"{folder / name}: cannot be read: ")
    assert "check the path" in str(caught.value)


def test_path_with_a_nul_is_refused(folder: Path) -> None:
    path = folder / "a\0b"
    for use in (files.read_certificate_file, files.read_key_file, files.make_folder):
        with pytest.raises(CertificateError, match="is not a valid path"):
            use(path)


# --- folders


def test_missing_folders_are_created_for_the_owner_only(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "home" / "certs"
    old = os.umask(0)
    try:
        files.make_folder(directory)
    finally:
        os.umask(old)
    assert [mode_of(path) for path in (directory, directory.parent, directory.parent.parent)] == [0o700] * 3


def test_umask_without_owner_bits_does_no_harm(tmp_path: Path) -> None:
    directory = tmp_path / "home" / "certs"
    certificate, key = directory / "a.crt", directory / "a.key"
    old = os.umask(0o777)
    try:
        files.make_folder(directory)
        files.install(certificate, b"c", key, b"k")
    finally:
        os.umask(old)
    assert mode_of(directory.parent) == mode_of(directory) == 0o700
    assert mode_of(certificate) == mode_of(key) == 0o600


def test_existing_folder_is_checked_and_not_changed(folder: Path) -> None:
    files.make_folder(folder)
    folder.chmod(0o750)
    with pytest.raises(CertificateError, match="run: chmod 700 "):
        files.make_folder(folder)
    assert mode_of(folder) == 0o750


def test_folder_created_concurrently_by_another_process_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "certs"
    mkdir = Path.mkdir

    def lose_the_race(self: Path, mode: int = 0o777) -> None:
        mkdir(self, mode)
        mkdir(self, mode)

    monkeypatch.setattr(Path, "mkdir", lose_the_race)
    files.make_folder(directory)
    assert mode_of(directory) == 0o700


def test_file_in_place_of_the_folder_is_refused(folder: Path) -> None:
    path = put(folder / "certs")
    with pytest.raises(CertificateError, match="is not a folder; move it away"):
        files.make_folder(path)
    dangling = folder / "dangling"
    dangling.symlink_to(folder / "nowhere")
    with pytest.raises(CertificateError, match="cannot be used: No such file or directory"):
        files.make_folder(dangling)


def test_folder_that_cannot_be_created_is_named(folder: Path) -> None:
    with pytest.raises(CertificateError, match="xxx: cannot be created: File name too long"):
        files.make_folder(folder / ("x" * 300))


# --- the lock


def test_wait_for_a_busy_lock_is_reported_and_ends(folder: Path) -> None:
    clock = 100.0
    sentences: list[str] = []

    def sleep(seconds: float) -> None:
        nonlocal clock
        clock += seconds

    with (
        files.locked(folder, sentences.append),
        pytest.raises(CertificateError, match=r"\.lock: another process has held this lock for 30 s; wait"),
        files.locked(folder, sentences.append, now=lambda: clock, sleep=sleep),
    ):
        raise AssertionError("the lock was acquired twice")
    assert 130.0 <= clock < 131.0
    assert sentences == [f"Waiting for another process that is changing the certificates in {folder}."]
    assert mode_of(folder / ".lock") == 0o600


def test_system_error_while_locked_is_a_certificate_error(folder: Path) -> None:
    with (
        pytest.raises(CertificateError, match="the folder: cannot be used: No space left on device"),
        files.locked(folder, print),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


# --- writing pairs


def match(certificate: bytes, key: bytes) -> bool:
    """Stands for the real check: the pair `c1`, `k1` matches."""
    return certificate[:1] == b"c" and key[:1] == b"k" and certificate[1:] == key[1:]


def test_pair_is_installed_for_the_owner_only(folder: Path) -> None:
    certificate, key = folder / "a.crt", folder / "a.key"
    files.install(certificate, b"c1", key, b"k1")
    assert bytes_of(folder) == {"a.crt": b"c1", "a.key": b"k1"}
    assert mode_of(certificate) == mode_of(key) == 0o600
    files.install(certificate, b"c1 again", key, None)
    assert bytes_of(folder) == {"a.crt": b"c1 again", "a.key": b"k1"}


def test_staging_files_are_created_exclusively(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[Path, int, int]] = []
    real = os.open

    def spy(path: Path, flags: int, mode: int = 0o777) -> int:
        opened.append((Path(path), flags, mode))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", spy)
    files.install(folder / "a.crt", b"c", folder / "a.key", b"k")
    created = [(path, flags, mode) for path, flags, mode in opened if flags & os.O_CREAT]
    assert [path for path, _, _ in created] == [folder / ".a.key.new", folder / ".a.crt.new"]
    for _, flags, mode in created:
        assert flags & os.O_EXCL
        assert flags & os.O_NOFOLLOW
        assert mode == 0o600


class PowerCut(BaseException):
    """The machine stops: no handler and no clean-up runs after it."""


def count_steps(
    monkeypatch: pytest.MonkeyPatch, stop_at: int, error: Callable[[], BaseException]
) -> list[int]:
    """Makes every call that changes the disk fail from step `stop_at` on; the list counts the steps."""
    done = [0]

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            done[0] += 1
            if done[0] >= stop_at:
                raise error()
            return real(*arguments, **options)

        return call

    for name in ("fchmod", "fsync"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, failing(getattr(Path, name)))
    return done


@pytest.mark.parametrize("new_key", [b"k2", None])
def test_crash_at_any_step_leaves_the_old_or_the_new_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_key: bytes | None
) -> None:
    """Every step is tried, and for each also every step of the recovery after it."""
    certificate_text = b"c2" if new_key else b"c1"
    old, new = (b"c1", b"k1"), (certificate_text, new_key or b"k1")
    found: set[tuple[bytes, bytes]] = set()

    def crash(directory: Path, stop_at: int, step: Callable[[], None]) -> bool:
        with pytest.MonkeyPatch.context() as patch:
            count_steps(patch, stop_at, PowerCut)
            try:
                step()
            except PowerCut:
                return True
        return False

    stop_at = again_at = 1
    for attempt in range(10_000):
        folder = tmp_path / str(attempt)
        folder.mkdir(0o700)
        certificate, key = folder / "a.crt", folder / "a.key"
        files.install(certificate, b"c1", key, b"k1")

        def install(certificate: Path = certificate, key: Path = key) -> None:
            files.install(certificate, certificate_text, key, new_key)

        def recover(certificate: Path = certificate, key: Path = key) -> None:
            files.recover(certificate, key, match)

        crashed = crash(folder, stop_at, install)
        crashed_again = crash(folder, again_at, recover)
        recover()
        pair = (certificate.read_bytes(), key.read_bytes())
        assert pair in (old, new)
        assert set(bytes_of(folder)) == {"a.crt", "a.key"}
        found.add(pair)
        if not crashed:
            break
        if crashed_again:
            again_at += 1
        else:
            stop_at, again_at = stop_at + 1, 1
    assert not crashed
    assert found == {old, new}
    assert stop_at > 5


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        ({".a.key.new": b"k2"}, {}),
        ({".a.crt.new": b"c2"}, {}),
        ({".a.crt.new": b"", ".a.key.new": b""}, {}),
        ({".a.crt.new": b"c3", ".a.key.new": b"k2"}, {}),
        ({".a.crt.new": b"c1", ".a.key.new": b"k2"}, {"a.crt": b"c1", "a.key": b"k1"}),
        ({".a.crt.new": b"c2", ".a.key.new": b"k2"}, {"a.crt": b"c2", "a.key": b"k2"}),
    ],
)
def test_complete_staged_pair_is_installed_and_an_incomplete_one_deleted(
    folder: Path, left: dict[str, bytes], expected: dict[str, bytes]
) -> None:
    put(folder / "a.crt", b"c1")
    put(folder / "a.key", b"k1")
    for name, data in left.items():
        put(folder / name, data)
    files.recover(folder / "a.crt", folder / "a.key", match)
    assert bytes_of(folder) == {"a.crt": b"c1", "a.key": b"k1", **expected}


def test_first_pair_with_only_a_staged_key_is_discarded(folder: Path) -> None:
    put(folder / ".a.crt.new", b"c1")
    files.recover(folder / "a.crt", folder / "a.key", match)
    assert bytes_of(folder) == {}


def test_full_disk_changes_nothing_and_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = folder / "a.crt", folder / "a.key"
    files.install(certificate, b"c1", key, b"k1")
    for stop_at in (1, 2, 3, 4, 5):  # mode and content of either file, then the folder
        with monkeypatch.context() as patch:
            steps = [0]

            def full(real: Callable[[int], None], steps: list[int] = steps, stop_at: int = stop_at) -> Any:
                def call(*arguments: int) -> None:
                    steps[0] += 1
                    if steps[0] == stop_at:
                        raise OSError(errno.ENOSPC, "No space left on device")
                    real(*arguments)

                return call

            patch.setattr(os, "fchmod", full(os.fchmod))  # type: ignore[arg-type]
            patch.setattr(os, "fsync", full(os.fsync))
            with pytest.raises(CertificateError, match=r"a\.crt: cannot be written: No space left on device"):
                files.install(certificate, b"c2", key, b"k2")
        assert bytes_of(folder) == {"a.crt": b"c1", "a.key": b"k1"}


def test_first_disk_error_is_reported_if_the_cleanup_fails_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        first = OSError(errno.ENOSPC, "No space left on device")
        errors = chain([first], repeat(OSError(errno.EIO, "Input/output error")))
        count_steps(patch, 1, lambda: next(errors))
        with pytest.raises(CertificateError, match="No space left on device"):
            files.install(folder / "a.crt", b"c2", folder / "a.key", b"k2")
    files.recover(folder / "a.crt", folder / "a.key", match)
    assert bytes_of(folder) == {}


def test_unusable_file_is_set_aside_unchanged(folder: Path) -> None:
    path = put(folder / "a.key", b"junk")
    files.set_aside(path)
    assert bytes_of(folder) == {"a.key.aside": b"junk"}
    assert mode_of(folder / "a.key.aside") == 0o600
