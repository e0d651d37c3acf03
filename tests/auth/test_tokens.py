"""Machine tokens: their file, and which entry a token has."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.auth.helpers import write
from zcproto.auth import tokens
from zcproto.auth.tokens import MachineToken, TokenFile
from zcproto.errors import AlreadyExists, ConfigError, NotFound, ResourceExhausted
from zcproto.sessions.token import digest_of, token_from_text, token_text

ADDED = datetime(2026, 1, 1, 12, 30, tzinfo=UTC)
EXPIRES = ADDED + timedelta(days=90)
DIGEST = token_text(bytes(range(32)))
ENTRY = f"""[tokens.a]
sha256 = "{DIGEST}"
scopes = ["metrics"]
added = 2026-01-01T12:30:00Z
expires = 2026-04-01T12:30:00Z
"""


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    return TokenFile(tmp_path / "tokens.toml")


def add(file: TokenFile, name: str = "prometheus", *scopes: str) -> bytes:
    raw = token_from_text(file.add(name, scopes or ("metrics",), ADDED, EXPIRES).reveal())
    assert raw is not None
    return raw


def test_token_is_found_by_its_value_and_only_its_digest_is_stored(file: TokenFile) -> None:
    token = add(file, "prometheus", "status", "metrics", "status")
    other = add(file, "other")
    assert file.by_token(token) is None, "it is not read yet"
    file.load()
    entry = MachineToken(digest_of(token), ("metrics", "status"), ADDED, EXPIRES)
    assert file.by_token(token) == ("prometheus", entry)
    assert file.by_token(other) == ("other", entry._replace(digest=digest_of(other), scopes=("metrics",)))
    assert file.by_token(bytes(32)) is None
    text = file.path.read_text()
    assert token_text(token) not in text
    assert token_text(digest_of(token)) in text
    assert token_text(digest_of(token)) not in repr(entry)
    assert file.path.stat().st_mode & 0o777 == 0o600


def test_reading_in_a_thread_meanwhile_disturbs_no_search(
    file: TokenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = add(file)
    file.load()
    states = iter([{}, {}, *3 * [file.entries]])  # replaced between two looks
    monkeypatch.setattr(TokenFile, "entries", property(lambda _: next(states)), raising=False)
    assert file.by_token(token) is None


def test_comparison_of_digests_takes_constant_time(file: TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    token = add(file)
    file.load()
    monkeypatch.setattr(tokens.hmac, "compare_digest", lambda *both: bool(compared.append(both)))
    assert file.by_token(token) is None, "the comparison decides"
    assert compared == [(digest_of(token), digest_of(token))]


def test_revoked_token_is_unknown_after_the_next_reading(file: TokenFile) -> None:
    token = add(file)
    file.load()
    assert TokenFile(file.path).remove("prometheus").digest == digest_of(token)
    assert file.changed()
    file.reload()
    assert file.by_token(token) is None
    with pytest.raises(NotFound, match="zcproto token list"):
        file.remove("prometheus")


def test_name_is_used_once(file: TokenFile) -> None:
    add(file)
    with pytest.raises(AlreadyExists, match='named "prometheus" already'):
        add(file)


def test_malformed_name_is_refused(file: TokenFile) -> None:
    with pytest.raises(ConfigError, match="a name has 1 to"):
        add(file, "")
    assert not file.path.exists()


def test_number_of_tokens_is_limited(file: TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_TOKENS", 2)
    add(file, "a")
    add(file, "b")
    with pytest.raises(ResourceExhausted, match="revoke one first"):
        add(file, "c")


def test_last_use_is_stored_as_a_full_hour_and_never_goes_back(file: TokenFile) -> None:
    token = add(file)
    hour = datetime(2026, 1, 2, 8, tzinfo=UTC)

    def last_used() -> datetime | None:
        file.load()
        return file.entries["prometheus"].last_used

    for used, stored in (
        (hour + timedelta(minutes=59), hour),
        (hour - timedelta(hours=2), hour),
        (hour.astimezone(tz=None) + timedelta(hours=1, seconds=1), hour + timedelta(hours=1)),
    ):
        file.mark_used({"prometheus": (digest_of(token), used)})
        assert last_used() == stored
    before = file.path.stat()
    file.mark_used(dict.fromkeys(("prometheus", "revoked"), (digest_of(token), hour)))
    assert file.path.stat() == before, "nothing to write"
    file.mark_used({"prometheus": (bytes(32), hour + timedelta(days=1))})
    assert last_used() == hour + timedelta(hours=1), "a token of the same name that was replaced meanwhile"


def test_use_does_not_count_as_a_change_but_all_else_does(file: TokenFile) -> None:
    token = add(file)
    file.load()
    before = file.entries["prometheus"]
    TokenFile(file.path).mark_used({"prometheus": (digest_of(token), EXPIRES)})
    file.reload()
    assert file.entries["prometheus"] != before
    assert file.take_changes() == []
    add(TokenFile(file.path), "other")
    file.reload()
    (change,) = file.take_changes()
    assert (change.total, change.added) == (1, ["other"])
    assert TokenFile.is_changed(before, before._replace(scopes=("status",)))
    assert not TokenFile.is_gone(before, None)


def test_list_shows_no_digest(file: TokenFile) -> None:
    token = add(file)
    file.mark_used({"prometheus": (digest_of(token), ADDED)})
    file.load()
    assert file.entries["prometheus"].as_dict("prometheus") == {
        "name": "prometheus",
        "scopes": ["metrics"],
        "added": "2026-01-01T12:30:00Z",
        "expires": "2026-04-01T12:30:00Z",
        "last_used": "2026-01-01T12:00:00Z",
    }
    assert file.entries["prometheus"]._replace(last_used=None).as_dict("a")["last_used"] is None


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (f'"{DIGEST}"', '"short"', "sha256 must be 43 characters"),
        (f'"{DIGEST}"', "7", "sha256 must be 43 characters"),
        ('["metrics"]', '["all"]', "scopes must be a list of metrics and status"),
        ('["metrics"]', "[]", "scopes must be"),
        ('["metrics"]', '"metrics"', "scopes must be"),
        ('["metrics"]', '[["metrics"]]', "scopes must be"),
        ("expires = 2026-04-01T12:30:00Z\n", "", "expires must be a date and time with an offset"),
        ("added = 2026-01-01T12:30:00Z", "added = 2026-01-01T12:30:00", "added must be"),
        ("added = 2026-01-01T12:30:00Z", "added = 0001-01-01T00:00:00+23:00", "added must be"),
        ("added", 'last_used = "never"\nadded', "last_used must be"),
        ("added", "owner = 1\nadded", "unknown key"),
    ],
)
def test_every_fault_names_its_key(file: TokenFile, old: str, new: str, fault: str) -> None:
    write(file.path, ENTRY)
    file.load()
    assert file.entries["a"].expires == EXPIRES
    write(file.path, ENTRY.replace(old, new, 1))
    with pytest.raises(ConfigError, match=fault):
        file.load()
