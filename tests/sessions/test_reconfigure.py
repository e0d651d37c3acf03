"""Test new settings while sessions exist."""

from __future__ import annotations

import pytest

from zcproto.errors import Code, ResourceExhausted
from zcproto.sessions import Session, SessionRegistry, SessionSettings

HOUR = 3_600_000


def registry(**settings: object) -> SessionRegistry:
    numbers = iter(range(1, 1_000_000))
    return SessionRegistry(
        SessionSettings(**settings),  # type: ignore[arg-type]
        lambda size: next(numbers).to_bytes(size, "big")[::-1],
    )


def open_one(sessions: SessionRegistry, wall: int = 0, user: str = "ada") -> bytes:
    return sessions.open(user, client="t/1", address="192.0.2.1", wall=wall).token


def test_new_lifetime_applies_to_new_sessions_only() -> None:
    sessions = registry(lifetime_ms=2 * HOUR, idle_timeout_ms=None)
    old = open_one(sessions)
    sessions.reconfigure(SessionSettings(lifetime_ms=HOUR, idle_timeout_ms=None))
    new = open_one(sessions)
    assert isinstance(sessions.check(old, HOUR), Session)
    assert sessions.check(new, HOUR) is Code.TOKEN_EXPIRED
    session = sessions.check(old, 0)
    assert isinstance(session, Session)
    assert session.expires_at == 2 * HOUR


def test_new_idle_limit_applies_to_all_sessions() -> None:
    sessions = registry(idle_timeout_ms=HOUR)
    token = open_one(sessions)
    session = sessions.check(token, 0)
    assert isinstance(session, Session)
    assert session.valid_until == HOUR
    before = sessions.generation
    sessions.reconfigure(SessionSettings(idle_timeout_ms=1000))
    assert sessions.generation > before  # callers that cached the session must check again
    assert sessions.check(token, 1000) is Code.TOKEN_EXPIRED


def test_idle_limit_can_be_switched_off() -> None:
    sessions = registry(idle_timeout_ms=1000)
    token = open_one(sessions)
    sessions.reconfigure(SessionSettings(idle_timeout_ms=None))
    assert isinstance(sessions.check(token, HOUR), Session)


def test_lower_limit_keeps_sessions_and_refuses_new_ones() -> None:
    sessions = registry(per_user=3)
    tokens = [open_one(sessions) for _ in range(3)]
    sessions.reconfigure(SessionSettings(per_user=1))
    assert all(isinstance(sessions.check(token, 0), Session) for token in tokens)
    with pytest.raises(ResourceExhausted):
        open_one(sessions)


def test_lower_limit_refuses_although_a_lapsed_session_could_be_evicted() -> None:
    sessions = registry(per_user=5, idle_timeout_ms=HOUR)
    open_one(sessions)
    live = [open_one(sessions, HOUR) for _ in range(2)]
    sessions.reconfigure(SessionSettings(per_user=1))
    with pytest.raises(ResourceExhausted):
        open_one(sessions, HOUR)
    assert all(isinstance(sessions.check(token, HOUR), Session) for token in live)


def test_lower_limit_evicts_down_to_it() -> None:
    sessions = registry(per_user=5, when_full="evict_oldest")
    ended = []
    sessions.observers.append(lambda session_id, code, reason: ended.append(code))
    old = [open_one(sessions) for _ in range(5)]
    sessions.reconfigure(SessionSettings(per_user=1, when_full="evict_oldest"))
    new = open_one(sessions)
    assert [sessions.check(token, 0) for token in old] == 5 * [Code.SESSION_REPLACED]
    assert isinstance(sessions.check(new, 0), Session)
    assert (ended, sessions.replaced) == (5 * [Code.SESSION_REPLACED], 5)


def test_new_grace_applies_to_next_refresh() -> None:
    sessions = registry(refresh_grace_ms=0)
    opened = sessions.open("ada", client="t/1", address="192.0.2.1", wall=0)
    sessions.reconfigure(SessionSettings(refresh_grace_ms=5000))
    assert opened.refresh_token is not None
    first = sessions.refresh(opened.refresh_token, client="t/1", address="192.0.2.1", wall=1)
    again = sessions.refresh(opened.refresh_token, client="t/1", address="192.0.2.1", wall=5000)
    assert again.token == first.token


def test_table_bounds_cannot_be_reconfigured() -> None:
    sessions = registry(max_sessions=10)
    with pytest.raises(AssertionError):
        sessions.reconfigure(SessionSettings(max_sessions=11))
