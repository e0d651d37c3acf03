from __future__ import annotations

import time
from pathlib import Path

import pytest

from zcproto.cli import main

Capture = pytest.CaptureFixture[str]


def test_add_prints_the_key_alone_and_a_sentence_aside(home: Path, capsys: Capture) -> None:
    assert main(["user", "add", "alice"]) == 0
    out, err = capsys.readouterr()
    assert len(out.split()) == 1
    assert err == "alice is a user now. Keep this key; it is shown this once:\n"
    assert "alice" in (home / "users.toml").read_text()


def test_add_keeps_no_key(home: Path, capsys: Capture) -> None:
    main(["user", "add", "alice"])
    key = capsys.readouterr().out.split()[-1]
    assert key not in (home / "users.toml").read_text()
    assert (home / "users.toml").stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700


def test_add_makes_an_operator_when_asked(home: Path, capsys: Capture) -> None:
    assert main(["user", "add", "alice", "--operator"]) == 0
    assert capsys.readouterr().err.startswith("alice is an operator now.")
    assert "operator = true" in (home / "users.toml").read_text()


def test_add_takes_its_home_anywhere(tmp_path: Path, home: Path) -> None:
    assert main(["user", "--home", str(tmp_path / "a"), "add", "alice"]) == 0
    assert main(["user", "add", "alice", "--home", str(tmp_path / "b")]) == 0
    assert (tmp_path / "a" / "users.toml").exists()
    assert (tmp_path / "b" / "users.toml").exists()
    assert not home.exists()


def test_a_user_is_added_once(home: Path, capsys: Capture) -> None:
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
def test_a_name_that_cannot_be_is_refused_in_one_line(name: str, home: Path, capsys: Capture) -> None:
    assert main(["user", "add", name]) != 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.removesuffix("\n").isprintable()


def test_a_home_that_others_may_write_to_gets_no_user(home: Path, capsys: Capture) -> None:
    home.mkdir()
    home.chmod(0o777)
    assert main(["user", "add", "alice"]) == 2
    assert "chmod go-w" in capsys.readouterr().err
    assert list(home.iterdir()) == []


def test_many_users_are_added_with_their_keys_in_a_file(home: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "keys"
    assert main(["user", "add", "load", "--count", "3", "--keys-out", str(path)]) == 0
    assert capsys.readouterr() == ("", f"3 users are added; their keys are in {path}\n")
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    assert [name for name, _ in lines] == ["load-1", "load-2", "load-3"]
    assert len({key for _, key in lines}) == 3
    assert path.stat().st_mode & 0o777 == 0o600
    users = (home / "users.toml").read_text()
    assert all(name in users and key not in users for name, key in lines)


def test_ten_thousand_users_take_under_two_seconds(home: Path, tmp_path: Path) -> None:
    begin = time.process_time()
    assert main(["user", "add", "load", "--count", "10000", "--keys-out", str(tmp_path / "keys")]) == 0
    assert time.process_time() - begin < 2
    assert len((tmp_path / "keys").read_text().splitlines()) == 10_000


def test_no_file_is_overwritten_and_then_no_user_is_added(
    home: Path, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "keys"
    path.write_text("old")
    words = ["user", "add", "load", "--count", "3", "--keys-out", str(path)]
    assert main(words) == 1
    assert capsys.readouterr().err == f"zcproto: {path}: is there already; --force replaces it\n"
    assert path.read_text() == "old"
    assert not (home / "users.toml").exists()
    assert main([*words, "--force"]) == 0
    assert len(path.read_text().splitlines()) == 3


def test_when_one_of_many_is_there_already_none_is_added(home: Path, tmp_path: Path) -> None:
    main(["user", "add", "load-2"])
    before = (home / "users.toml").read_bytes()
    assert main(["user", "add", "load", "--count", "3", "--keys-out", str(tmp_path / "keys")]) == 2
    assert (home / "users.toml").read_bytes() == before
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize(
    "words",
    [["--count", "3"], ["--keys-out", "/tmp/keys"], ["--count", "0", "--keys-out", "/k"], ["--count", "x"]],
)
def test_wrong_options_add_no_user(words: list[str], home: Path, capsys: Capture) -> None:
    assert main(["user", "add", "load", *words]) == 2
    assert capsys.readouterr().err.startswith("Usage: zcproto user add")
    assert not home.exists()


def test_a_file_that_cannot_be_made_is_told(home: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "absent" / "keys"
    assert main(["user", "add", "load", "--count", "3", "--keys-out", str(path)]) == 1
    assert capsys.readouterr().err == f"zcproto: {path}: No such file or directory\n"
    assert not (home / "users.toml").exists()
