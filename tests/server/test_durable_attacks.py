"""Durable runs under attack: an old token, a stolen live one, another user, a session with fewer roles.

The attacker has read all ids of runs, and knows methods and params. The victim reads each item once.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.helpers import Answer
from tests.server.protocol_harness import Harness, Peer, items
from zcproto.app.app import Access
from zcproto.app.context import Context
from zcproto.connection.server import ROTATION_GRACE_S
from zcproto.errors import Code
from zcproto.runs.log import GONE_BYTES, KNOWN_PER_USER, KNOWN_S, LONGEST_KEEP_S, RUN_BYTES, RunKey
from zcproto.runs.store import MemoryRuns
from zcproto.wire.frame import CANCEL, END, Kind

IDS = [f"run-{number}" for number in range(3)]
SECRET = "the secret of "
TRIES = 10_000
BATCH = 250


class Target:
    """Durable methods that wait for `more` before each further item, and the runs of `ada`, which she has left."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        self.more = asyncio.Event()
        self.closed = 0
        harness.add_method(self.work, "work", durable=True)
        self.store: MemoryRuns = harness.allow_durable(runs_per_user=len(IDS) + 1)
        settings = harness.state.settings
        assert settings.streams is not None
        streams = replace(settings.streams, max_open=BATCH)  # so that the runs refuse, and not the connection
        harness.state.settings = replace(settings, max_streams=2 * BATCH, streams=streams)

    async def work(self, context: Context) -> AsyncIterator[str]:
        try:
            yield SECRET + context.user
            await self.more.wait()
            yield "more"
        finally:
            self.closed += context.user == "ada"

    def login(self, user: str = "ada", *, key: str = "", roles: frozenset[str] = frozenset()) -> Peer:
        peer = self.harness.connect()
        if key:
            self.harness.in_loop(lambda: peer.protocol.prove(key))
        wall, registry = self.harness.clock.wall(), self.harness.registry
        peer.use(registry.open(user, client="", address="", wall=wall, key=key, roles=roles))
        return peer

    def begin(self, victim: Peer) -> None:
        for number, id in enumerate(IDS, 1):
            victim.send(victim.open("work", {}, stream=number, resume={"id": id, "from": 0}))
            assert items(victim.settle()) == [SECRET + "ada"]
            victim.send(victim.frame(END, number))
            victim.settle()

    def states(self) -> list[tuple[Any, ...]]:
        """Return what an attacker may not change of the runs of `ada`."""
        found = dict(self.store.table.runs("ada"))
        return [
            (state.first, state.next, state.taken, state.attachment, state.cancel, state.end)
            for state in (found[RunKey("ada", id)] for id in IDS)
        ]

    def finish(self, victim: Peer) -> None:
        """Let the victim read its runs to their ends."""
        self.harness.in_loop(self.more.set)
        for number, id in enumerate(IDS, 11):
            victim.send(victim.open("work", None, stream=number, resume={"id": id, "from": 0}))
            assert items(victim.settle()) == [SECRET + "ada", "more"]


@pytest.fixture
def target(harness: Harness) -> Target:
    return Target(harness)


def tries(peer: Peer, id: str) -> dict[str, bytes]:
    """Return what a session can send to read or cancel a run."""
    resume = {"id": id, "from": 0}
    return {
        "attach": peer.open("work", None, stream=1, resume=resume),
        "repeat the first OPEN": peer.open("work", {}, stream=2, resume=resume),
        "other params": peer.open("work", {"x": 1}, stream=3, resume=resume),
        "other method": peer.open("count", {"n": 1}, stream=4, resume=resume),
        "CANCEL": peer.frame(CANCEL, 1),
        "END": peer.frame(END, 2),
        "stream.cancel": peer.request(5, "stream.cancel", {"id": id}),
        "stream.list": peer.request(6, "stream.list"),
    }


def deliver(peer: Peer, *frames: bytes) -> list[Answer]:
    """Send frames, and return the answers. A server that slows the peer down reads again after a while."""
    peer.send(*frames)
    answers = peer.settle()
    while not peer.transport.is_reading():
        peer.harness.advance(1.0)
        answers += peer.settle()
    return answers


def assert_refused(answers: list[Answer], codes: set[Code]) -> None:
    """Check that all were refused, but for an empty list."""
    for answer in answers:
        assert SECRET.encode() not in answer.body
        if answer.kind is Kind.RESPONSE:
            assert answer.value == []
        else:
            assert answer.kind is Kind.ERROR
            assert Code(answer.code) in codes | {Code.CANCELLED}, answer.error


def with_fewer_roles(target: Target) -> tuple[Peer, Peer]:
    target.harness.state.restrict({"work": Access(frozenset({"worker"}))})
    return target.login(roles=frozenset({"worker"})), target.login()


@pytest.mark.parametrize(
    ("peers", "code"),
    [
        (lambda target: (target.login(key="device:phone"), target.login()), Code.PERMISSION_DENIED),
        (with_fewer_roles, Code.PERMISSION_DENIED),
    ],
    ids=["unbound token of a bound user", "fewer roles"],
)
@pytest.mark.parametrize("are_apart", [True, False], ids=["one by one", "in one read"])
def test_lesser_session_of_the_user_gains_nothing(
    target: Target, peers: Callable[[Target], tuple[Peer, Peer]], code: Code, are_apart: bool
) -> None:
    victim, thief = peers(target)
    target.begin(victim)
    before = target.states()
    for id in IDS:
        sent = tries(thief, id)
        for frames in [[each] for each in sent.values()] if are_apart else [[*sent.values()]]:
            assert_refused(deliver(thief, *frames), {code, Code.FAILED_PRECONDITION, Code.INVALID_ARGUMENT})
    assert target.states() == before
    target.finish(victim)


def refresh(victim: Peer) -> None:
    """Rotate the token on a connection which shows the new one, elsewhere."""
    registry, wall = victim.harness.registry, victim.harness.clock.wall()
    old = victim.opened.refresh_token
    renewed = victim.harness.in_loop(lambda: registry.refresh(old, client="", address="", wall=wall))
    victim.token = renewed.token
    victim.send(victim.request(92, "stream.list"))
    assert [run["id"] for run in victim.settle()[-1].value] == IDS


@pytest.mark.parametrize("is_new", [True, False], ids=["new connection", "known connection"])
def test_old_token_gains_nothing(target: Target, is_new: bool) -> None:
    harness = target.harness
    victim = target.login()
    target.begin(victim)
    thief = harness.connect()
    thief.use(victim.opened)
    refresh(victim)
    if is_new:
        thief = harness.connect()
        thief.token = victim.opened.token
    before = target.states()
    for id in IDS:
        assert_refused(deliver(thief, *tries(thief, id).values()), {Code.TOKEN_REVOKED})
    assert target.states() == before
    target.finish(victim)


def test_thief_with_the_live_token_loses_its_attachment_with_the_next_refresh(target: Target) -> None:
    harness = target.harness
    victim = target.login()
    target.begin(victim)
    thief = harness.connect()
    thief.use(victim.opened)
    read = items(deliver(thief, tries(thief, IDS[0])["attach"]))
    assert read == [SECRET + "ada"], "a live token is all that a session is"
    refresh(victim)
    harness.advance(ROTATION_GRACE_S + 1)
    (cut,) = thief.settle()
    assert cut.error.details["reason"] == "token_rotated"
    assert_refused(deliver(thief, *tries(thief, IDS[0]).values()), {Code.TOKEN_REVOKED})
    target.finish(victim)


def test_other_user_gains_nothing_in_ten_thousand_tries(target: Target) -> None:
    """The attacker has runs of its own, with the ids of the victim's, too."""
    chance = random.Random(1)
    victim, thief = target.login(), target.login("eve")
    target.begin(victim)
    before, answered, streams = target.states(), 0, itertools.count(100)
    while answered < TRIES:
        frames = []
        for stream in itertools.islice(streams, BATCH):
            id = chance.choice([*IDS, f"own-{chance.randrange(9)}"])
            resume = {"id": id, "from": chance.choice([0, 0, 1, 2, 2**53 - 1])}
            frames += [
                chance.choice([thief.frame(CANCEL, stream - 1), thief.frame(END, stream - 2), b""]),
                chance.choice(
                    [
                        thief.open("work", None, stream=stream, resume=resume),
                        thief.open("work", {}, stream=stream, resume=resume),
                        thief.request(stream, "stream.cancel", {"id": id}),
                        thief.request(stream, "stream.list"),
                    ]
                ),
            ]
        for answer in deliver(thief, *frames):
            assert (SECRET + "ada").encode() not in answer.body
            answered += answer.kind is Kind.RESPONSE or (
                answer.kind is Kind.ERROR and answer.code != Code.RESOURCE_EXHAUSTED
            )
            if answer.kind is Kind.RESPONSE and isinstance(answer.value, list):
                assert all(run["session"] == thief.opened.session.id for run in answer.value)
    assert target.states() == before
    assert target.closed == 0
    target.finish(victim)


def test_runs_and_attachments_without_number_leave_only_ids_and_these_for_ten_minutes(target: Target) -> None:
    harness, store = target.harness, target.store
    store.reconfigure(replace(store.table.limits, runs_per_user=BATCH))
    thief, codes, runs = target.login("eve"), Counter[int](), harness.state.runs
    assert runs is not None
    for opened in range(0, KNOWN_PER_USER + 3 * BATCH, BATCH):
        numbers = range(opened + 1, opened + BATCH + 1)
        other = harness.connect()
        other.use(thief.opened)
        for peer, params in ((thief, {}), (other, None)):  # to start, and to attach
            opens = [
                peer.open("work", params, stream=number, resume={"id": f"{number}", "from": 0})
                for number in numbers
            ]
            answers = deliver(peer, *opens)
            codes.update(answer.code for answer in answers if answer.kind is Kind.ERROR)
        deliver(other, *(other.frame(CANCEL, number) for number in numbers))
        other.lose()
        deliver(thief)
        assert len(runs) == runs.attached == len(runs.stopping) == 0
        assert store.size <= (opened + BATCH) * GONE_BYTES + BATCH * (RUN_BYTES + 1_000)
    assert codes[Code.RESOURCE_EXHAUSTED]
    thief.lose()
    harness.advance(LONGEST_KEEP_S + 2 * KNOWN_S)
    store.sweep()
    assert store.size == len(store.table) == harness.state.tasks.running == 0
