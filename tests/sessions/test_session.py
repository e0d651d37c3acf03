"""Test the ranges of settings, and that no repr contains a secret."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.sessions.helpers import DAY, HOUR, SECOND, WALL, RegistryHarness
from zcproto.errors import ConfigError
from zcproto.sessions import Session, SessionInfo, SessionSettings, token_text
from zcproto.sessions.registry import Spent


def test_defaults_match_configuration() -> None:
    settings = SessionSettings()
    assert settings.lifetime_ms == DAY
    assert settings.idle_timeout_ms == HOUR
    assert (settings.per_user, settings.when_full) == (5, "evict_disconnected")
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
def test_setting_out_of_range_is_named(name: str, value: Any) -> None:
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
def test_limits_of_ranges_are_allowed(name: str, value: Any) -> None:
    settings: Any = {name: value}
    assert getattr(SessionSettings(**settings), name) == value


def test_all_faults_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        SessionSettings(lifetime_ms=0, per_user=0, refresh_grace_ms=10**9)
    assert len(caught.value.faults) == 3


def test_settings_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SessionSettings().per_user = 6  # type: ignore[misc]


def test_records_use_slots(harness: RegistryHarness) -> None:
    opened = harness.open()
    for record in (opened, opened.session, harness.registry.info(opened.session.id, WALL)):
        assert not hasattr(record, "__dict__")


def test_repr_contains_no_token(harness: RegistryHarness) -> None:
    opened = harness.open()
    assert opened.refresh_token is not None
    spent = Spent(bytes(32), opened.token, opened.refresh_token, WALL)
    info = harness.registry.info(opened.session.id, WALL)
    text = "\n".join(map(repr, (opened, opened.session, info, spent, harness.registry, harness.settings)))
    for token in (opened.token, opened.refresh_token):
        assert repr(token) not in text
        assert token_text(token) not in text
        assert token.hex() not in text
    assert opened.session.id in repr(opened)
    assert "refresh_token=***" in repr(opened)
    assert "refresh_token=None" in repr(RegistryHarness(refresh=False).open())


def test_id_text_is_22_characters_and_cached() -> None:
    session = RegistryHarness().open().session
    assert len(session.id) == 22
    assert session.id is session.id


@pytest.mark.parametrize("roles", ["", "operator", "admin", "admin operator"])
@pytest.mark.parametrize("bound", [False, True])
def test_flags_are_independent(harness: RegistryHarness, roles: str, bound: bool) -> None:
    opened = harness.open(roles=frozenset(roles.split()), bound=bound)
    checked = harness.good(opened.token)
    info = harness.registry.info(checked.id, WALL)
    for record in (opened.session, checked, info):
        assert isinstance(record, Session | SessionInfo)
        assert (record.roles, record.bound) == (frozenset(roles.split()), bound)
