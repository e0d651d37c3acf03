"""Changes to the file of users: disabled, removed and reported users, and new keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.auth.helpers import DIGEST, VALID_NAMES, digest_of, write
from zcproto.auth import UserFile
from zcproto.common.roles import NO_ROLES, OPERATORS
from zcproto.errors import ConfigError, NotFound
from zcproto.sessions import token_from_text

WRITTEN = f"""# Our users.

[users.alice]  # since the beginning
# Her old key was lost.
key_sha256 = "{DIGEST}"  # of May
operator = true

# Robert, of the other office.
[users.'bob the builder']
  "key_sha256"="{DIGEST}"

[ users . "carol" ]
disabled = true # on leave
key_sha256 = '{DIGEST}'
# The end."""


@pytest.fixture
def written(path: Path, users: UserFile) -> UserFile:
    write(path, WRITTEN)
    users.load()
    return users


def difference(path: Path) -> tuple[list[str], list[str]]:
    """Return the removed lines and the added lines."""
    before, after = WRITTEN.splitlines(), path.read_text().splitlines()
    return [line for line in before if line not in after], [line for line in after if line not in before]


def again(path: Path) -> UserFile:
    users = UserFile(path)
    users.load()
    return users


def test_disabled_user_is_stored_but_not_found(path: Path, written: UserFile) -> None:
    written.disable("alice")
    for users in (written, again(path)):
        assert users.find("alice") is None
        assert users.entries.get("alice") == (token_from_text(DIGEST), OPERATORS, True)
        assert "alice" in list(users.entries)
    assert difference(path) == ([], ["disabled = true"])
    assert path.read_text().count("disabled = true") == 2
    written.enable("alice")
    written.enable("carol")
    assert again(path).find("carol") == (token_from_text(DIGEST), NO_ROLES, False)
    assert difference(path) == (["disabled = true # on leave"], [])


def test_disabling_and_enabling_are_idempotent(path: Path, written: UserFile) -> None:
    written.disable("carol")
    written.enable("alice")
    assert path.read_text() == WRITTEN
    assert not written.changed()


def test_removing_a_user_keeps_the_rest_of_the_file(path: Path, written: UserFile) -> None:
    written.remove("alice")
    gone, new = difference(path)
    assert (len(gone), new) == (4, [])
    assert "# Robert, of the other office." in path.read_text()
    written.remove("carol")
    assert "# The end." in path.read_text()
    assert list(again(path).entries) == list(written.entries) == ["bob the builder"]
    written.remove("bob the builder")
    assert list(again(path).entries) == []
    assert written.add("alice")


def entry(name: str) -> str:
    return f'[users.{name}]\nkey_sha256 = "{DIGEST}"\n'


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (entry("a"), ""),
        (entry("a").rstrip(), ""),
        (entry("a") + "\n", "\n"),
        ("\n" + entry("a"), ""),
        ("# Ours\n\n\n" + entry("a"), "# Ours\n\n"),
        (entry("a") + "\n" + entry("b"), "\n" + entry("b")),
        (entry("b") + entry("a") + "# The end.", entry("b") + "# The end."),
        (entry("b") + "\n" + entry("a") + entry("c"), entry("b") + entry("c")),
    ],
)
def test_removing_a_user_removes_one_empty_line_above(
    path: Path, users: UserFile, before: str, after: str
) -> None:
    write(path, before)
    users.load()
    users.remove("a")
    assert path.read_text() == after


def test_change_keeps_the_empty_line_above_and_completes_the_last_line(path: Path, users: UserFile) -> None:
    write(path, f"{entry('b')}\n{entry('a').rstrip()}")
    users.load()
    users.disable("a")
    assert path.read_text().startswith(f"{entry('b')}\n[users.a]\n")
    assert path.read_text().endswith("\n")


@pytest.mark.parametrize("name", ["alice", "bob the builder", "carol"])
def test_new_key_replaces_the_old_one(path: Path, written: UserFile, name: str) -> None:
    old = written.entries.get(name)
    key = written.new_key(name)
    user = again(path).entries.get(name)
    assert user is not None
    assert old is not None
    assert user == old._replace(digest=digest_of(key))
    gone, new = difference(path)
    assert (len(gone), len(new)) == (1, 1)
    assert ("# of May" in new[0]) == (name == "alice")
    assert key not in path.read_text()


def test_user_without_a_key_can_get_one(path: Path, users: UserFile) -> None:
    users.add_digest("dora", None, roles=OPERATORS)
    user = again(path).find("dora")
    assert user is not None
    assert user.roles == OPERATORS
    assert user.as_dict("dora") == {"name": "dora", "roles": ["operator"], "key": False, "disabled": False}
    assert path.read_text() == '\n[users.dora]\nroles = ["operator"]\n'
    key = users.new_key("dora")
    user = again(path).find("dora")
    assert user is not None
    assert user.has_key
    assert user.digest == digest_of(key)


@pytest.mark.parametrize("name", VALID_NAMES)
def test_user_with_any_valid_name_can_be_changed(path: Path, users: UserFile, name: str) -> None:
    users.add("before")
    users.add(name)
    users.add("after")
    before = path.read_text()
    users.disable(name)
    assert again(path).find(name) is None
    users.enable(name)
    assert path.read_text() == before
    users.new_key(name)
    users.remove(name)
    assert list(again(path).entries) == ["before", "after"]


@pytest.mark.parametrize("change", ["disable", "enable", "remove", "new_key"])
def test_changing_an_unknown_user_is_refused(path: Path, written: UserFile, change: str) -> None:
    with pytest.raises(NotFound, match="no user is named"):
        getattr(written, change)("eve\n")
    assert path.read_text() == WRITTEN


@pytest.mark.parametrize(
    "text",
    [
        f'[users]\nalice = {{ key_sha256 = "{DIGEST}" }}\n',
        f'[users]\nalice.key_sha256 = "{DIGEST}"\n',
        f'users.alice.key_sha256 = "{DIGEST}"\n',
        f'[users.alice]\nkey_sha256 = """\\\n{DIGEST}"""\n',
    ],
)
def test_unusual_layout_is_left_to_an_editor(path: Path, users: UserFile, text: str) -> None:
    write(path, text)
    with pytest.raises(ConfigError, match="cannot be changed by a command; edit the file"):
        users.new_key("alice")
    assert path.read_text() == text


def test_comments_and_empty_tables_are_not_users(path: Path, users: UserFile) -> None:
    write(path, f"[users.alice]\nkey_sha256 = '{DIGEST}'\n# [users.bob]\n")
    users.load()
    users.remove("alice")
    assert path.read_text() == "# [users.bob]\n"
    write(path, f"[users]\n[users.'a b']\nkey_sha256 = '{DIGEST}'")
    users.disable("a b")
    assert again(path).entries.get("a b") == (token_from_text(DIGEST), NO_ROLES, True)


def test_gone_users_are_reported_once(path: Path, users: UserFile) -> None:
    for name in ("same", "removed", "disabled", "other-key", "operator", "off"):
        users.add(name)
    users.disable("off")
    reader = again(path)
    assert reader.take_gone() == []
    users.remove("removed")
    users.disable("disabled")
    users.new_key("other-key")
    users.remove("off")
    users.add("new")
    write(path, path.read_text().replace("[users.operator]\n", "[users.operator]\noperator = true\n"))
    reader.reload()
    assert [name for name, _ in reader.take_gone()] == ["removed", "disabled", "other-key", "operator"]
    assert reader.take_gone() == []
    users.enable("disabled")
    reader.reload()
    assert reader.take_gone() == []


def test_user_with_other_roles_is_gone_and_with_the_same_ones_is_not(path: Path, users: UserFile) -> None:
    users.add("alice", roles=frozenset({"admin", "operator"}))
    reader = again(path)
    write(path, path.read_text().replace('["admin","operator"]', '[ "operator", "admin" ]'))
    reader.reload()
    assert reader.take_gone() == []
    users.set_roles("alice", frozenset({"admin"}))
    reader.reload()
    assert [name for name, _ in reader.take_gone()] == ["alice"]


def test_roles_are_replaced_in_place_and_replace_the_old_mark_of_an_operator(
    path: Path, written: UserFile
) -> None:
    written.set_roles("alice", frozenset({"b", "a"}))
    assert difference(path) == (["operator = true"], ['roles = ["a","b"]'])
    assert again(path).entries["alice"].roles == {"a", "b"}
    before = path.read_text().replace('roles = ["a","b"]', "roles = [ 'a', 'b' ]  # of May")
    write(path, before)
    written.set_roles("alice", OPERATORS)
    assert path.read_text() == before.replace("[ 'a', 'b' ]", '["operator"]')
    written.set_roles("alice", NO_ROLES)
    assert again(path).entries["alice"].roles == NO_ROLES
    assert "roles" not in path.read_text()


def test_roles_on_several_lines_are_left_to_an_editor(path: Path, users: UserFile) -> None:
    write(path, '[users.alice]\nroles = [\n  "a",\n]\n')
    with pytest.raises(ConfigError, match="cannot be changed by a command; edit the file"):
        users.set_roles("alice", OPERATORS)
    assert again(path).entries["alice"].roles == {"a"}


def test_no_user_is_gone_while_the_file_is_faulty(path: Path, users: UserFile) -> None:
    users.add("alice")
    reader = again(path)
    write(path, "nonsense")
    with pytest.raises(ConfigError):
        reader.reload()
    assert reader.take_gone() == []
    write(path, "")
    reader.reload()
    assert [name for name, _ in reader.take_gone()] == ["alice"]


def test_digest_of_an_external_key_is_stored(tmp_path: Path) -> None:
    users = UserFile(tmp_path / "users.toml")
    users.add_digest("ada", bytes(range(32)), roles=OPERATORS)
    user = users.entries.get("ada")
    assert user is not None
    assert (user.digest, user.roles) == (bytes(range(32)), OPERATORS)
    users.replace_digest("ada", bytes(32)[:31] + b"x")
    again = UserFile(tmp_path / "users.toml")
    again.load()
    user = again.entries.get("ada")
    assert user is not None
    assert user.digest == bytes(31) + b"x"
