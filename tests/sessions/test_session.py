"""Settings and their ranges; records, and that they show no secret."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.sessions.helpers import DAY, HOUR, SECOND, WALL, Desk
from zcproto.errors import ConfigError
from zcproto.sessions import Session, SessionInfo, SessionSettings, token_text
from zcproto.sessions.grace import Spent


def test_the_defaults_are_those_of_the_configuration() -> None:
    settings = SessionSettings()
    assert settings.lifetime_ms == DAY
    assert settings.idle_timeout_ms == HOUR
    assert (settings.per_user, settings.when_full) == (5, "refuse")
    assert settings.refresh
    assert settings.refresh_lifetime_ms == 30 * DAY
    assert settings.refresh_grace_ms == 10 * SECOND


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lifetime_ms", 0),
        ("lifetime_ms", -1),
        ("idle_timeout_ms", 0),
        ("per_user", 0),
        ("refresh_lifetime_ms", 0),
        ("refresh_grace_ms", -1),
        ("refresh_grace_ms", 60_001),
        ("max_sessions", 0),
        ("dead_limit", -1),
        ("dead_keep_ms", -1),
        ("grace_limit", -1),
        ("when_full", "evict"),
    ],
)
def test_a_setting_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        SessionSettings(**{name: value})
    assert len(caught.value.faults) == 1
    assert name in caught.value.faults[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lifetime_ms", 1),
        ("idle_timeout_ms", 1),
        ("idle_timeout_ms", None),
        ("per_user", 1),
        ("refresh_grace_ms", 0),
        ("refresh_grace_ms", 60_000),
        ("max_sessions", 1),
        ("dead_limit", 0),
        ("dead_keep_ms", 0),
        ("grace_limit", 0),
        ("when_full", "evict_oldest"),
    ],
)
def test_the_ends_of_the_ranges_are_allowed(name: str, value: Any) -> None:
    settings: Any = {name: value}
    assert getattr(SessionSettings(**settings), name) == value


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        SessionSettings(lifetime_ms=0, per_user=0, refresh_grace_ms=10**9)
    assert len(caught.value.faults) == 3


def test_settings_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SessionSettings().per_user = 6  # type: ignore[misc]


def test_records_have_no_dict() -> None:
    desk = Desk()
    opened = desk.open()
    for record in (opened, opened.session, desk.registry.info(opened.session.id, WALL), desk.registry):
        assert not hasattr(record, "__dict__")


def test_no_record_prints_a_token() -> None:
    desk = Desk()
    opened = desk.open()
    assert opened.refresh_token is not None
    spent = Spent(bytes(32), opened.token, opened.refresh_token, WALL)
    info = desk.registry.info(opened.session.id, WALL)
    text = "\n".join(map(repr, (opened, opened.session, info, spent, desk.registry, desk.settings)))
    for token in (opened.token, opened.refresh_token):
        assert repr(token) not in text
        assert token_text(token) not in text
        assert token.hex() not in text
    assert opened.session.id in repr(opened)
    assert "refresh_token=***" in repr(opened)
    assert "refresh_token=None" in repr(Desk(refresh=False).open())


def test_the_id_is_22_characters_and_the_same_each_time() -> None:
    session = Desk().open().session
    assert len(session.id) == 22
    assert session.id is session.id


@pytest.mark.parametrize("operator", [False, True])
@pytest.mark.parametrize("bound", [False, True])
def test_flags_are_kept_apart(operator: bool, bound: bool) -> None:
    desk = Desk()
    opened = desk.open(operator=operator, bound=bound)
    checked = desk.good(opened.token)
    info = desk.registry.info(checked.id, WALL)
    for record in (opened.session, checked, info):
        assert isinstance(record, Session | SessionInfo)
        assert (record.operator, record.bound) == (operator, bound)
