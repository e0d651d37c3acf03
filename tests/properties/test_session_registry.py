"""Test the registry against a model of dicts and lists for any sequence of calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.helpers import machine_settings
from tests.sessions.helpers import WALL, RegistryHarness, used_slots
from zcproto.errors import CallError, Code
from zcproto.sessions import OpenedSession, Session
from zcproto.sessions.token import id_from_text

LIFETIME, IDLE, REFRESH_LIFETIME, GRACE, PER_USER = 1000, 300, 2500, 50, 4
DEAD_LIMIT, DEAD_KEEP = 6, 500
USERS = ("alice", "bob", "a user with a name that is too long for its record")
CLIENTS = (("zc/1", "192.0.2.1"), ("zc/2", "192.0.2.1"), ("zc/1", "192.0.2.2"))


@dataclass
class ModelSession:
    """A live or lapsed session in the model."""

    id: str
    user: str
    client: tuple[str, str]
    token: bytes
    refresh: bytes | None
    created_at: int
    last_used_at: int
    expires_at: int
    refresh_expires_at: int | None
    live: bool = True
    spent: list[bytes] = field(default_factory=list)
    grace: tuple[bytes, int, bytes, bytes] | None = None


@dataclass
class ModelTombstone:
    """A tombstone in the model: a token and a family of refresh tokens, or a token whose session continues."""

    token: bytes
    family: list[bytes]
    code: Code
    died_at: int
    is_session: bool = True


def outcome(call: Callable[[], OpenedSession]) -> OpenedSession | CallError:
    try:
        return call()
    except CallError as error:
        return error


class RegistryMachine(RuleBasedStateMachine):
    """Call both with a clock that moves in any direction."""

    @initialize(evict=st.booleans(), refresh=st.booleans(), idle=st.booleans())
    def begin(self, evict: bool, refresh: bool, idle: bool) -> None:
        self.evict, self.refresh_on, self.idle = evict, refresh, IDLE if idle else None
        self.harness = RegistryHarness(
            lifetime_ms=LIFETIME,
            idle_timeout_ms=self.idle,
            per_user=PER_USER,
            when_full="evict_oldest" if evict else "refuse",
            refresh=refresh,
            refresh_lifetime_ms=REFRESH_LIFETIME,
            refresh_grace_ms=GRACE,
            dead_limit=DEAD_LIMIT,
            dead_keep_ms=DEAD_KEEP,
        )
        self.wall = WALL
        self.kept: list[ModelSession] = []
        self.dead: list[ModelTombstone] = []
        self.forgotten: list[bytes] = []
        self.endings: list[tuple[str, Code]] = []
        self.seen_wall = 0
        self.remembered: list[tuple[bytes, Session, int]] = []
        self.checked: list[tuple[bytes, Session]] = []
        self.counts = dict.fromkeys(
            ("opened", "refreshed", "expired", "revoked", "replaced", "refresh_reused", "checks_refused"), 0
        )

    # The model

    def add_tombstone(self, dead: ModelTombstone) -> None:
        self.dead.append(dead)
        if len(self.dead) > DEAD_LIMIT:
            self.forget(self.dead[0])

    def forget(self, dead: ModelTombstone) -> None:
        self.dead.remove(dead)
        self.forgotten.append(dead.token)

    def end(self, session: ModelSession, code: Code) -> None:
        if session.live:
            self.endings.append((session.id, code))
        self.kept.remove(session)
        family = [*session.spent, *([session.refresh] if session.refresh else [])]
        self.add_tombstone(ModelTombstone(session.token, family, code, self.seen_wall))

    def expire_if_due(self, session: ModelSession) -> bool:
        """Expire the session if it is due. Return True if it is still kept."""
        wall = self.wall
        idle = self.idle is not None and wall >= session.last_used_at + self.idle
        if session.live and (wall >= session.expires_at or idle):
            self.endings.append((session.id, Code.TOKEN_EXPIRED))
            self.counts["expired"] += 1
            session.live = False
        if not session.live and wall >= (session.refresh_expires_at or 0):
            self.end(session, Code.TOKEN_EXPIRED)
            return False
        return True

    def dead_code(self, dead: ModelTombstone) -> Code:
        return Code.UNAUTHENTICATED if self.wall - dead.died_at >= DEAD_KEEP else dead.code

    # Calls

    @rule(step=st.sampled_from([0, 1, 49, 50, 299, 300, 500, 1000, 2500, -1, -300, -5000]))
    def move_clock(self, step: int) -> None:
        self.wall += step

    @rule(user=st.sampled_from(USERS), client=st.sampled_from(CLIENTS), times=st.integers(1, PER_USER))
    def open_several(self, user: str, client: tuple[str, str], times: int) -> None:
        for _ in range(times):
            self.open(user, client)

    def open(self, user: str, client: tuple[str, str]) -> None:
        self.seen_wall = self.wall
        mine = [each for each in self.kept if each.user == user]
        if len(mine) >= PER_USER:  # below the limit nothing depends on them
            mine = [each for each in mine if self.expire_if_due(each)]
        refused = False
        if len(mine) >= PER_USER:
            lapsed = [each for each in mine if not each.live]
            if lapsed:
                self.end(lapsed[0], Code.TOKEN_EXPIRED)
            elif self.evict:
                self.counts["replaced"] += 1
                self.end(mine[0], Code.SESSION_REPLACED)
            else:
                refused = True
        opened = outcome(lambda: self.harness.open(user, self.wall, client=client[0], address=client[1]))
        if isinstance(opened, CallError):
            assert refused
            assert (opened.code, opened.details) == (Code.RESOURCE_EXHAUSTED, {"limit": PER_USER})
            return
        assert not refused
        self.counts["opened"] += 1
        assert (opened.refresh_token is not None) == self.refresh_on
        refresh_expires_at = self.wall + REFRESH_LIFETIME if self.refresh_on else None
        assert opened.refresh_expires_at == refresh_expires_at
        self.kept.append(
            ModelSession(
                opened.session.id,
                user,
                client,
                opened.token,
                opened.refresh_token,
                self.wall,
                self.wall,
                self.wall + LIFETIME,
                refresh_expires_at,
            )
        )
        self.note(opened)

    def note(self, opened: OpenedSession) -> None:
        self.remembered.append((opened.token, opened.session, self.harness.registry.generation))
        self.checked.append((opened.token, opened.session))

    @rule(data=st.data())
    def check(self, data: st.DataObject) -> None:
        tokens = [each.token for each in self.kept] + [each.token for each in self.dead] + self.forgotten[-3:]
        token = data.draw(st.sampled_from([*tokens, b"unknown"]))
        self.seen_wall = self.wall
        expected: Code | ModelSession = Code.UNAUTHENTICATED
        for session in self.kept:
            if session.token == token:
                was_live = session.live
                if self.expire_if_due(session) and session.live:
                    session.last_used_at = max(session.last_used_at, self.wall)
                    expected = session
                else:
                    assert was_live or not session.live
                    expected = Code.TOKEN_EXPIRED
                break
        else:
            for dead in self.dead:
                if dead.token == token:
                    expected = self.dead_code(dead)
        result = self.harness.registry.check(token, self.wall)
        if isinstance(expected, ModelSession):
            assert isinstance(result, Session)
            self.compare(result, expected)
            self.remembered.append((token, result, self.harness.registry.generation))
            self.checked.append((token, result))
        else:
            assert result is expected
            self.counts["checks_refused"] += 1

    @precondition(lambda self: self.checked)
    @rule(data=st.data())
    def check_again(self, data: st.DataObject) -> None:
        token, session = data.draw(st.sampled_from(self.checked[-20:]))
        model = next((each for each in self.kept if each.token == token and each.live), None)
        is_valid = model is not None and self.wall < model.expires_at
        if model is not None and self.idle is not None:
            is_valid = is_valid and self.wall < model.last_used_at + self.idle
        self.seen_wall = self.wall
        assert self.harness.registry.check_again(session, self.wall) == is_valid
        if model is not None and is_valid:
            model.last_used_at = max(model.last_used_at, self.wall)

    def compare(self, session: Session, model: ModelSession) -> None:
        assert (session.id, session.user, session.expires_at) == (model.id, model.user, model.expires_at)
        valid_until = model.expires_at
        if self.idle is not None:
            valid_until = min(valid_until, model.last_used_at + self.idle)
        assert session.valid_until == valid_until

    @precondition(lambda self: self.refresh_on)
    @rule(data=st.data(), client=st.sampled_from(CLIENTS))
    def refresh(self, data: st.DataObject, client: tuple[str, str]) -> None:
        tokens = [token for each in self.kept for token in (each.refresh, *each.spent[-2:]) if token]
        tokens += [token for each in self.dead for token in each.family]
        token = data.draw(st.sampled_from([*tokens, b"u" * 32]))
        self.seen_wall = self.wall
        session = next((each for each in self.kept if token in (each.refresh, *each.spent)), None)
        expected: Code | None = None
        again: tuple[bytes, bytes] | None = None
        if session is None:
            expected = Code.UNAUTHENTICATED
            for dead in self.dead:
                if token in dead.family:
                    expected = self.dead_code(dead)
        elif not self.expire_if_due(session):
            expected = Code.TOKEN_EXPIRED
        elif token != session.refresh:
            grace = session.grace
            if grace and grace[0] == token and self.wall < grace[1] and client == session.client:
                again = grace[2:]
            else:
                self.counts["refresh_reused"] += 1
                self.counts["revoked"] += 1
                self.end(session, Code.TOKEN_REVOKED)
                expected = Code.TOKEN_REVOKED
        opened = outcome(lambda: self.harness.refresh(token, self.wall, client=client[0], address=client[1]))
        if isinstance(opened, CallError):
            assert opened.code is expected
            return
        assert expected is None
        assert opened.session.id == session.id
        assert opened.refresh_expires_at == session.refresh_expires_at
        if again:
            assert (opened.token, opened.refresh_token) == again
            return
        assert opened.refresh_token is not None
        assert session.refresh_expires_at is not None
        self.add_tombstone(ModelTombstone(session.token, [], Code.TOKEN_REVOKED, self.wall, is_session=False))
        session.spent.append(token)
        session.grace = (token, self.wall + GRACE, opened.token, opened.refresh_token)
        session.token, session.refresh, session.live = opened.token, opened.refresh_token, True
        session.client, session.last_used_at = client, self.wall
        session.expires_at = min(self.wall + LIFETIME, session.refresh_expires_at)
        self.counts["refreshed"] += 1
        # Expired pairs are dropped now, so a clock that goes back does not revive them.
        self.expire_grace()
        self.note(opened)

    def expire_grace(self) -> None:
        for each in self.kept:
            if each.grace and self.wall >= each.grace[1]:
                each.grace = None

    @precondition(lambda self: self.kept)
    @rule(data=st.data(), user=st.sampled_from([None, *USERS]))
    def revoke(self, data: st.DataObject, user: str | None) -> None:
        session = data.draw(st.sampled_from(self.kept))
        allowed = user in (None, session.user)
        if allowed:
            self.counts["revoked"] += 1
            self.end(session, Code.TOKEN_REVOKED)
        assert self.harness.registry.revoke(session.id, user=user, reason="test") == allowed

    @rule(user=st.sampled_from(USERS))
    def revoke_user(self, user: str) -> None:
        mine = [each for each in self.kept if each.user == user]
        for session in mine:
            self.counts["revoked"] += 1
            self.end(session, Code.TOKEN_REVOKED)
        assert self.harness.registry.revoke_user(user, "test") == len(mine)

    @rule(user=st.sampled_from(USERS))
    def list(self, user: str) -> None:
        self.seen_wall = self.wall
        mine = [each for each in self.kept if each.user == user]
        mine = [each for each in mine if self.expire_if_due(each)]
        listed = [
            (i.id, i.user, i.created_at, i.last_used_at, i.expires_at, (i.client, i.address), i.live)
            for i in self.harness.registry.list(user, self.wall)
        ]
        assert listed == [
            (s.id, s.user, s.created_at, s.last_used_at, s.expires_at, s.client, s.live) for s in mine
        ]

    @rule()
    def clean(self) -> None:
        self.seen_wall = self.wall
        self.expire_grace()
        while self.dead and self.wall - self.dead[0].died_at >= DEAD_KEEP:
            self.forget(self.dead[0])
        before = self.counts["expired"]
        for session in sorted(self.kept, key=self.slot_of):
            self.expire_if_due(session)
        assert self.harness.registry.clean(self.wall, 10**6) == self.counts["expired"] - before

    def slot_of(self, session: ModelSession) -> int:
        raw = id_from_text(session.id)
        assert raw is not None
        return self.harness.table.ids.find(raw)

    # Invariants

    @invariant()
    def counts_agree(self) -> None:
        registry = self.harness.registry
        live = sum(each.live for each in self.kept)
        assert (len(registry), registry.kept, registry.lapsed) == (
            live,
            len(self.kept),
            len(self.kept) - live,
        )
        assert registry.tombstones == len(self.dead)
        assert {name: getattr(registry, name) for name in self.counts} == self.counts
        table = self.harness.table
        assert used_slots(table.slab) == table.tokens.count == len(self.kept) + len(self.dead)
        assert table.ids.count == len(self.kept) + sum(each.is_session for each in self.dead)

    @invariant()
    def strings_agree(self) -> None:
        assert self.harness.strings == (
            len({each.user for each in self.kept}),
            len({each.client[0] for each in self.kept}),
            len({each.client[1] for each in self.kept}),
        )

    @invariant()
    def no_user_has_more_than_allowed(self) -> None:
        for user in USERS:
            assert sum(each.user == user for each in self.kept) <= PER_USER

    @invariant()
    def observed_endings_match(self) -> None:
        assert sorted((each[0], each[1]) for each in self.harness.ended) == sorted(self.endings)

    @invariant()
    def cached_session_is_valid(self) -> None:
        generation = self.harness.registry.generation
        self.remembered = [each for each in self.remembered if each[2] == generation][-10:]
        live = {each.token: each for each in self.kept if each.live}
        for token, session, _ in self.remembered:
            assert live[token].id == session.id
            assert self.slot_of(live[token]) == session.slot


RegistryMachine.TestCase.settings = machine_settings(max_examples=40, steps=60)
TestRegistry = RegistryMachine.TestCase
