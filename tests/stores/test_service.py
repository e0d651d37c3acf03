"""Sessions over a store that does what the test wants: nothing acknowledged is lost, nothing ended comes back, and
nobody waits for a store that is out."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import FakeClock, FakeTimers
from tests.sessions.helpers import CountedEntropy
from tests.stores.faulty import (
    FAILS,
    FAILS_AFTER,
    HANGS,
    HANGS_AFTER,
    READ_ONLY,
    WORKS,
    FaultyStore,
)
from zcproto.common.deadlines import DeadlineWheel
from zcproto.errors import (
    CallError,
    Code,
    ConfigError,
    ResourceExhausted,
    TokenExpired,
    TokenRevoked,
    Unauthenticated,
    Unavailable,
)
from zcproto.sessions import OpenedSession, Session, SessionRegistry, SessionSettings
from zcproto.sessions.health import MAX_DELAY_S, State
from zcproto.sessions.record import EndedRecord, SessionRecord
from zcproto.sessions.token import digest_of, id_from_text
from zcproto.stores import changes as changes_module
from zcproto.stores import revoker as revoker_module
from zcproto.stores import service as sessions_module
from zcproto.stores import sync as sync_module
from zcproto.stores import tasks as tasks_module
from zcproto.stores.base import StoreUnavailable
from zcproto.stores.pending import PendingRevocations, Revocation
from zcproto.stores.revoker import REPEATS_S
from zcproto.stores.service import (
    MISSES_PER_ADDRESS,
    MISSES_S,
    UNKNOWN_TOKEN_S,
    SessionService,
    StoredSessionService,
)
from zcproto.stores.sync import StoreSync

TIMEOUT = 0.25
GRACE = 300.0
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
ADDRESS = "192.0.2.7"
CLIENT = "test/1"


class Office:
    """One process: its registry, its keeper, what it serves; and the store, which may be another's too."""

    def __init__(
        self,
        folder: Path,
        store: FaultyStore,
        clock: FakeClock,
        entropy: CountedEntropy,
        *,
        pending_limit: int = 1_000,
        grace: float = GRACE,
        **settings: Any,
    ) -> None:
        self.clock = clock
        self.store = store
        self.timers = FakeTimers(clock.now())
        self.settings = SessionSettings(**settings)
        self.registry = SessionRegistry(self.settings, entropy)
        self.ended: list[tuple[str, Code, str]] = []
        self.registry.observers.append(lambda *told: self.ended.append(told))
        self.used: set[str] = set()
        self.pending = PendingRevocations(folder / "revocations.pending", limit=pending_limit)
        self.sync = StoreSync(
            store,
            self.registry,
            self.pending,
            is_used=self.used.__contains__,
            wheel=DeadlineWheel(self.timers),
            clock=clock,
            random=lambda: 0.5,
            timeout=TIMEOUT,
            grace=grace,
            cleanup_interval=3_600.0,
            keep_ended_ms=self.settings.dead_keep_ms,
        )
        self.sessions = StoredSessionService(self.sync, self.settings, clock)
        store.hung = lambda: clock.advance(TIMEOUT)

    # what callers do

    async def open(self, user: str = "ada", **options: Any) -> OpenedSession:
        return await self.sessions.open(
            user, **{"operator": False, "client": CLIENT, "address": ADDRESS, **options}
        )

    async def refresh(self, opened: OpenedSession, **options: Any) -> OpenedSession:
        assert opened.refresh_token is not None
        return await self.sessions.refresh(
            opened.refresh_token, **{"client": CLIENT, "address": ADDRESS, **options}
        )

    async def revoke(self, opened: OpenedSession, user: str | None = "ada") -> bool:
        return await self.sessions.revoke(opened.session.id, user=user, reason="asked for")

    async def find(self, token: bytes, address: str = ADDRESS) -> Session | Code:
        """What a connection does with a frame's token."""
        found = self.check(token)
        if self.sessions.is_shared and found in (Code.UNAUTHENTICATED, Code.TOKEN_EXPIRED):
            assert isinstance(found, Code)
            await self.sessions.look_up(token, address, found)
            return self.check(token)
        return found

    def check(self, token: bytes) -> Session | Code:
        return self.registry.check(token, self.clock.wall())

    def good(self, opened: OpenedSession) -> bool:
        found = self.check(opened.token)
        return isinstance(found, Session) and found.id == opened.session.id

    def use(self, opened: OpenedSession) -> None:
        """A connection uses this session."""
        self.used.add(opened.session.id)

    # what time does

    async def advance(self, seconds: float) -> None:
        """Let time go by, and whatever begins in it come to its end."""
        self.clock.advance(seconds)
        self.timers.advance(self.clock.now() - self.timers.time())
        await self.settle()

    async def settle(self) -> None:
        for _ in range(1_000):
            running = [task for task in self.sync.tasks.running if task.get_name() != tasks_module.UPKEEP]
            if not running:
                return
            await asyncio.wait(running)
            await asyncio.sleep(0)
        raise AssertionError("it never comes to rest")

    async def recover(self) -> None:
        """Let the store work again, and be found working."""
        self.store.mode = WORKS
        self.store.modes.clear()
        await self.advance(MAX_DELAY_S)
        assert self.state is State.HEALTHY

    async def outage(self, mode: str = FAILS) -> None:
        self.store.mode = mode
        self.sync.health.begin_outage(self.clock.now())
        await self.settle()

    @property
    def state(self) -> State:
        return self.sync.health.state


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timeouts here are short, and the disk of a busy machine may be slow."""
    monkeypatch.setattr(revoker_module, "MIN_DISK_S", 5.0)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Events that are logged."""
    from zcproto.observe import log as log_module

    lines: list[dict[str, Any]] = []

    class Output:
        def write(self, line: str) -> None:
            lines.append(json.loads(line))

        def is_terminal(self) -> bool:
            return False

        def close(self) -> None:
            pass

    monkeypatch.setattr(log_module._state, "output", Output())
    monkeypatch.setattr(log_module._state, "level", 10)
    monkeypatch.setattr(log_module._state, "format", "json")
    return lines


def events(log: list[dict[str, Any]]) -> list[str]:
    return [line["event"] for line in log]


Begin = Callable[..., Awaitable[Office]]


@pytest.fixture
async def begin(tmp_path: Path, clock: FakeClock) -> AsyncIterator[Begin]:
    """Start processes; without another store they have a new one. All are stopped at the end."""
    offices: list[Office] = []
    entropy = CountedEntropy()
    remotes = itertools.count()

    async def start(
        store: FaultyStore | None = None, *, shared: bool = False, starts: bool = True, **options: Any
    ) -> Office:
        if store is None:
            next(remotes)
            store = FaultyStore(SessionRegistry(SessionSettings(per_user=1_000), entropy), shared=shared)
        office = Office(tmp_path, store, clock, entropy, **options)
        offices.append(office)
        if starts:
            await office.sync.start()
        return office

    yield start
    for office in offices:
        if office.store.gate is not None:
            office.store.gate.set()
        await office.sessions.stop()


@pytest.fixture
async def office(begin: Begin) -> Office:
    """A process with a store of its own."""
    return await begin()


@pytest.fixture
async def shared(begin: Begin) -> Office:
    """A process with a store that others use too."""
    return await begin(shared=True)


def raw(opened: OpenedSession) -> bytes:
    session_id = id_from_text(opened.session.id)
    assert session_id is not None
    return session_id


async def refused(work: Awaitable[Any], kind: type[CallError] = Unavailable) -> CallError:
    with pytest.raises(kind) as caught:
        await work
    return caught.value


# --- a store that works -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_shared", [False, True])
async def test_a_session_is_in_the_store_when_it_is_told_of(begin: Begin, is_shared: bool) -> None:
    office = await begin(shared=is_shared)
    opened = await office.open(key="device:phone", operator=True)
    assert office.good(opened)
    record = office.store.registry.record(raw(opened))
    assert record is not None
    assert record == office.registry.record(raw(opened))
    assert (record.user, record.client, record.address, record.key) == (
        "ada",
        CLIENT,
        ADDRESS,
        "device:phone",
    )
    assert opened.session.bound
    assert opened.session.operator


async def test_nothing_is_told_before_the_store_has_it(office: Office) -> None:
    office.store.gate = asyncio.Event()
    opening = asyncio.ensure_future(office.open())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not opening.done()
    assert len(office.registry) == 0
    office.store.gate.set()
    assert office.good(await opening)


async def test_the_users_limit_is_the_stores(begin: Begin) -> None:
    office = await begin(per_user=2)
    await office.open()
    await office.open()
    error = await refused(office.open(), ResourceExhausted)
    assert error.details == {"limit": 2}
    assert office.store.registry.kept == office.registry.kept == 2
    await office.open("bob")


async def test_who_makes_room_ends_here_too(begin: Begin) -> None:
    office = await begin(per_user=1, when_full="evict_oldest")
    first = await office.open()
    second = await office.open()
    assert office.ended == [
        (first.session.id, Code.SESSION_REPLACED, "replaced by a newer session"),
    ]
    assert office.check(first.token) is Code.SESSION_REPLACED
    assert office.good(second)


async def test_a_full_server_says_so_before_it_asks(begin: Begin) -> None:
    office = await begin(max_sessions=1)
    await office.open()
    calls = list(office.store.calls)
    error = await refused(office.open("bob"), ResourceExhausted)
    assert error.details == {"retry_after_ms": 10_000}
    assert office.store.calls == calls


async def test_openings_at_once_do_not_fill_more_than_there_is(begin: Begin) -> None:
    office = await begin(max_sessions=3)
    outcomes = await asyncio.gather(*(office.open(f"u{n}") for n in range(6)), return_exceptions=True)
    assert sum(isinstance(outcome, OpenedSession) for outcome in outcomes) == 3
    assert sum(isinstance(outcome, ResourceExhausted) for outcome in outcomes) == 3


async def test_a_shared_stores_near_cache_is_bounded_and_the_rest_is_looked_up(begin: Begin) -> None:
    office = await begin(shared=True, max_sessions=4, per_user=100)
    opened = [await office.open() for _ in range(20)]
    assert office.registry.kept == 4
    for each in opened:
        found = await office.find(each.token)
        assert isinstance(found, Session)
        assert found.id == each.session.id
    assert office.registry.kept == 4


async def test_a_refresh_gives_a_new_pair_and_the_old_one_is_dead(office: Office) -> None:
    opened = await office.open()
    again = await office.refresh(opened)
    assert again.session.id == opened.session.id
    assert office.good(again)
    assert office.check(opened.token) is Code.TOKEN_REVOKED
    stored = office.store.registry.record(raw(opened))
    assert stored is not None
    assert stored.token_digest == digest_of(again.token)
    assert office.ended == []


async def test_the_same_refresh_token_gives_the_same_pair_for_a_while(office: Office) -> None:
    opened = await office.open()
    first = await office.refresh(opened)
    calls = office.store.calls.count("rotate")
    second = await office.refresh(opened)
    assert (first.token, first.refresh_token) == (second.token, second.refresh_token)
    assert office.store.calls.count("rotate") == calls


@pytest.mark.parametrize("is_shared", [False, True])
async def test_a_spent_refresh_token_ends_the_session_and_is_told(
    begin: Begin, log: list[dict[str, Any]], is_shared: bool
) -> None:
    office = await begin(shared=is_shared)
    opened = await office.open()
    again = await office.refresh(opened)
    office.clock.advance(60)
    await refused(office.refresh(opened), TokenRevoked)
    assert office.check(again.token) is Code.TOKEN_REVOKED
    assert office.ended == [(opened.session.id, Code.TOKEN_REVOKED, "refresh token reused")]
    assert office.registry.refresh_reused == 1
    (line,) = [line for line in log if line["event"] == "session.refresh_reused"]
    assert (line["session"], line["peer"]) == (opened.session.id, ADDRESS)
    await refused(office.refresh(again), TokenRevoked)
    assert office.store.registry.kept == 0


@pytest.mark.parametrize("token", [b"x" * 32, b"", b"x" * 31])
async def test_an_unknown_refresh_token_is_refused(office: Office, token: bytes) -> None:
    await refused(office.sessions.refresh(token, client=CLIENT, address=ADDRESS), Unauthenticated)


async def test_a_refresh_after_its_life_is_refused(office: Office) -> None:
    opened = await office.open()
    office.clock.advance(31 * DAY_MS / 1000)
    await refused(office.refresh(opened), TokenExpired)
    assert office.registry.kept == 0


async def test_refreshes_of_one_session_are_joined(office: Office) -> None:
    opened = await office.open()
    pairs = await asyncio.gather(*(office.refresh(opened) for _ in range(20)))
    assert len({pair.token for pair in pairs}) == 1
    assert office.store.calls.count("rotate") == 1
    assert office.good(pairs[0])
    assert office.sessions._refreshing == {}


async def test_a_thief_who_comes_at_the_same_moment_ends_the_session(office: Office) -> None:
    opened = await office.open()
    outcomes = await asyncio.gather(
        office.refresh(opened), office.refresh(opened, address="203.0.113.9"), return_exceptions=True
    )
    assert isinstance(outcomes[1], TokenRevoked)
    assert office.store.registry.kept == 0


async def test_a_session_of_another_process_is_refreshed_here(begin: Begin) -> None:
    one = await begin(shared=True)
    other = await begin(one.store)
    opened = await one.open()
    again = await other.refresh(opened)
    assert other.good(again)
    assert await other.find(opened.token) is Code.TOKEN_REVOKED


# --- ending -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_shared", [False, True])
async def test_what_is_revoked_ends_here_at_once_and_in_the_store(begin: Begin, is_shared: bool) -> None:
    office = await begin(shared=is_shared)
    opened, kept = await office.open(), await office.open()
    office.store.gate = asyncio.Event()
    revoking = asyncio.ensure_future(office.revoke(opened))
    await asyncio.sleep(0)
    assert office.ended == [(opened.session.id, Code.TOKEN_REVOKED, "asked for")]
    assert not revoking.done()
    office.store.gate.set()
    assert await revoking
    assert office.store.registry.record(raw(opened)) is None
    assert office.store.registry.record(raw(kept)) is not None
    assert not await office.revoke(opened)


async def test_revoking_is_quiet_only_while_sessions_end(office: Office) -> None:
    seen: list[str] = []

    @contextmanager
    def quietly() -> Any:
        seen.append("quiet")
        yield
        seen.append("loud")

    office.registry.observers.append(lambda *told: seen.append("ended"))
    office.store.gate = asyncio.Event()
    opened, user = await_both(office), "ada"
    office.store.gate.set()
    session = await opened
    office.store.gate = asyncio.Event()
    revoking = asyncio.ensure_future(office.sessions.revoke_user(user, "all", quietly()))
    await asyncio.sleep(0)
    assert seen == ["quiet", "ended", "loud"]
    office.store.gate.set()
    assert await revoking == 1
    assert not office.good(session)


def await_both(office: Office) -> asyncio.Future[OpenedSession]:
    return asyncio.ensure_future(office.open())


async def test_a_session_of_somebody_else_is_not_revoked(office: Office) -> None:
    opened = await office.open()
    calls = list(office.store.calls)
    assert not await office.revoke(opened, "eve")
    assert not await office.sessions.revoke("no id", user="eve", reason="")
    assert not await office.sessions.revoke("A" * 22, user="eve", reason="")
    assert office.good(opened)
    assert office.store.calls == calls
    assert await office.revoke(opened, None)


async def test_a_session_known_elsewhere_is_revoked_by_its_user_alone(begin: Begin) -> None:
    one = await begin(shared=True)
    other = await begin(one.store)
    opened = await one.open()
    assert not await other.revoke(opened, "eve")
    assert await other.revoke(opened, "ada")
    assert not await other.revoke(opened, "ada")
    assert one.store.registry.record(raw(opened)) is None


async def test_all_of_a_user_end(begin: Begin) -> None:
    one = await begin(shared=True)
    other = await begin(one.store)
    mine = [await one.open(), await one.open(), await other.open()]
    bob = await one.open("bob")
    assert await one.sessions.revoke_user("ada", "all") == 3
    assert [one.good(each) for each in mine] == [False] * 3
    assert await one.find(mine[2].token) is Code.TOKEN_REVOKED
    assert one.good(bob)
    assert one.store.registry.kept == 1


@pytest.mark.parametrize("is_shared", [False, True])
async def test_what_is_bound_to_a_key_ends(begin: Begin, is_shared: bool) -> None:
    one = await begin(shared=is_shared)
    other = await begin(one.store) if is_shared else one
    phone = [await one.open(key="device:phone"), await other.open(key="device:phone")]
    kept = [await one.open(key="device:other"), await one.open(), await one.open("bob", key="device:phone")]
    assert await one.sessions.revoke_key("ada", "device:phone", "removed") == 2
    assert not one.good(phone[0])
    assert [await one.find(each.token) for each in phone] == [Code.TOKEN_REVOKED] * 2
    assert all(one.good(each) for each in kept)
    assert one.store.registry.kept == 3
    assert await one.sessions.revoke_key("ada", "device:phone", "removed") == 0


async def test_what_is_bound_to_a_key_ends_during_an_outage_as_far_as_it_is_known(begin: Begin) -> None:
    one = await begin(shared=True)
    other = await begin(FaultyStoreView(one.store))
    known, unknown = await one.open(key="device:phone"), await other.open(key="device:phone")
    await one.outage()
    await refused(one.sessions.revoke_key("ada", "device:phone", "removed"))
    assert not one.good(known)
    await one.recover()
    assert one.store.registry.records("ada", 9) == [one.store.registry.record(raw(unknown))]


@pytest.mark.parametrize("is_shared", [False, True])
async def test_whose_a_refresh_token_is(begin: Begin, is_shared: bool) -> None:
    one = await begin(shared=is_shared)
    other = await begin(FaultyStoreView(one.store)) if is_shared else one
    opened = await one.open()
    assert opened.refresh_token is not None
    record = await other.sessions.find_by_refresh_token(opened.refresh_token)
    assert record is not None
    assert record.id == raw(opened)
    await one.refresh(opened)
    assert await other.sessions.find_by_refresh_token(opened.refresh_token) is not None
    assert await other.sessions.find_by_refresh_token(b"x" * 32) is None
    await one.revoke(opened)
    assert await other.sessions.find_by_refresh_token(opened.refresh_token) is None
    if is_shared:
        await other.outage()
        await refused(other.sessions.find_by_refresh_token(opened.refresh_token))


async def test_everything_ends(office: Office) -> None:
    opened = [await office.open(user) for user in ("ada", "bob")]
    assert await office.sessions.revoke_all("all") == 2
    assert [office.check(each.token) for each in opened] == [Code.TOKEN_REVOKED] * 2
    assert office.store.registry.kept == 0


async def test_a_session_closes(office: Office) -> None:
    opened = await office.open()
    await office.sessions.close(opened.session)
    assert office.check(opened.token) is Code.TOKEN_REVOKED
    assert office.store.registry.kept == 0
    await office.sessions.close(opened.session)


async def test_a_session_that_is_revoked_before_it_is_told_of_is_not_told_of(office: Office) -> None:
    office.sync.breaker.timeout = 30.0  # for a slow machine
    office.store.late["create"] = asyncio.Event()
    opening = asyncio.ensure_future(office.open())
    while not office.store.registry.kept:  # noqa: ASYNC110 - the store knows no events
        await asyncio.sleep(0)
    assert await office.sessions.revoke_user("ada", "all") == 1
    office.store.late["create"].set()
    await refused(opening, TokenRevoked)
    assert office.store.registry.kept == office.registry.kept == 0


async def test_a_session_that_is_revoked_while_it_is_refreshed_is_not_brought_back(office: Office) -> None:
    opened = await office.open()
    office.sync.breaker.timeout = 30.0  # for a slow machine
    office.store.late["rotate"] = asyncio.Event()
    refreshing = asyncio.ensure_future(office.refresh(opened))
    while office.store.registry.refresh_reused + office.store.calls.count("rotate") < 1:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert await office.revoke(opened)
    office.store.late["rotate"].set()
    await refused(refreshing, TokenRevoked)
    assert office.store.registry.kept == office.registry.kept == 0


@pytest.mark.parametrize("work", ["create", "rotate"])
@pytest.mark.parametrize("how", ["ended", "replaced", "unchanged"])
async def test_what_another_process_does_meanwhile_counts(begin: Begin, work: str, how: str) -> None:
    one = await begin(shared=True)
    other = await begin(FaultyStoreView(one.store))
    opened = await other.open("bob") if work == "rotate" else None
    other.store.late[work] = asyncio.Event()
    waiting = asyncio.ensure_future(other.open() if opened is None else other.refresh(opened))
    while work not in other.store.calls:  # noqa: ASYNC110
        await asyncio.sleep(0)
    user = "ada" if opened is None else "bob"
    (record,) = one.store.registry.records(user, 10)
    if how == "ended":
        await one.sessions.revoke_user(user, "all")
    elif how == "replaced":
        one.store.registry.restore(replace(record, token_digest=bytes(32)))
    other.store.tell(record.id)
    other.store.late[work].set()
    if how == "unchanged":
        assert other.good(await waiting)
    elif how == "replaced" and work == "create":
        assert not other.good(await waiting)
    else:
        await refused(waiting, TokenRevoked)
    assert one.store.registry.kept == (0 if how == "ended" else 1)


# --- callers that go ---------------------------------------------------------------------------------------


async def cancelled(work: asyncio.Future[Any]) -> None:
    await asyncio.sleep(0)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work


async def test_a_session_whose_opener_is_gone_is_ended_again(office: Office) -> None:
    office.store.gate = asyncio.Event()
    await cancelled(asyncio.ensure_future(office.open()))
    office.store.gate.set()
    await office.settle()
    assert office.store.calls == ["open", "create", "end"]
    assert office.store.registry.kept == office.registry.kept == 0


async def test_an_opener_that_is_gone_before_it_failed_leaves_nothing(office: Office) -> None:
    office.store.gate = asyncio.Event()
    await cancelled(asyncio.ensure_future(office.open()))
    office.store.mode = FAILS
    office.store.gate.set()
    await office.settle()
    assert office.registry.kept == 0


async def test_a_refresh_whose_caller_is_gone_is_done_and_can_be_repeated(office: Office) -> None:
    opened = await office.open()
    office.store.gate = asyncio.Event()
    await cancelled(asyncio.ensure_future(office.refresh(opened)))
    office.store.gate.set()
    await office.settle()
    again = await office.refresh(opened)
    assert office.good(again)
    assert office.store.calls.count("rotate") == 1


async def test_a_revocation_whose_caller_is_gone_is_done(office: Office) -> None:
    opened = await office.open()
    office.store.gate = asyncio.Event()
    await cancelled(asyncio.ensure_future(office.revoke(opened)))
    office.store.gate.set()
    await office.settle()
    assert office.store.registry.kept == 0


# --- the start ---------------------------------------------------------------------------------------------


async def test_what_the_store_has_is_loaded_in_pieces(begin: Begin, log: list[dict[str, Any]]) -> None:
    one = await begin(per_user=2_000)
    opened = [await one.open() for _ in range(1_100)]
    other = await begin(one.store, per_user=2_000)
    assert all(other.good(each) for each in opened)
    assert [line["sessions"] for line in log if line["event"] == "sessions.loaded"] == [0, 1_100]
    assert one.store.calls.count("load") == 2


async def test_more_than_there_is_room_for_is_told(begin: Begin, log: list[dict[str, Any]]) -> None:
    one = await begin()
    for _ in range(3):
        await one.open()
    other = await begin(one.store, max_sessions=2)
    assert other.registry.kept == 2
    assert [line["sessions"] for line in log if line["event"] == "sessions.left_out"] == [1]


@pytest.mark.parametrize("mode", [FAILS, HANGS])
@pytest.mark.parametrize("is_shared", [False, True])
async def test_a_store_that_is_out_at_the_start_is_waited_for_with_every_token_refused(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, mode: str, is_shared: bool
) -> None:
    monkeypatch.setattr(sync_module, "OPEN_LIMIT_S", TIMEOUT)
    one = await begin(shared=is_shared)
    opened = await one.open()
    one.store.mode = mode
    other = await begin(one.store)
    assert await other.find(opened.token) is Code.UNAVAILABLE
    assert await other.find(b"x" * 32) is Code.UNAVAILABLE
    error = await refused(other.open())
    assert error.details["retry_after_ms"] > 0
    await other.advance(MAX_DELAY_S)
    assert await other.find(opened.token) is Code.UNAVAILABLE
    await other.recover()
    found = await other.find(opened.token)
    assert isinstance(found, Session)
    assert found.id == opened.session.id
    assert await other.find(b"x" * 32) is Code.UNAUTHENTICATED


async def test_loading_that_fails_half_way_is_done_anew(begin: Begin) -> None:
    one = await begin()
    opened = [await one.open() for _ in range(3)]
    one.store.modes["load"] = FAILS
    other = await begin(one.store)
    assert other.check(opened[0].token) is Code.UNAVAILABLE
    await other.recover()
    assert all(other.good(each) for each in opened)


async def test_what_no_waiting_can_mend_stops_the_start(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    office = await begin(starts=False)

    async def open_(on_change: object) -> None:
        raise ConfigError(["store.url: no such database"])

    monkeypatch.setattr(office.store, "open", open_)
    with pytest.raises(ConfigError, match="no such database"):
        await office.sync.start()
    assert office.store.closed == 1


async def test_a_file_of_revocations_that_cannot_be_read_stops_the_start(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    office = await begin(starts=False)

    async def open_() -> None:
        raise StoreUnavailable("the disk did not answer within 30000 ms")

    monkeypatch.setattr(office.pending, "open", open_)
    with pytest.raises(ConfigError, match="pending revocations cannot be read: the disk did not answer"):
        await office.sync.start()


async def test_a_damaged_file_of_revocations_is_told(
    begin: Begin, log: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "revocations.pending").write_bytes(b"damage\n")
    await begin()
    (line,) = [line for line in log if line["event"] == "revocations.damaged"]
    assert line["copy"].endswith("revocations.pending.damaged-1")


# --- an outage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [FAILS, HANGS, FAILS_AFTER, HANGS_AFTER, READ_ONLY])
@pytest.mark.parametrize("is_shared", [False, True])
async def test_known_sessions_go_on_and_the_rest_waits(
    begin: Begin, log: list[dict[str, Any]], mode: str, is_shared: bool
) -> None:
    office = await begin(shared=is_shared)
    known = [await office.open() for _ in range(3)]
    for each in known:
        office.use(each)
    office.store.mode = mode
    for _ in range(3):
        error = await refused(office.open())
        assert error.details["retry_after_ms"] >= 100
    assert office.state is State.DEGRADED
    calls = list(office.store.calls)
    for _ in range(10):  # nobody waits again and again
        await refused(office.open())
        await refused(office.refresh(known[0]))
        assert all(office.good(each) for each in known)
    assert office.store.calls == calls
    await office.recover()
    assert office.good(await office.open("bob"))
    assert office.good(await office.refresh(known[0]))
    assert all(office.good(each) for each in known[1:])
    assert office.ended == []
    told = [event for event in events(log) if event.startswith("store.")]
    assert told == ["store.degraded", "store.recovered"]
    # What may have been created without anybody knowing is ended, and counts against no limit.
    assert office.store.registry.kept == office.registry.kept == 4


async def test_one_that_hangs_costs_its_timeout_once(office: Office) -> None:
    office.store.mode = HANGS
    outcomes = await asyncio.gather(*(office.open(f"u{n}") for n in range(50)), return_exceptions=True)
    assert all(isinstance(outcome, Unavailable) for outcome in outcomes)
    asked = office.store.calls.count("create")
    await refused(office.open())
    assert office.store.calls.count("create") == asked  # it is not even begun
    assert office.sync.health.outages == 1


async def test_after_the_grace_every_token_is_refused_until_it_is_over(
    office: Office, log: list[dict[str, Any]]
) -> None:
    opened = await office.open()
    await office.outage()
    await office.advance(GRACE - 1)
    assert office.good(opened)
    await office.advance(1.5)
    assert office.check(opened.token) is Code.UNAVAILABLE
    assert office.check(b"x" * 32) is Code.UNAVAILABLE
    assert office.ended == []
    assert office.sessions.statistics()["refusing"]
    await office.recover()
    assert office.good(opened)
    told = [event for event in events(log) if event.startswith("store.")]
    assert told == ["store.degraded", "store.grace_over", "store.recovered"]


async def test_a_wall_clock_that_jumps_does_not_end_the_grace(begin: Begin) -> None:
    office = await begin(idle_timeout_ms=None)
    opened = await office.open()
    await office.outage()
    office.clock.wall_ms += 10 * HOUR_MS
    await office.advance(10)
    assert office.good(opened)
    office.clock.wall_ms -= 20 * HOUR_MS
    await office.advance(GRACE - 11)
    assert office.good(opened)
    await office.advance(2)
    assert office.check(opened.token) is Code.UNAVAILABLE


async def test_without_grace_all_are_refused_from_the_first_moment(begin: Begin) -> None:
    office = await begin(grace=0.0)
    opened = await office.open()
    await office.outage()
    assert office.check(opened.token) is Code.UNAVAILABLE
    await office.recover()
    assert office.good(opened)


async def test_a_refresh_of_which_nobody_knows_is_asked_for_again_as_it_was(office: Office) -> None:
    for mode in (HANGS_AFTER, FAILS_AFTER, HANGS, FAILS):
        opened = await office.open(mode)
        office.store.mode = mode
        await refused(office.refresh(opened))
        await office.outage(mode)
        await office.recover()
        again = await office.refresh(opened)
        assert office.good(again), mode
        assert not office.good(opened)
        office.clock.advance(60)
        assert office.good(await office.refresh(again)), mode
    assert office.registry.refresh_reused == 0
    assert not office.sessions._undecided


async def test_a_repeated_refresh_may_come_from_another_address(office: Office) -> None:
    opened = await office.open()
    office.store.modes["rotate"] = FAILS
    await refused(office.refresh(opened))
    office.store.modes.clear()
    again = await office.refresh(opened, address="203.0.113.9")
    assert office.good(again)
    record = office.store.registry.record(raw(opened))
    assert record is not None
    assert record.address == "203.0.113.9"


async def test_undecided_refreshes_are_bounded(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions_module, "UNDECIDED", 2)
    office.store.modes["rotate"] = FAILS
    for number in range(4):
        opened = await office.open(f"u{number}")
        await refused(office.refresh(opened))
        await office.advance(20)  # no outage
    assert len(office.sessions._undecided) == 2


async def test_the_grace_for_a_lost_answer_needs_no_store(office: Office) -> None:
    opened = await office.open()
    first = await office.refresh(opened)
    await office.outage()
    assert (await office.refresh(opened)).token == first.token


async def test_orphans_are_ended_without_an_outage_too(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revoker_module, "ORPHANS", 1)
    office.store.modes["create"] = FAILS_AFTER
    await refused(office.open())
    await refused(office.open())
    assert office.state is State.HEALTHY
    assert office.store.registry.kept == 2
    office.store.modes.clear()
    await office.sync.clean()
    assert office.store.registry.kept == 1  # the oldest was one too many to remember


# --- revocations during an outage ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [FAILS, HANGS, READ_ONLY, FAILS_AFTER, HANGS_AFTER])
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("known", [False, True], ids=["the first to notice", "known to be out"])
async def test_revocations_made_meanwhile_hold_afterwards(
    begin: Begin, mode: str, is_shared: bool, known: bool
) -> None:
    office = await begin(shared=is_shared, per_user=100)
    one, kept = await office.open("ada"), await office.open("ada")
    bobs = [await office.open("bob") for _ in range(3)]
    office.use(kept)
    office.store.mode = mode
    if known:
        await office.outage(mode)
    assert await office.revoke(one)
    assert await office.sessions.revoke_user("bob", "all") == 3
    assert office.state is State.DEGRADED
    assert office.check(one.token) is Code.TOKEN_REVOKED
    assert len(office.pending) == 2
    await office.recover()
    assert len(office.pending) == 0
    assert office.store.registry.records(None, 100) == [office.store.registry.record(raw(kept))]
    assert office.good(kept)
    assert not any(office.good(each) for each in [one, *bobs])


async def test_they_hold_after_a_crash_before_a_token_is_accepted(begin: Begin, tmp_path: Path) -> None:
    one = await begin()
    gone, kept = await one.open(), await one.open("bob")
    await one.outage()
    await one.revoke(gone)
    await one.pending.close()  # the lock of a process that is gone
    other = await begin(one.store)
    assert other.check(kept.token) is Code.UNAVAILABLE
    one.store.mode = WORKS
    one.store.gate = asyncio.Event()
    other.clock.advance(MAX_DELAY_S)
    other.timers.advance(MAX_DELAY_S)
    for _ in range(20):
        await asyncio.sleep(0)
    assert other.check(gone.token) is other.check(kept.token) is Code.UNAVAILABLE
    one.store.gate.set()
    await other.settle()
    assert not other.good(gone)
    assert other.good(kept)
    assert one.store.registry.record(raw(gone)) is None


async def test_they_come_before_anything_is_loaded(begin: Begin) -> None:
    one = await begin()
    gone = await one.open()
    await one.outage()
    await one.revoke(gone)
    await one.pending.close()
    one.store.mode = WORKS
    one.store.calls.clear()
    await begin(one.store)
    assert one.store.calls == ["open", "end"]


async def test_all_sessions_end_during_an_outage(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revoker_module, "MAX_ENDED", 7)
    office = await begin(per_user=100)
    opened = [await office.open(f"u{n % 3}") for n in range(30)]
    await office.outage()
    assert await office.sessions.revoke_all("all") == 30
    await office.recover()
    assert office.store.registry.kept == 0
    assert not any(office.good(each) for each in opened)


async def test_more_than_can_be_listed_end_too(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.stores import memory_store as memory

    monkeypatch.setattr(revoker_module, "MAX_LISTED", 10)
    monkeypatch.setattr(memory, "MAX_LISTED", 10)
    office = await begin(per_user=100)
    for number in range(25):
        await office.open(f"u{number}")
    await office.outage()
    await office.sessions.revoke_all("all")
    await office.recover()
    assert office.store.registry.kept == 0


async def test_who_logs_in_elsewhere_after_a_revocation_is_not_ended_by_it(begin: Begin) -> None:
    one = await begin(shared=True)
    other = await begin(FaultyStoreView(one.store))
    await one.open()
    await one.outage()
    await one.sessions.revoke_user("ada", "all")
    one.clock.advance(revoker_module.CLOCK_SKEW_MS / 1000 + 1)
    new = await other.open()
    await one.recover()
    assert other.good(new)
    assert one.store.registry.kept == 1


class FaultyStoreView(FaultyStore):
    """The same store as another process reaches it: with faults of its own."""

    def __init__(self, store: FaultyStore) -> None:
        super().__init__(store.registry, shared=store.shared)
        self._inner = store._inner


async def test_what_changes_while_others_are_asked_for_is_asked_for_again(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await begin(shared=True)
    other = await begin(FaultyStoreView(one.store))
    first, second = await one.open(), await one.open()
    for each in (first, second):
        await other.find(each.token)
        other.use(each)
    get, held = other.store.get, asyncio.Event()

    async def slow(id: bytes) -> SessionRecord | EndedRecord | None:
        found = await get(id)
        if id == raw(second):
            await held.wait()
        return found

    monkeypatch.setattr(other.store, "get", slow)
    for each in (first, second):
        other.store.tell(raw(each))
    while other.store.calls.count("get") < 2:  # noqa: ASYNC110 - a list of calls tells nobody
        await asyncio.sleep(0)
    await one.revoke(first)
    other.store.tell(raw(first))  # what was said of it is old now, and the other's answer is still to come
    held.set()
    await other.settle()
    assert (other.good(first), other.good(second)) == (False, True)


async def test_a_clock_that_is_set_back_spares_nobody(office: Office) -> None:
    opened = await office.open()
    await office.outage()
    office.clock.wall_ms -= HOUR_MS
    await office.sessions.revoke_user("ada", "all")
    await office.recover()
    assert office.store.registry.kept == 0
    assert not office.good(opened)


async def test_one_that_cannot_be_kept_is_never_lost_silently(
    begin: Begin, log: list[dict[str, Any]]
) -> None:
    office = await begin(pending_limit=1)
    first, second = await office.open(), await office.open()
    await office.outage()
    assert await office.revoke(first)
    await refused(office.revoke(second))
    assert not office.good(second)  # it ended here all the same
    assert "revocations.not_kept" in events(log)
    await office.recover()
    assert not office.good(second)
    assert office.store.registry.kept == 0


async def test_all_of_a_key_end_though_one_of_them_cannot_be_kept(begin: Begin) -> None:
    office = await begin(pending_limit=1)
    opened = [await office.open(key="device:phone") for _ in range(3)]
    await office.outage()
    await refused(office.sessions.revoke_key("ada", "device:phone", "removed"))
    assert not any(office.good(each) for each in opened)
    await office.recover()
    assert office.store.registry.kept == 0


async def test_who_asks_again_for_one_that_was_not_promised_is_promised_it(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = await office.open()
    await office.outage()

    async def add(revocation: Revocation, within: float) -> None:
        office.pending._entries[revocation.key] = revocation
        raise StoreUnavailable("the disk did not answer")

    with monkeypatch.context() as patch:
        patch.setattr(office.pending, "add", add)
        await refused(office.revoke(opened))
        await refused(office.revoke(opened))
    assert not await office.revoke(opened, "eve")
    assert await office.revoke(opened)
    await office.recover()
    assert office.store.registry.kept == 0
    assert not await office.revoke(opened)


async def test_a_file_that_cannot_be_emptied_harms_nobody(
    office: Office, log: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = await office.open()
    await office.outage()
    await office.revoke(opened)

    async def ask(work: object, within: float) -> None:
        raise StoreUnavailable("the disk did not answer")

    monkeypatch.setattr(office.pending, "_submit", ask)
    await office.recover()
    assert "revocations.not_removed" in events(log)
    assert office.good(await office.open())


async def test_a_revocation_during_the_recovery_waits_for_its_end(office: Office) -> None:
    first, second = await office.open(), await office.open()
    await office.outage()
    await office.revoke(first)
    office.sync.breaker.timeout = 30.0  # for a slow machine
    office.store.mode = WORKS
    office.store.gate = asyncio.Event()
    office.clock.advance(MAX_DELAY_S)
    office.timers.advance(MAX_DELAY_S)
    assert office.state is State.RECOVERING
    assert await office.revoke(second)
    office.store.gate.set()
    await office.settle()
    assert office.state is State.HEALTHY
    assert len(office.pending) == 0
    assert office.store.registry.kept == 0


async def test_unknown_sessions_cannot_be_revoked_while_nobody_can_tell_whose_they_are(begin: Begin) -> None:
    one = await begin(shared=True)
    other = await begin(FaultyStoreView(one.store))
    opened = await one.open()
    await other.outage()
    await refused(other.revoke(opened))
    assert len(other.pending) == 0
    await other.recover()
    assert await other.revoke(opened)


# --- tokens that are not known here -------------------------------------------------------------------------


async def test_a_token_of_another_process_is_found(begin: Begin) -> None:
    one = await begin(shared=True)
    other = await begin(one.store)
    opened = await one.open(key="device:phone")
    found = await other.find(opened.token)
    assert isinstance(found, Session)
    assert (found.id, found.user, found.bound) == (opened.session.id, "ada", True)
    assert other.sessions.statistics()["lookups"] == 1
    assert isinstance(await other.find(opened.token), Session)
    assert other.store.calls.count("find") == 1


async def test_a_local_store_is_not_asked_for_tokens(office: Office) -> None:
    assert not office.sessions.is_shared
    assert await office.find(b"x" * 32) is Code.UNAUTHENTICATED
    assert "find" not in office.store.calls


async def test_a_token_is_looked_up_once_at_a_time(begin: Begin) -> None:
    one = await begin(shared=True)
    other = await begin(one.store)
    opened = await one.open()
    found = await asyncio.gather(*(other.find(opened.token) for _ in range(50)))
    assert all(isinstance(each, Session) for each in found)
    assert other.store.calls.count("find") == 1
    assert other.sessions._finding == {}


async def test_an_unknown_token_is_not_looked_up_again_for_a_while(
    shared: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions_module, "UNKNOWN_TOKENS", 3)
    for _ in range(10):
        assert await shared.find(b"x" * 32) is Code.UNAUTHENTICATED
    assert shared.store.calls.count("find") == 1
    shared.clock.advance(UNKNOWN_TOKEN_S)
    assert await shared.find(b"x" * 32) is Code.UNAUTHENTICATED
    assert shared.store.calls.count("find") == 2
    for number in range(10):
        await shared.find(number.to_bytes(32, "big"))
    assert len(shared.sessions._unknown) == 3


async def test_an_address_with_many_unknown_tokens_has_to_wait(
    shared: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions_module, "ADDRESSES", 2)
    opened = await shared.open()
    shared.registry.forget(raw(opened))
    numbers = itertools.count()
    for _ in range(MISSES_PER_ADDRESS):
        await shared.find(next(numbers).to_bytes(32, "big"))
    error = await refused(shared.find(next(numbers).to_bytes(32, "big")), ResourceExhausted)
    assert 0 < error.details["retry_after_ms"] <= MISSES_S * 1000 + 1
    assert isinstance(await shared.find(opened.token, "192.0.2.8"), Session)
    await shared.find(next(numbers).to_bytes(32, "big"), "192.0.2.8")
    shared.clock.advance(MISSES_S)
    await shared.find(next(numbers).to_bytes(32, "big"))
    await shared.find(next(numbers).to_bytes(32, "big"), "192.0.2.9")
    assert len(shared.sessions._missed) == 2


async def test_a_network_of_ipv6_counts_as_one_address(shared: Office) -> None:
    for number in range(MISSES_PER_ADDRESS):
        await shared.find(number.to_bytes(32, "big"), f"2001:db8::{number + 1:x}")
    await refused(shared.find(b"x" * 32, "2001:db8::ffff"), ResourceExhausted)
    assert await shared.find(b"x" * 32, "2001:db8:0:1::1") is Code.UNAUTHENTICATED


async def test_only_so_many_are_looked_up_at_once(shared: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions_module, "MAX_LOOKUPS", 2)
    shared.store.gate = asyncio.Event()
    finding = [asyncio.ensure_future(shared.find(bytes([n]) * 32)) for n in range(2)]
    await asyncio.sleep(0)
    error = await refused(shared.find(b"x" * 32), ResourceExhausted)
    assert error.details == {"retry_after_ms": 100}
    shared.store.gate.set()
    assert await asyncio.gather(*finding) == [Code.UNAUTHENTICATED] * 2


@pytest.mark.parametrize("mode", [FAILS, HANGS])
async def test_a_token_that_nobody_can_look_up_is_neither_good_nor_bad(begin: Begin, mode: str) -> None:
    one = await begin(shared=True)
    other = await begin(FaultyStoreView(one.store))
    opened = await one.open()
    other.store.mode = mode
    await refused(other.find(opened.token))
    await other.outage(mode)
    error = await refused(other.find(opened.token))
    assert error.details["retry_after_ms"] >= 100
    await other.recover()
    assert isinstance(await other.find(opened.token), Session)


async def test_a_token_that_was_revoked_elsewhere_says_so(begin: Begin) -> None:
    one = await begin(shared=True, per_user=1, when_full="evict_oldest")
    other = await begin(one.store)
    first = await one.open()
    second = await one.open()
    await one.revoke(second)
    assert await other.find(first.token) is Code.SESSION_REPLACED
    assert await other.find(second.token) is Code.TOKEN_REVOKED


async def test_a_token_that_expired_is_looked_up_as_it_may_have_been_used_elsewhere(begin: Begin) -> None:
    one = await begin(shared=True)
    other = await begin(one.store)
    opened = await one.open()
    assert isinstance(await other.find(opened.token), Session)
    for _ in range(2):
        one.clock.advance(0.75 * HOUR_MS / 1000)
        assert one.good(opened)
    await one.sync.write_uses()
    assert isinstance(await other.find(opened.token), Session)
    one.clock.advance(2 * HOUR_MS / 1000)
    assert await other.find(opened.token) is Code.TOKEN_EXPIRED
    assert await other.find(opened.token) is Code.TOKEN_EXPIRED
    finds = other.store.calls.count("find")
    one.clock.advance(DAY_MS / 1000)
    assert await other.find(opened.token) is Code.TOKEN_EXPIRED  # by its absolute limit, for certain
    assert other.store.calls.count("find") == finds


async def test_a_token_that_expired_is_expired_while_nobody_can_tell_better(shared: Office) -> None:
    opened = await shared.open()
    await shared.outage()
    shared.clock.advance(HOUR_MS / 1000)
    assert await shared.find(opened.token) is Code.TOKEN_EXPIRED


async def test_a_token_that_is_refused_for_another_reason_is_not_looked_up(shared: Office) -> None:
    opened = await shared.open()
    await shared.sessions.look_up(
        opened.token, ADDRESS, Code.UNAUTHENTICATED
    )  # known, but not from this address
    assert "find" not in shared.store.calls


# --- what others do -----------------------------------------------------------------------------------------


async def test_a_session_that_is_not_in_use_is_forgotten_when_another_changes_it(begin: Begin) -> None:
    one = await begin(shared=True)
    other = await begin(FaultyStoreView(one.store))
    opened = await one.open()
    await other.find(opened.token)
    await one.revoke(opened)
    other.store.tell(raw(opened))
    assert other.check(opened.token) is Code.UNAUTHENTICATED
    assert await other.find(opened.token) is Code.TOKEN_REVOKED
    other.store.tell(b"?" * 16)


@pytest.mark.parametrize("memory", [True, False])
async def test_a_session_in_use_that_another_ends_is_told_of(begin: Begin, memory: bool) -> None:
    one = await begin(shared=True)
    other = await begin(FaultyStoreView(one.store))
    opened, kept = await one.open(), await one.open()
    for each in (opened, kept):
        await other.find(each.token)
        other.use(each)
    await one.revoke(opened)
    if not memory:
        other.store.lose_all()
        kept_record = one.registry.record(raw(kept))
        assert kept_record is not None
        other.store.registry.restore(kept_record)
    other.store.tell(raw(opened))
    assert other.good(opened)
    await other.settle()
    reason = "revoked" if memory else "ended elsewhere"
    assert other.ended == [(opened.session.id, Code.TOKEN_REVOKED, reason)]
    assert not other.good(opened)
    assert other.good(kept)


async def test_a_session_in_use_that_another_replaced_is_told_of(begin: Begin) -> None:
    one = await begin(shared=True, per_user=1, when_full="evict_oldest")
    other = await begin(FaultyStoreView(one.store))
    opened = await one.open()
    await other.find(opened.token)
    other.use(opened)
    await one.open()
    other.store.tell(raw(opened))
    await other.settle()
    assert other.ended == [(opened.session.id, Code.SESSION_REPLACED, "replaced by a newer session")]


async def test_a_session_in_use_that_another_refreshed_goes_on_with_its_new_token(begin: Begin) -> None:
    one = await begin(shared=True)
    other = await begin(FaultyStoreView(one.store))
    opened = await one.open()
    await other.find(opened.token)
    other.use(opened)
    again = await one.refresh(opened)
    other.store.tell(raw(opened))
    await other.settle()
    assert other.good(again)
    assert await other.find(opened.token) is Code.TOKEN_REVOKED
    assert other.ended == []


async def test_a_question_that_fails_is_asked_again(begin: Begin) -> None:
    one = await begin(shared=True)
    other = await begin(FaultyStoreView(one.store))
    opened = await one.open()
    await other.find(opened.token)
    other.use(opened)
    await one.revoke(opened)
    other.store.modes["get"] = FAILS
    other.store.tell(raw(opened))
    while "get" not in other.store.calls:  # noqa: ASYNC110
        await asyncio.sleep(0)
    other.store.modes.clear()
    await other.settle()
    assert not other.good(opened)


async def test_what_changes_during_an_outage_is_found_out_after_it(begin: Begin) -> None:
    one = await begin(shared=True)
    other = await begin(FaultyStoreView(one.store))
    used, idle, kept = await one.open(), await one.open(), await one.open()
    for each in (used, idle, kept):
        await other.find(each.token)
    other.use(used)
    other.use(kept)
    await other.outage()
    await one.revoke(used)
    await one.revoke(idle)
    other.store.tell(raw(used))
    other.store.tell_all()
    await other.settle()
    assert other.good(used)  # nobody can tell
    await other.recover()
    assert [other.good(each) for each in (used, idle, kept)] == [False, False, True]
    assert await other.find(idle.token) is Code.TOKEN_REVOKED


async def test_when_anything_may_have_changed_only_what_is_in_use_is_asked_for(begin: Begin) -> None:
    one = await begin(shared=True, per_user=1_000)
    other = await begin(FaultyStoreView(one.store), per_user=1_000)
    opened = [await one.open() for _ in range(300)]
    for number, each in enumerate(opened):
        await other.find(each.token)
        if number % 2:
            other.use(each)
    for each in opened[:10]:
        await one.revoke(each)
    other.store.calls.clear()
    other.store.tell_all()
    await other.settle()
    assert other.store.calls == ["get"] * 150
    assert other.registry.kept == 145
    assert len(other.ended) == 5
    for number, each in enumerate(opened):
        found = await other.find(each.token)
        assert (found is Code.TOKEN_REVOKED) if number < 10 else isinstance(found, Session)


@pytest.mark.parametrize("all_of_them", [True, False])
async def test_a_session_that_ends_elsewhere_while_it_is_looked_up_does_not_come_in(
    begin: Begin, all_of_them: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes_module, "CHANGES", 2)
    one = await begin(shared=True)
    other = await begin(FaultyStoreView(one.store))
    opened = await one.open()
    find = other.store._inner.find

    async def late(digest: bytes) -> Any:
        """What was true a moment ago."""
        found = await find(digest)
        other.store._inner = one.store._inner
        await one.revoke(opened)
        if all_of_them:
            other.store.tell_all()
        else:
            other.store.tell(raw(opened))
        return found

    other.store._inner = Late(other.store._inner, late)
    assert await other.find(opened.token) is Code.TOKEN_REVOKED


class Late:
    """A MemoryStore whose `find` is another."""

    def __init__(self, inner: Any, find: Any) -> None:
        self._inner = inner
        self.find = find

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


# --- a store that has lost everything -------------------------------------------------------------------------


@pytest.mark.parametrize("outage", [False, True])
async def test_sessions_are_brought_back_to_a_store_that_was_emptied(begin: Begin, outage: bool) -> None:
    office = await begin(shared=True, per_user=1_000)
    opened = [await office.open() for _ in range(150)]
    for each in opened[::2]:
        office.use(each)
    if outage:
        await office.outage()
        await office.revoke(opened[0])
    office.store.lose_all()
    emptied(office)
    await office.settle()
    if outage:
        await office.recover()
    expected = opened[1:] if outage else opened
    assert all(office.good(each) for each in expected)
    assert office.store.registry.kept == len(expected)
    assert office.ended == ([(opened[0].session.id, Code.TOKEN_REVOKED, "asked for")] if outage else [])
    assert not office.good(opened[0]) or not outage
    for each in expected[:3]:
        assert office.good(await office.refresh(each))


def emptied(office: Office) -> None:
    from zcproto.stores.base import Change, ChangeKind

    office.store.on_change(Change(ChangeKind.EMPTIED))


async def test_after_the_grace_nothing_is_brought_back(begin: Begin) -> None:
    office = await begin(shared=True)
    opened = await office.open()
    office.use(opened)
    await office.outage()
    await office.advance(GRACE + 1)
    office.store.lose_all()
    emptied(office)
    await office.recover()
    assert await office.find(opened.token) is Code.TOKEN_REVOKED
    assert office.store.registry.kept == 0


async def test_what_another_process_brings_back_is_revoked_again(begin: Begin) -> None:
    one = await begin(shared=True)
    other = await begin(FaultyStoreView(one.store))
    before, meanwhile, of_user = await one.open(), await one.open(), await one.open("bob")
    for each in (before, meanwhile, of_user):
        await other.find(each.token)
        other.use(each)
    await one.revoke(before)  # and the other hears nothing of it
    await one.outage()
    await one.revoke(meanwhile)
    one.registry.forget(raw(of_user))
    await one.sessions.revoke_user("bob", "all")
    one.store.lose_all()
    other.store.registry, other.store._inner = one.store.registry, one.store._inner
    emptied(one)
    emptied(other)
    await other.settle()
    await one.recover()
    await one.advance(REPEATS_S[0])
    assert one.store.registry.kept == 0
    other.store.tell_all()
    await other.settle()
    assert not any(other.good(each) for each in (before, meanwhile, of_user))


async def test_what_comes_back_late_is_revoked_again_and_again(begin: Begin) -> None:
    one = await begin(shared=True)
    other = await begin(FaultyStoreView(one.store))
    opened = [await one.open(), await one.open("bob"), await one.open("bob")]
    for each in opened:
        await other.find(each.token)
        other.use(each)
    await one.outage()
    await one.revoke(opened[0])
    await one.sessions.revoke_user("bob", "all")
    one.store.lose_all()
    emptied(one)
    await one.recover()
    for _ in range(3):
        other.store.registry, other.store._inner = one.store.registry, one.store._inner
        emptied(other)
        await other.settle()
        assert one.store.registry.kept == 3
        await one.advance(REPEATS_S[0])
        assert one.store.registry.kept == 0
        one.store.lose_all()
    one.store.mode = FAILS
    await one.advance(REPEATS_S[0])
    assert one.sync.revoker._repeats
    await one.recover()
    for _ in range(2):  # after an outage those that were missed come once
        await one.advance(REPEATS_S[-1])
    assert one.sync.revoker._repeats == []
    assert one.state is State.HEALTHY


async def test_a_process_that_did_not_see_the_loss_revokes_again_what_nobody_knew(begin: Begin) -> None:
    one = await begin(shared=True)
    other = await begin(FaultyStoreView(one.store))
    opened = await one.open()
    await other.find(opened.token)
    other.use(opened)
    await one.outage()
    await one.revoke(opened)
    one.store.lose_all()
    await one.recover()  # as one that was started again meanwhile: it is not told that anything was lost
    other.store.registry, other.store._inner = one.store.registry, one.store._inner
    emptied(other)
    await other.settle()
    assert one.store.registry.kept == 1
    await one.advance(REPEATS_S[0])
    assert one.store.registry.kept == 0


async def test_the_disk_begins_before_a_slow_store_is_given_up(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revoker_module, "_STORE_ALONE", 0.0)
    office = await begin(shared=True)
    office.sync.breaker.timeout = 30.0
    opened, other = await office.open(), await office.open()
    for each, failed in ((opened, False), (other, True)):
        office.store.gate = asyncio.Event()
        if failed:
            office.store.modes["end"] = FAILS
        revoking = asyncio.create_task(office.revoke(each))
        while not len(office.pending):  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert not revoking.done()
        office.store.gate.set()
        assert await revoking
        await office.settle()
        assert len(office.pending) == failed
        assert not office.good(each)
    assert office.state is State.DEGRADED


async def test_a_refresh_of_what_is_still_to_be_brought_back_brings_it_first(begin: Begin) -> None:
    office = await begin(shared=True)
    opened = [await office.open(), await office.open()]
    office.store.lose_all()
    office.store.modes["create"] = FAILS
    emptied(office)
    while office.store.calls.count("create") < 4:  # noqa: ASYNC110
        await asyncio.sleep(0)
    office.store.modes.clear()
    assert office.state is State.HEALTHY
    assert office.good(await office.refresh(opened[1]))
    await office.settle()
    assert office.store.registry.kept == 2


async def test_an_emptied_store_that_fails_again_is_filled_later(begin: Begin) -> None:
    office = await begin(shared=True)
    opened = await office.open()
    office.use(opened)
    office.store.lose_all()
    office.store.mode = FAILS
    emptied(office)
    await office.outage()
    office.store.mode = WORKS
    await office.recover()
    assert office.good(opened)
    assert office.store.registry.kept == 1


# --- last uses, cleaning, the end -----------------------------------------------------------------------------


async def test_last_uses_are_written_behind(office: Office) -> None:
    one, other = await office.open(), await office.open()
    await office.sync.write_uses()
    office.store.calls.clear()
    office.clock.advance(60)
    assert office.good(one)
    await office.sync.write_uses()
    assert office.store.calls == ["touch"]
    used, unused = (office.store.registry.record(raw(each)) for each in (one, other))
    assert used is not None
    assert unused is not None
    assert used.last_used_at - unused.last_used_at == 60_000
    await office.sync.write_uses()
    office.clock.wall_ms -= HOUR_MS
    office.store.calls.clear()
    await office.sync.write_uses()  # the clock was set back: better once too often than never


async def test_uses_that_could_not_be_written_are_written_later(office: Office) -> None:
    opened = await office.open()
    office.clock.advance(60)
    assert office.good(opened)
    office.store.modes["touch"] = FAILS
    with pytest.raises(StoreUnavailable):
        await office.sync.write_uses()
    office.store.modes.clear()
    await office.sync.write_uses()
    record = office.store.registry.record(raw(opened))
    assert record is not None
    assert record.last_used_at == office.clock.wall()


async def test_the_end_writes_the_last_uses_and_closes(office: Office) -> None:
    opened = await office.open()
    office.clock.advance(60)
    assert office.good(opened)
    await office.sessions.stop()
    record = office.store.registry.record(raw(opened))
    assert record is not None
    assert record.last_used_at == office.clock.wall()
    assert office.store.closed == 1


async def test_the_end_during_an_outage_keeps_nobody_waiting(
    office: Office, log: list[dict[str, Any]]
) -> None:
    await office.open()
    office.store.mode = HANGS
    opening = asyncio.ensure_future(office.open())
    await asyncio.sleep(0)
    await office.sessions.stop()
    await refused(opening)
    assert "store.uses_not_written" in events(log)


async def test_a_probe_is_not_left_behind(office: Office) -> None:
    await office.outage(HANGS)
    office.clock.advance(MAX_DELAY_S)
    office.timers.advance(MAX_DELAY_S)
    assert office.state is State.RECOVERING
    await asyncio.sleep(0)
    await office.sessions.stop()
    assert not office.sync.tasks.running
    assert len(office.sync._wheel) == 0


async def test_what_time_has_ended_is_removed_here_and_in_the_store(begin: Begin) -> None:
    office = await begin(per_user=10_000, refresh=False)
    for _ in range(1_500):
        await office.open()
    office.clock.advance(2 * DAY_MS / 1000)
    await office.sync.clean()
    assert office.registry.kept == 0
    assert office.store.registry.kept == 0


async def test_upkeep_goes_on_by_itself_whatever_happens(
    begin: Begin, log: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync_module, "TOUCH_INTERVAL_S", 0.001)
    office = await begin()
    calls = itertools.count()

    async def touch(uses: Any) -> None:
        number = next(calls)
        if number == 0:
            raise ValueError("a bug")
        if number == 1:
            raise StoreUnavailable("the test wants it so")
        done.set()

    done = asyncio.Event()
    monkeypatch.setattr(office.store, "touch", touch)
    opened = await office.open()
    while not done.is_set():
        office.clock.advance(0.005)
        assert office.good(opened)
        await asyncio.sleep(0.001)
    (line,) = [line for line in log if line["event"] == "store.upkeep_failed"]
    assert line["what"] == "write_uses"


async def test_a_probe_that_meets_a_bug_is_told_and_made_again(
    office: Office, log: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    await office.outage()

    async def ping() -> None:
        raise ConfigError(["store.url: the password was changed"])

    with monkeypatch.context() as patch:
        patch.setattr(office.store, "ping", ping)
        await office.advance(MAX_DELAY_S)
        assert office.state is State.DEGRADED
        assert "store.probe_failed" in events(log)
    await office.recover()


async def test_a_bug_in_the_background_is_told(
    office: Office, log: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def wrong() -> None:
        raise ValueError("a bug")

    office.sync.tasks.run_in_background(wrong())
    await office.settle()
    assert "store.task_failed" in events(log)


# --- looking --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_shared", [False, True])
async def test_sessions_are_listed(begin: Begin, is_shared: bool) -> None:
    one = await begin(shared=is_shared)
    opened = [await one.open(key="device:phone"), await one.open(operator=True)]
    await one.open("bob")
    one.clock.advance(60)
    assert one.good(opened[1])
    infos = await one.sessions.list("ada")
    assert [info.id for info in infos] == [each.session.id for each in opened]
    assert infos == [one.sessions.info(each.session) for each in opened]
    assert [(info.bound, info.operator) for info in infos] == [(True, False), (False, True)]
    assert infos[1].last_used_at == one.clock.wall()


@pytest.mark.parametrize("is_shared", [False, True])
async def test_operators_list_the_sessions_of_everybody(begin: Begin, is_shared: bool) -> None:
    one = await begin(shared=is_shared)
    ids = []
    for user in ("bob", "ada", "bob"):
        ids.append(raw(await one.open(user)))
        one.clock.advance(1)
    assert [record.id for record in await one.sessions.records(None, 10)] == ids
    assert [record.id for record in await one.sessions.records(None, 2)] == ids[:2]
    assert [record.id for record in await one.sessions.records("bob", 10)] == [ids[0], ids[2]]
    await one.outage()
    if is_shared:
        await refused(one.sessions.records(None, 10))
    else:
        assert len(await one.sessions.records(None, 10)) == 3


async def test_sessions_of_other_processes_are_listed_if_their_time_is_not_up(begin: Begin) -> None:
    one = await begin(shared=True, refresh_lifetime_ms=2 * DAY_MS)
    other = await begin(one.store, refresh_lifetime_ms=2 * DAY_MS)
    opened = await one.open()
    (info,) = await other.sessions.list("ada")
    assert (info.id, info.live) == (opened.session.id, True)
    assert other.registry.kept == 0
    one.clock.advance(1.5 * DAY_MS / 1000)
    (info,) = await other.sessions.list("ada")
    assert not info.live
    one.clock.advance(DAY_MS / 1000)
    assert await other.sessions.list("ada") == []
    await other.outage()
    await refused(other.sessions.list("ada"))


async def test_sessions_without_refresh_or_idle_limit_are_listed(begin: Begin) -> None:
    one = await begin(shared=True, refresh=False, idle_timeout_ms=None)
    await one.open()
    one.clock.advance(0.9 * DAY_MS / 1000)
    (info,) = await one.sessions.list("ada")
    assert (info.live, info.refresh_expires_at) == (True, None)
    one.clock.advance(0.2 * DAY_MS / 1000)
    assert await one.sessions.list("ada") == []


async def test_what_operators_see(office: Office) -> None:
    opened = await office.open()
    assert office.sessions.statistics() == {
        "state": "healthy",
        "refusing": False,
        "outages": 0,
        "failures": 0,
        "pending_revocations": 0,
        "changes": 0,
        "lookups": 0,
        "misses": 0,
    }
    office.store.mode = FAILS
    await office.revoke(opened)
    told = office.sessions.statistics()
    assert (told["state"], told["outages"], told["failures"], told["pending_revocations"]) == (
        "degraded",
        1,
        1,
        1,
    )


# --- in memory --------------------------------------------------------------------------------------------------


async def test_in_memory_no_coroutine_suspends(clock: FakeClock) -> None:
    registry = SessionRegistry(SessionSettings(), CountedEntropy())
    sessions = SessionService(registry, clock)

    def at_once(work: Any) -> Any:
        with pytest.raises(StopIteration) as stopped:
            work.send(None)
        return stopped.value.value

    opened = at_once(sessions.open("ada", operator=False, client=CLIENT, address=ADDRESS))
    again = at_once(sessions.refresh(opened.refresh_token, client=CLIENT, address=ADDRESS))
    assert again.session.id == opened.session.id
    assert [info.id for info in at_once(sessions.list("ada"))] == [opened.session.id]
    assert sessions.info(again.session).user == "ada"
    assert at_once(sessions.look_up(b"x" * 32, ADDRESS, Code.UNAUTHENTICATED)) is None
    at_once(sessions.close(again.session))
    assert registry.kept == 0
    for _ in range(3):
        opened = at_once(sessions.open("ada", operator=False, client=CLIENT, address=ADDRESS))
    assert at_once(sessions.revoke(opened.session.id, user="ada", reason=""))
    assert at_once(sessions.revoke_user("ada", "")) == 2
    opened = at_once(sessions.open("ada", operator=False, client=CLIENT, address=ADDRESS, key="device:phone"))
    assert at_once(sessions.find_by_refresh_token(opened.refresh_token)).user == "ada"
    assert at_once(sessions.revoke_key("ada", "device:phone", "")) == 1
    at_once(sessions.open("ada", operator=False, client=CLIENT, address=ADDRESS))
    assert at_once(sessions.revoke_all("")) == 1
    at_once(sessions.stop())
    assert sessions.statistics() == {"state": "healthy"}
    assert not sessions.is_shared


async def test_a_full_store_lets_the_limit_of_the_user_be_seen(begin: Begin) -> None:
    """What the store refuses for reasons of its own passes through."""
    store = FaultyStore(SessionRegistry(SessionSettings(max_sessions=1), CountedEntropy()))
    office = await begin(store)
    await office.open()
    error = await refused(office.open("bob"), ResourceExhausted)
    assert error.details == {"retry_after_ms": 10_000}
    assert office.state is State.HEALTHY
