from __future__ import annotations

import fcntl
import gc
import json
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.cli.helpers import fill, kept, new_session
from zcproto.auth import DeviceFile, UserFile
from zcproto.auth.users import User
from zcproto.cli import main, store
from zcproto.common.roles import OPERATORS
from zcproto.sessions import token_from_text
from zcproto.sessions.token import digest_of

RFC_8032_KEY = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"

Capture = pytest.CaptureFixture[str]


def test_add_prints_only_the_key_to_stdout(home: Path, capsys: Capture) -> None:
    assert main(["user", "add", "alice"]) == 0
    out, err = capsys.readouterr()
    assert len(out.split()) == 1
    assert err == "alice is a user now. Keep this key; it is shown once:\n"
    assert "alice" in (home / "users.toml").read_text()


def test_add_stores_no_key(home: Path, capsys: Capture) -> None:
    main(["user", "add", "alice"])
    key = capsys.readouterr().out.split()[-1]
    assert key not in (home / "users.toml").read_text()
    assert (home / "users.toml").stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700


def test_add_operator(home: Path, capsys: Capture) -> None:
    assert main(["user", "add", "alice", "--operator"]) == 0
    assert capsys.readouterr().err.startswith("alice is a user with the role operator now.")
    assert 'roles = ["operator"]' in (home / "users.toml").read_text()


def test_add_accepts_home_before_and_after_the_command(tmp_path: Path, home: Path) -> None:
    assert main(["user", "--home", str(tmp_path / "a"), "add", "alice"]) == 0
    assert main(["user", "add", "alice", "--home", str(tmp_path / "b")]) == 0
    assert (tmp_path / "a" / "users.toml").exists()
    assert (tmp_path / "b" / "users.toml").exists()
    assert not home.exists()


def test_existing_user_is_not_added_again(home: Path, capsys: Capture) -> None:
    main(["user", "add", "alice"])
    before = (home / "users.toml").read_bytes()
    capsys.readouterr()
    assert main(["user", "add", "alice"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "alice" in err
    assert err.count("\n") == 1
    assert (home / "users.toml").read_bytes() == before


@pytest.mark.parametrize("name", ["", " a", "a\nb", "a\tb", "a\x1b[31m", "x" * 1000])
def test_invalid_name_is_refused_in_one_line(name: str, home: Path, capsys: Capture) -> None:
    assert main(["user", "add", name]) != 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.removesuffix("\n").isprintable()


def test_home_writable_by_others_is_refused(home: Path, capsys: Capture) -> None:
    home.mkdir()
    home.chmod(0o777)
    assert main(["user", "add", "alice"]) == 2
    assert "chmod go-w" in capsys.readouterr().err
    assert list(home.iterdir()) == []


def test_many_users_are_added_with_a_key_file(home: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "keys"
    assert main(["user", "add", "load", "--count", "3", "--out", str(path)]) == 0
    assert capsys.readouterr() == ("", f"3 users added; the keys are in {path}\n")
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    assert [name for name, _ in lines] == ["load-1", "load-2", "load-3"]
    assert len({key for _, key in lines}) == 3
    assert path.stat().st_mode & 0o777 == 0o600
    users = (home / "users.toml").read_text()
    assert all(name in users and key not in users for name, key in lines)


def test_key_of_one_user_is_written_to_a_private_file(home: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "ada.key"
    assert main(["user", "add", "ada", "--out", str(path)]) == 0
    assert capsys.readouterr() == ("", f"ada added; the key is in {path}\n")
    key = path.read_text()
    assert (len(key), key[-1]) == (44, "\n")
    assert path.stat().st_mode & 0o777 == 0o600
    assert main(["user", "add", "eve", "--out", str(path)]) == 1
    assert path.read_text() == key
    assert "eve" not in (home / "users.toml").read_text()


def test_adding_ten_thousand_users_takes_linear_time(home: Path, tmp_path: Path) -> None:
    def seconds(name: str, count: int) -> float:
        keys = tmp_path / name
        gc.disable()  # it visits the objects of all tests before this one
        try:
            begin = time.process_time()
            assert main(["user", "add", name, "--count", str(count), "--out", str(keys)]) == 0
            took = time.process_time() - begin
        finally:
            gc.enable()
        assert len(keys.read_text().splitlines()) == count
        return took

    few = min(seconds(name, 500) for name in ("a", "b", "c"))
    assert seconds("load", 10_000) < 60 * few


def test_existing_key_file_is_kept_and_no_user_added(home: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "keys"
    path.write_text("old")
    words = ["user", "add", "load", "--count", "3", "--out", str(path)]
    assert main(words) == 1
    assert capsys.readouterr().err == f"zcproto: {path}: already exists; --force replaces it\n"
    assert path.read_text() == "old"
    assert not (home / "users.toml").exists()
    assert main([*words, "--force"]) == 0
    assert len(path.read_text().splitlines()) == 3


def test_one_existing_user_of_many_adds_none(home: Path, tmp_path: Path) -> None:
    main(["user", "add", "load-2"])
    before = (home / "users.toml").read_bytes()
    assert main(["user", "add", "load", "--count", "3", "--out", str(tmp_path / "keys")]) == 2
    assert (home / "users.toml").read_bytes() == before
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--count", "3"],
        ["--no-key", "--out", "/k"],
        ["--count", "0", "--out", "/k"],
        ["--count", "x"],
    ],
)
def test_wrong_options_add_no_user(words: list[str], home: Path, capsys: Capture) -> None:
    assert main(["user", "add", "load", *words]) == 2
    assert capsys.readouterr().err.startswith("Usage: zcproto user add")
    assert not home.exists()


def test_key_file_that_cannot_be_created_is_reported(home: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "absent" / "keys"
    assert main(["user", "add", "load", "--count", "3", "--out", str(path)]) == 1
    assert capsys.readouterr().err == f"zcproto: {path}: No such file or directory\n"
    assert not (home / "users.toml").exists()


# --- changing ------------------------------------------------------------------------------------------------


@pytest.fixture
def users(home: Path, capsys: Capture) -> UserFile:
    """ada with sessions, bob, and an operator without a key."""
    for options in (["ada"], ["bob"], ["root", "--operator", "--no-key"]):
        assert main(["user", "add", *options]) == 0
    fill(home, new_session("ada"), new_session("ada"), new_session("bob"))
    capsys.readouterr()
    return UserFile(home / "users.toml")


def find(users: UserFile, name: str) -> User | None:
    users.load()
    return users.entries.get(name)


def test_user_without_a_key(users: UserFile, capsys: Capture) -> None:
    user = find(users, "root")
    assert user is not None
    assert (user.roles, user.has_key) == (OPERATORS, False)
    assert main(["user", "add", "eve", "--no-key"]) == 0
    assert capsys.readouterr() == ("", "eve is a user now, without a key.\n")
    assert main(["user", "add", "many", "--no-key", "--count", "2", "--out", "x"]) == 2


def test_users_are_listed(users: UserFile, capsys: Capture) -> None:
    assert main(["user", "disable", "bob"]) == 0
    capsys.readouterr()
    assert main(["user", "list"]) == 0
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines()] == [
        ["USER", "ROLES", "KEY", "STATE"],
        ["ada", "-", "yes", "enabled"],
        ["bob", "-", "yes", "disabled"],
        ["root", "operator", "no", "enabled"],
    ]
    assert main(["user", "list", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)[1] == {"name": "bob", "roles": [], "key": True, "disabled": True}
    assert "sha256" not in out


def test_user_list_without_a_file_is_empty(home: Path, capsys: Capture) -> None:
    home.mkdir(0o700)
    assert main(["user", "list", "--json"]) == 0
    assert capsys.readouterr().out == "[]\n"
    assert list(home.iterdir()) == []


def test_disable_keeps_the_user_and_ends_the_sessions(users: UserFile, home: Path, capsys: Capture) -> None:
    assert main(["user", "disable", "ada"]) == 0
    assert capsys.readouterr().err == "ada is disabled now; 2 sessions ended.\n"
    user = find(users, "ada")
    assert user is not None
    assert user.disabled
    assert [record.user for record in kept(home)] == ["bob"]
    assert main(["user", "enable", "ada"]) == 0
    assert capsys.readouterr().err == "ada is enabled now.\n"
    assert users.find("ada") is None
    assert find(users, "ada") == user._replace(disabled=False)


def test_remove_deletes_the_user_and_ends_the_sessions(users: UserFile, home: Path, capsys: Capture) -> None:
    assert main(["user", "remove", "ada"]) == 0
    assert capsys.readouterr().err == "ada is removed; 2 sessions ended.\n"
    assert find(users, "ada") is None
    assert [record.user for record in kept(home)] == ["bob"]


def test_new_key_prints_only_the_key_and_ends_the_sessions(
    users: UserFile, home: Path, capsys: Capture
) -> None:
    before = find(users, "ada")
    assert main(["user", "new-key", "ada"]) == 0
    out, err = capsys.readouterr()
    key = out.strip()
    assert out == f"{key}\n"
    assert err == ("ada has a new key. Keep it; it is shown once:\nada has a new key; 2 sessions ended.\n")
    after = find(users, "ada")
    assert after is not None
    assert before is not None
    assert after.digest == digest_of(token_from_text(key) or b"") != before.digest
    assert [record.user for record in kept(home)] == ["bob"]


def test_new_key_is_written_to_a_private_file(users: UserFile, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "ada.key"
    path.write_text("old")
    words = ["user", "new-key", "ada", "--out", str(path)]
    assert main(words) == 1
    assert "already exists" in capsys.readouterr().err
    assert main([*words, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "ada", "sessions": 2, "keys": str(path)}
    path.unlink()
    assert main(words) == 0
    assert capsys.readouterr() == (
        "",
        f"ada has a new key. It is in {path}.\nada has a new key; 0 sessions ended.\n",
    )
    assert path.stat().st_mode & 0o777 == 0o600
    ada = find(users, "ada")
    assert ada is not None
    assert ada.digest == digest_of(token_from_text(path.read_text().strip()) or b"")


@pytest.mark.parametrize("command", ["disable", "enable", "remove", "new-key"])
def test_unknown_user_is_reported(users: UserFile, home: Path, capsys: Capture, command: str) -> None:
    text = users.path.read_text()
    assert main(["user", command, "eve"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert 'no user is named "eve"' in err
    assert users.path.read_text() == text
    assert len(kept(home)) == 3


@pytest.mark.parametrize("is_memory", [False, True])
def test_running_server_ends_the_sessions_of_a_changed_user(
    users: UserFile, home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, is_memory: bool
) -> None:
    if is_memory:
        monkeypatch.setenv("ZCPROTO_STORE__URL", "memory")
    with open(home / "sessions.db.lock", "r+") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert main(["user", "disable", "ada"]) == 0
    assert capsys.readouterr().err == (
        "ada is disabled now; the running server ends the sessions within a second.\n"
    )
    assert len(kept(home)) == 3


def test_server_started_meanwhile_ends_the_sessions(
    users: UserFile, home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([False, True])
    monkeypatch.setattr(store, "is_in_use", lambda path: next(answers))
    assert main(["user", "remove", "ada"]) == 0
    assert "the running server ends the sessions" in capsys.readouterr().err


def test_user_change_without_sessions_creates_no_store(home: Path, capsys: Capture) -> None:
    main(["user", "add", "ada"])
    assert main(["user", "remove", "ada"]) == 0
    assert capsys.readouterr().err.endswith("ada is removed; 0 sessions ended.\n")
    assert not (home / "sessions.db").exists()


def test_user_is_changed_even_if_the_store_is_unavailable(
    users: UserFile, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PATIENCE_S", 0.1)
    monkeypatch.setenv("ZCPROTO_STORE__URL", "redis://127.0.0.1:1")
    assert main(["user", "disable", "ada"]) == 2
    assert "the change is made, but the sessions could not be ended" in capsys.readouterr().err
    assert find(users, "ada") is not None
    assert users.find("ada") is None


def test_new_key_is_printed_even_if_the_store_is_unavailable(
    users: UserFile, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PATIENCE_S", 0.1)
    monkeypatch.setenv("ZCPROTO_STORE__URL", "redis://127.0.0.1:1")
    assert main(["user", "new-key", "ada"]) == 2
    out, err = capsys.readouterr()
    user = find(users, "ada")
    assert user is not None
    assert user.digest == digest_of(token_from_text(out.strip()) or b"")
    assert "the sessions could not be ended" in err


def test_invalid_configuration_changes_no_user(users: UserFile, home: Path, capsys: Capture) -> None:
    (home / "config.toml").write_text("nonsense")
    text = users.path.read_text()
    for command in ("disable", "remove", "new-key"):
        assert main(["user", command, "ada"]) == 2
        assert capsys.readouterr().out == ""
    assert users.path.read_text() == text


# --- roles -----------------------------------------------------------------------------------------------


def test_roles_are_given_and_replaced(home: Path, capsys: Capture) -> None:
    assert main(["user", "add", "ada", "--role", "b", "--role", "a", "--operator", "--no-key"]) == 0
    assert capsys.readouterr().err == "ada is a user with the roles a, b, operator now, without a key.\n"
    assert main(["user", "roles", "ada", "billing", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "ada", "roles": ["billing"], "sessions": 0}
    assert main(["user", "roles", "ada"]) == 0
    assert capsys.readouterr().err == "ada has no role now; 0 sessions ended.\n"
    assert main(["user", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["roles"] == []
    assert main(["user", "roles", "bob", "a"]) == 1
    assert "no user is named" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["user", "add", "ada", "--role", "a b"], ["user", "roles", "ada", "-a"]]
)
def test_malformed_role_is_a_usage_error(home: Path, capsys: Capture, arguments: list[str]) -> None:
    assert main([*arguments[:3], "--", *arguments[3:]] if arguments[1] == "roles" else arguments) == 2
    assert "a name has 1 to 64 characters" in capsys.readouterr().err


def test_device_is_narrowed(home: Path, capsys: Capture) -> None:
    DeviceFile(home / "devices.toml").add(
        "phone", "ada", bytes.fromhex(RFC_8032_KEY), datetime(2026, 1, 1, tzinfo=UTC)
    )
    assert main(["device", "roles", "phone", "reader"]) == 0
    note = "phone has the role reader, as far as its user has it, now; 0 sessions ended.\n"
    assert capsys.readouterr().err == note
    assert main(["device", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["phone", "ada", "reader"]
    assert main(["device", "roles", "phone", "--all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "name": "phone",
        "roles": None,
        "user": "ada",
        "sessions": 0,
    }
    assert main(["device", "list"]) == 0
    assert "of the user" in capsys.readouterr().out
    assert main(["device", "roles", "phone", "reader", "--all"]) == 2
    assert "--all and ROLE do not go together" in capsys.readouterr().err
