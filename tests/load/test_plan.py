from __future__ import annotations

import resource
from pathlib import Path

import pytest

from tests.load.helpers import OPERATOR, plan, users
from zcproto.errors import ConfigError
from zcproto.load.plan import (
    MAX_KEY_FILE_BYTES,
    Credential,
    Plan,
    Share,
    check_plan,
    read_credentials,
    require_open_files,
    session_credentials,
    shares,
)


def faults_of(asked: Plan) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_plan(asked)
    return caught.value.faults


def test_a_plan_with_room_for_its_sessions_is_accepted() -> None:
    check_plan(plan(connections=10, sessions=10, credentials=users(2)))


def test_more_sessions_than_connections_are_refused() -> None:
    (fault,) = faults_of(plan(connections=4, sessions=5))
    assert "--sessions 5" in fault
    assert "at most --sessions 4" in fault


def test_too_few_keys_are_refused_with_the_command_that_makes_enough() -> None:
    (fault,) = faults_of(plan(connections=11, sessions=11, credentials=users(2)))
    assert "10 sessions, 5 each" in fault
    assert "zcproto user add load --count 4 --keys-out FILE" in fault


def test_the_operator_takes_one_of_its_own_places() -> None:
    same = users(2)
    faults_of(plan(sessions=10, credentials=same, operator=same[0]))
    check_plan(plan(sessions=9, credentials=same, operator=same[0]))
    places = session_credentials(plan(sessions=9, credentials=same, operator=same[0]))
    assert [places.count(each) for each in same] == [4, 5]


def test_a_process_without_a_session_is_refused() -> None:
    (fault,) = faults_of(plan(sessions=2, processes=3))
    assert "--processes 3" in fault


def test_a_payload_beyond_all_limits_is_refused() -> None:
    (fault,) = faults_of(plan(payload_bytes=1 << 30))
    assert "--payload" in fault


def test_all_faults_are_told_at_once() -> None:
    assert len(faults_of(plan(connections=4, sessions=50, processes=60, payload_bytes=1 << 30))) == 4


def test_shares_add_up_to_the_plan() -> None:
    whole = plan(connections=11, sessions=7, processes=3, rate=900.0, arrival_rate=300.0)
    parts = shares(whole, "127.0.0.1", 5.0, 600.0)
    assert sum(each.connections for each in parts) == 11
    assert sum(each.rate for each in parts) == 900
    assert sum(each.arrival_rate for each in parts) == 300
    assert sum(each.verify_rate for each in parts) == 600
    dealt = [tuple(each) for part in parts for each in part.credentials]
    assert sorted(dealt) == sorted(tuple(each) for each in session_credentials(whole))
    assert all(part.connections >= len(part.credentials) >= 1 for part in parts)


def test_a_share_travels_as_json() -> None:
    (share,) = shares(plan(ca_file=Path("/x/ca.crt")), "127.0.0.1", 5.0, 600.0)
    assert share.ca_file == "/x/ca.crt"
    assert Share.from_json(share.as_json()) == share


def test_no_key_is_shown() -> None:
    shown = repr(plan()) + repr(OPERATOR) + repr(shares(plan(), "127.0.0.1", 5.0, 600.0))
    assert OPERATOR.key not in shown
    assert "operator" in repr(OPERATOR)


# --- keys files ---------------------------------------------------------------------------------------


def test_a_keys_file_has_a_name_and_a_key_on_each_line(tmp_path: Path) -> None:
    path = tmp_path / "load.keys"
    path.write_text("load-1\tAAA\n\nload-2\tBBB\n")
    assert read_credentials(path) == (Credential("load-1", "AAA"), Credential("load-2", "BBB"))


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        ("", "no key in it"),
        ("\n \n", "no key in it"),
        ("load-1 SECRET\n", "line 1: must be a name, a tab and a key"),
        ("load-1\tAAA\nload-2\t\n", "line 2"),
        ("\tSECRET\n", "line 1"),
        ("load-1\tAAA\nload-1\tBBB\n", "twice"),
    ],
)
def test_a_keys_file_that_is_none_is_refused_and_not_shown(content: str, phrase: str, tmp_path: Path) -> None:
    path = tmp_path / "load.keys"
    path.write_text(content)
    with pytest.raises(ConfigError, match=phrase) as caught:
        read_credentials(path)
    assert "SECRET" not in str(caught.value)


def test_a_keys_file_that_is_missing_is_refused_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file.*zcproto user add"):
        read_credentials(tmp_path / "none")


def test_a_keys_file_of_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "load.keys"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is no text"):
        read_credentials(path)


def test_a_huge_keys_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "load.keys"
    with path.open("wb") as file:
        file.truncate(MAX_KEY_FILE_BYTES + 1)
    with pytest.raises(ConfigError, match="too large"):
        read_credentials(path)


# --- open files ---------------------------------------------------------------------------------------


class Limits:
    """The system's limit of open files, without changing that of the tests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, soft: int, hard: int) -> None:
        self.now = (soft, hard)
        monkeypatch.setattr(resource, "getrlimit", lambda kind: self.now)
        monkeypatch.setattr(resource, "setrlimit", self.set)

    def set(self, kind: int, limits: tuple[int, int]) -> None:
        assert kind == resource.RLIMIT_NOFILE
        self.now = limits


def test_a_limit_that_suffices_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(monkeypatch, 1024, 4096)
    require_open_files(1024, 900, lambda limit: limit)
    assert limits.now == (1024, 4096)


@pytest.mark.parametrize("hard", [4096, resource.RLIM_INFINITY])
def test_a_limit_is_raised_as_far_as_needed(hard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(monkeypatch, 1024, hard)
    require_open_files(2000, 1900, lambda limit: limit)
    assert limits.now == (2000, hard)


@pytest.mark.parametrize(("hard", "fitting"), [(4096, 3996), (50, 0)])
def test_a_limit_that_may_not_be_raised_is_told_with_what_fits(
    hard: int, fitting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(monkeypatch, 20, hard)
    with pytest.raises(ConfigError) as caught:
        require_open_files(5000, 4900, lambda limit: limit - 100)
    assert f"may have {hard}" in str(caught.value)
    assert "LimitNOFILE=5000" in str(caught.value)
    assert str(caught.value).endswith(f"--connections {fitting}")
    assert limits.now == (hard, hard)
