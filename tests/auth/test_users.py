"""The file of users: it is read whole or not at all, and users are added in one step."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import threading
from pathlib import Path

import pytest
import tomli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.auth.helpers import DIGEST, VALID_NAMES, digest_of, write
from tests.helpers import raising
from zcproto.auth import UserFile
from zcproto.common.roles import NO_ROLES, OPERATORS
from zcproto.errors import ConfigError
from zcproto.sessions import token_from_text, token_text

BAD_NAMES = [
    "",
    "x" * 129,
    " alice",
    "alice ",
    "a\nb",
    "a\tb",
    "a\0b",
    "a\x7fb",
    "\u2028",
    "\ud800",
    "Zoe\u0308",
    "\u202ealice",
    "\xa0alice",
]


def faults(users: UserFile) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        users.load()
    prefix = f"{users.path}: "
    assert all(fault.startswith(prefix) for fault in caught.value.faults)
    return [fault.removeprefix(prefix) for fault in caught.value.faults]


# --- adding -------------------------------------------------------------------------------------------------


def test_added_user_is_found_by_writer_and_reader(path: Path, users: UserFile) -> None:
    key = users.add("alice")
    other = UserFile(path)
    other.load()
    for each in (users, other):
        user = each.find("alice")
        assert user is not None
        assert (user.digest, user.roles) == (digest_of(key), NO_ROLES)
        assert list(each.entries) == ["alice"]
        assert len(each.entries) == 1
        assert not each.changed()


def test_key_is_43_characters_of_32_random_bytes(path: Path) -> None:
    key = UserFile(path, entropy=lambda size: b"k" * size).add("alice")
    assert key == token_text(b"k" * 32)


def test_file_contains_no_key(path: Path, users: UserFile) -> None:
    keys = [users.add(f"user{number}") for number in range(5)]
    data = path.read_bytes()
    for key in keys:
        assert key.encode() not in data
        raw = token_from_text(key)
        assert raw is not None
        assert raw not in data
        assert raw.hex().encode() not in data
        assert token_text(digest_of(key)).encode() in data


@pytest.mark.parametrize("names", ["", "operator", "admin billing operator"])
def test_roles_are_stored(path: Path, users: UserFile, names: str) -> None:
    users.add("alice", roles=frozenset(names.split()))
    users.load()
    user = users.find("alice")
    assert user is not None
    assert user.roles == frozenset(names.split())
    assert ("roles" in path.read_text()) is bool(names)


@pytest.mark.parametrize("name", VALID_NAMES)
def test_every_valid_name_is_stored_exactly(path: Path, users: UserFile, name: str) -> None:
    users.add(name)
    users.add("next")
    assert list(tomli.loads(path.read_text())["users"]) == [name, "next"]
    users.load()
    assert list(users.entries) == [name, "next"]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(min_size=1, max_size=20))
def test_any_name_is_stored_exactly_or_refused(tmp_path: Path, name: str) -> None:
    users = UserFile(tmp_path / "any" / "users.toml")
    users.path.unlink(missing_ok=True)
    try:
        users.add(name)
    except ConfigError:
        assert not users.path.exists()
    else:
        users.load()
        assert list(users.entries) == [name]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_invalid_name_is_refused_before_anything_is_written(path: Path, users: UserFile, name: str) -> None:
    with pytest.raises(ConfigError, match="a name has") as caught:
        users.add_many(["alice", name])
    assert not path.exists()
    assert str(caught.value).isprintable()


def test_many_users_are_added_in_order(users: UserFile) -> None:
    added = users.add_many([f"user-{number}" for number in range(300)], roles=OPERATORS)
    assert [name for name, _ in added] == list(users.entries) == [f"user-{number}" for number in range(300)]
    assert len({key for _, key in added}) == 300
    for name, key in added:
        user = users.find(name)
        assert user is not None
        assert (user.digest, user.roles) == (digest_of(key), OPERATORS)


def test_adding_no_users_is_allowed(users: UserFile) -> None:
    assert users.add_many([]) == []


def test_duplicate_name_in_one_call_is_refused(path: Path, users: UserFile) -> None:
    with pytest.raises(ConfigError, match="twice"):
        users.add_many(["alice", "bob", "alice"])
    assert not path.exists()


def test_all_users_or_none_are_added(path: Path, users: UserFile) -> None:
    users.add("bob")
    before = path.read_bytes()
    with pytest.raises(ConfigError) as caught:
        users.add_many(["alice", "bob", "carol"])
    assert caught.value.faults == [f'{path}: user "bob" exists already; choose another name']
    assert path.read_bytes() == before
    assert list(users.entries) == ["bob"]


def test_two_writers_lose_no_user(path: Path) -> None:
    first, second = UserFile(path), UserFile(path)
    first.add("alice")
    second.add("bob")
    first.add("carol")
    second.load()
    assert list(second.entries) == ["alice", "bob", "carol"]


def test_many_concurrent_writers_lose_no_user(path: Path) -> None:
    threads = [
        threading.Thread(target=lambda n=n: [UserFile(path).add(f"user-{n}-{i}") for i in range(5)])  # type: ignore[misc]
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    users = UserFile(path)
    users.load()
    assert len(users.entries) == 20


def test_comments_and_layout_survive_an_edit(path: Path, users: UserFile) -> None:
    mine = f'# mine\n[users.zoe] # the first\nkey_sha256 = "{DIGEST}"\n# the end, without a newline'
    write(path, mine)
    users.add("alice")
    assert path.read_text().startswith(mine + "\n")
    users.load()
    assert list(users.entries) == ["zoe", "alice"]


def test_file_that_cannot_be_appended_to_is_unchanged(path: Path, users: UserFile) -> None:
    text = f'users = {{ zoe = {{ key_sha256 = "{DIGEST}" }} }}\n'
    write(path, text)
    with pytest.raises(ConfigError):
        users.add("alice")
    assert path.read_text() == text
    assert list(users.entries) == ["zoe"]


def test_faulty_file_is_unchanged_by_add(path: Path, users: UserFile) -> None:
    write(path, "nonsense")
    with pytest.raises(ConfigError):
        users.add("alice")
    assert path.read_text() == "nonsense"


def test_missing_folders_are_created(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "users.toml"
    UserFile(path).add("alice")
    assert path.is_file()


def test_file_and_folder_are_private(path: Path, users: UserFile) -> None:
    old = os.umask(0)
    try:
        users.add("alice")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(each.stat().st_mode) == 0o600 for each in path.parent.iterdir())


def test_only_the_lock_file_remains(path: Path, users: UserFile) -> None:
    users.add("alice")
    assert sorted(each.name for each in path.parent.iterdir()) == [".users.toml.lock", "users.toml"]


def test_failed_write_keeps_the_old_file(
    path: Path, users: UserFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    users.add("alice")
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", raising(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
            users.add("bob")
    assert path.read_bytes() == before
    assert list(users.entries) == ["alice"]
    assert not path.with_name(".users.toml.new").exists()


def test_failure_to_create_the_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        UserFile(tmp_path / "file" / "users.toml").add("alice")


def test_too_large_file_is_not_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UserFile, "max_bytes", 100)
    users = UserFile(path)
    users.add("a")
    with pytest.raises(ConfigError, match="would be larger than 100 bytes"):
        users.add("b")
    users.load()
    assert list(users.entries) == ["a"]


# --- the lock -----------------------------------------------------------------------------------------------


def test_lock_held_too_long_is_reported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    UserFile(path).add("alice")
    with open(path.with_name(".users.toml.lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr("zcproto.auth.files.LOCK_WAIT_S", 0)
        with pytest.raises(ConfigError, match="another process has held this lock for 0 s"):
            UserFile(path).add("bob")


# --- reading ------------------------------------------------------------------------------------------------


def test_missing_file_has_no_users(users: UserFile) -> None:
    assert users.changed()
    users.load()
    assert list(users.entries) == []
    assert users.find("alice") is None
    assert not users.changed()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o644, 0o666, 0o777])
def test_file_accessible_to_others_is_refused(path: Path, users: UserFile, mode: int) -> None:
    write(path, "", mode)
    (fault,) = faults(users)
    assert f"mode {mode:04o}" in fault
    assert f"chmod 600 {path}" in fault


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o700])
def test_private_file_is_read(path: Path, users: UserFile, mode: int) -> None:
    write(path, f'[users.zoe]\nkey_sha256 = "{DIGEST}"\n', mode)
    users.load()
    assert list(users.entries) == ["zoe"]


def test_too_large_file_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UserFile, "max_bytes", 10)
    users = UserFile(path)
    write(path, "#" * 10)
    users.load()
    write(path, "#" * 11)
    (fault,) = faults(users)
    assert "is larger than 10 bytes" in fault


def test_path_through_a_file_is_reported_and_changed_does_not_raise(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    users = UserFile(tmp_path / "file" / "users.toml")
    assert users.changed()
    assert faults(users) == ["cannot be read: Not a directory"]


def test_link_to_a_missing_file_is_a_fault(tmp_path: Path) -> None:
    target, link = tmp_path / "target.toml", tmp_path / "users.toml"
    link.symlink_to(target)
    fault = f"{link}: is a link to a file that is missing; restore that file, or remove the link"
    with pytest.raises(ConfigError) as caught:
        UserFile(link).load()
    assert caught.value.faults == [fault]
    UserFile(target).add("ada")
    file = UserFile(link)
    file.load()
    target.unlink()
    with pytest.raises(ConfigError) as caught:
        file.reload()
    assert caught.value.faults == [fault]
    assert list(file.entries) == ["ada"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nonsense", "at end of document"),
        ("nonsense\n", "at line 1"),
        ("[users.a]\nkey_sha256 = \n", "at line 2"),
        (b"\xff\xfe", "is not UTF-8 at byte 0"),
        (b"# fine\n\xc3(", "is not UTF-8 at byte 7"),
        ("x = " + "[" * 100_000, ""),
        ("users = 5", "users must be tables"),
        ("users = []", "users must be tables"),
        ("other = 1", 'unknown key "other"'),
        ("[user.alice]", 'unknown key "user"'),
        ("[users]\nalice = 5", 'user "alice": must be a table'),
        ("[users.alice]\nkey_sha256 = ''", 'user "alice": key_sha256 must be'),
        ("[users.alice]\ndisabled = 1", 'user "alice": disabled must be true or false'),
        ("[users.alice]\nkey_sha256 = 5", 'user "alice": key_sha256 must be'),
        (f'[users.alice]\nkey_sha256 = "{DIGEST[:-1]}"', 'user "alice": key_sha256 must be'),
        (f'[users.alice]\nkey_sha256 = "{DIGEST}="', 'user "alice": key_sha256 must be'),
        (f'[users.alice]\nkey_sha256 = "{DIGEST[:-1]}9"', 'user "alice": key_sha256 must be'),
        (
            f'[users.alice]\nkey_sha256 = "{DIGEST}"\noperator = 1',
            'user "alice": operator must be true or false',
        ),
        (f'[users.alice]\nkey_sha256 = "{DIGEST}"\noperator = "true"', "operator must be true or false"),
        ("[users.alice]\nroles = 'admin'", 'user "alice": roles must be a list of names'),
        ("[users.alice]\nroles = ['']", "roles must be a list of names, each of 1 to 64 characters of A-Z"),
        ("[users.alice]\nroles = [1]", "roles must be a list of names"),
        (
            f"[users.alice]\nroles = {[f'r{number}' for number in range(33)]}",
            "roles must be at most 32 names",
        ),
        (f'[users.alice]\nkey_sha256 = "{DIGEST}"\nadmin = true', 'user "alice": unknown key "admin"'),
        (f'[users.""]\nkey_sha256 = "{DIGEST}"', "a name has 1 to 128 characters"),
        (f'[users." a"]\nkey_sha256 = "{DIGEST}"', "a name has printable characters"),
        (f'[users.a]\nkey_sha256 = "{DIGEST}"\n[users.a]\nkey_sha256 = "{DIGEST}"', "at line 3"),
    ],
)
def test_fault_names_its_place(path: Path, users: UserFile, text: str | bytes, expected: str) -> None:
    write(path, text)
    (fault,) = faults(users)
    assert expected in fault
    assert fault.isprintable()
    assert DIGEST[:20] not in fault


def test_all_faults_are_reported_at_once(path: Path, users: UserFile) -> None:
    write(
        path,
        f'x = 1\n[users.a]\nkey_sha256 = 1\n[users.b]\nkey_sha256 = "{DIGEST}"\noperator = 2\nrole = 3\n',
    )
    assert [re.split("[:;]", fault)[0] for fault in faults(users)] == [
        'unknown key "x"',
        'user "a"',
        'user "b"',
        'user "b"',
    ]


def test_hostile_name_cannot_forge_a_line(path: Path, users: UserFile) -> None:
    write(path, '[users."a\\nroot: all is well\\u001b[2J"]\n')
    assert all("\n" not in fault and "\x1b" not in fault for fault in faults(users))


# --- reading again ------------------------------------------------------------------------------------------


def test_changed_file_is_detected(path: Path, users: UserFile) -> None:
    users.load()
    UserFile(path).add("alice")
    assert users.changed()
    users.reload()
    assert not users.changed()
    assert list(users.entries) == ["alice"]
    UserFile(path).add("bob")
    assert users.changed()
    users.reload()
    assert list(users.entries) == ["alice", "bob"]


def test_change_of_mode_is_found(path: Path, users: UserFile) -> None:
    users.add("alice")
    path.chmod(0o644)
    assert users.changed()
    with pytest.raises(ConfigError, match="chmod 600"):
        users.reload()
    assert not users.changed()
    path.chmod(0o600)
    assert users.changed()
    users.reload()


@pytest.mark.parametrize("what", ["nonsense", "mode", "gone", "fifo"])
def test_faulty_file_keeps_the_known_users(path: Path, users: UserFile, what: str) -> None:
    users.add("alice")
    good = path.read_bytes()
    if what == "nonsense":
        write(path, "nonsense")
    elif what == "mode":
        path.chmod(0o640)
    else:
        path.unlink()
        if what == "fifo":
            os.mkfifo(path, 0o600)
    assert users.changed()
    with pytest.raises(ConfigError):
        users.reload()
    assert users.find("alice") is not None
    assert not users.changed()
    path.unlink(missing_ok=True)
    write(path, good)
    UserFile(path).add("bob")
    assert users.changed()
    users.reload()
    assert list(users.entries) == ["alice", "bob"]


def test_file_that_never_existed_may_stay_missing(users: UserFile) -> None:
    users.load()
    users.reload()
    assert list(users.entries) == []


def test_repr_contains_no_key_or_digest(users: UserFile) -> None:
    key = users.add("alice")
    text = repr(users) + repr(users.find("alice"))
    assert key not in text
    assert repr(digest_of(key)) not in text
