"""Durable streams of a server of one process: what ends an attachment, what ends a run, and whose run it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.helpers import Answer
from tests.server.protocol_harness import ABANDON_AFTER, LIMITS, PLENTY, Harness, Peer, items, kinds
from zcproto.app.app import Access
from zcproto.app.context import Context
from zcproto.common.parameters import Ended
from zcproto.connection.events import GoAwayReason
from zcproto.errors import Code, NotFound, Unavailable
from zcproto.runs.log import KNOWN_S, Opening, RunKey, RunLimits, RunState, RunTable
from zcproto.runs.shared import owner_lost
from zcproto.runs.store import MemoryRuns
from zcproto.server.durable import BATCH_ITEMS, MAX_STOPPING, SWEEP_S, DurableRuns, serve_runs
from zcproto.sessions import EndReason
from zcproto.wire.frame import CANCEL, CREDIT, Kind
from zcproto.wire.message import decode_body, encode_body

KEEP = 60.0
ID = "run-1"


class Work:
    """A durable method `work` that yields `n` numbers, waits, and ends with `done`, or as `last` says."""

    def __init__(self, harness: Harness) -> None:
        self.may_end = asyncio.Event()
        self.started = self.closed = 0
        self.contexts: list[Context] = []
        harness.add_method(self.work, "work", durable=True)
        harness.add_method(self.work, "other", durable=True)

    async def work(self, context: Context, n: int = 3, last: Any = "done") -> AsyncIterator[Any]:
        self.started += 1
        self.contexts.append(context)
        try:
            for number in range(n):
                yield number
            await self.may_end.wait()
            if last == "large":
                yield bytes(LIMITS.max_item)
            elif last == "object":
                yield object()
            elif last == "not found":
                raise NotFound("no such thing", {"detached": True, "x": 1})
            elif last == "key error":
                raise KeyError("x")
            yield Ended(object() if last == "result" else bytes(10**7) if last == "large result" else "done")
        finally:
            self.closed += 1

    async def large(self) -> AsyncIterator[Any]:
        yield 0
        yield bytes(900)
        yield 2


@pytest.fixture
def work(harness: Harness) -> Work:
    return Work(harness)


@pytest.fixture
def store(harness: Harness, work: Work) -> MemoryRuns:
    return harness.allow_durable(items=BATCH_ITEMS, runs_per_user=3, keep_s=KEEP)


@pytest.fixture
def client(harness: Harness, store: MemoryRuns) -> Peer:
    return harness.connect("ada")


def attach(
    peer: Peer, position: int = 0, params: Any = None, *, id: str = ID, method: str = "work", **options: Any
) -> list[Answer]:
    """Open a stream with `resume` and return what follows."""
    peer.send(peer.open(method, params, resume={"id": id, "from": position}, **options))
    return peer.settle()


def begin(peer: Peer, **params: Any) -> list[Answer]:
    """Start the run, and read what it has sent."""
    return attach(peer, 0, params)


def again(peer: Peer) -> Peer:
    """Return another connection with the session of a client."""
    other = peer.harness.connect()
    other.use(peer.opened)
    return other


def accepted(answers: list[Answer]) -> dict[str, Any]:
    first = answers[0]
    assert first.kind is Kind.ACCEPTED, answers
    found: dict[str, Any] = decode_body(first.body)
    return found


def refusal(answers: list[Answer]) -> tuple[int, dict[str, Any]]:
    """Return code and details of the ERROR that is all there is."""
    (answer,) = answers
    return answer.error.code, answer.error.details


def runs_of(harness: Harness) -> DurableRuns:
    runs = harness.state.runs
    assert isinstance(runs, DurableRuns)
    return runs


def taken(peer: Peer, position: int, stream: int = 1) -> None:
    peer.send(peer.frame(CREDIT, stream, encode_body([*PLENTY, position])))
    peer.settle()


def finish(peer: Peer, work: Work) -> list[Answer]:
    """Let the method return, and return what the client got."""
    peer.harness.in_loop(work.may_end.set)
    return peer.settle()


def pass_time(harness: Harness, seconds: float) -> None:
    harness.advance(seconds)
    for _ in range(4):
        harness.turn()


# --- attachments -----------------------------------------------------------------------------------------


def test_first_open_starts_the_run_and_gets_its_items_and_its_answer(client: Peer, work: Work) -> None:
    answers = begin(client)
    info = accepted(answers)
    assert {name: info[name] for name in info if name != "attachment"} == {
        "id": ID,
        "from": 0,
        "state": "running",
        "first": 0,
        "next": 0,
    }
    assert items(answers) == [0, 1, 2]
    (end,) = finish(client, work)
    assert end.value == "done"
    assert (work.started, work.closed, runs_of(client.harness).ended) == (1, 1, {"ok": 1})


def test_run_goes_on_without_its_connection_and_is_read_on_another(client: Peer, work: Work) -> None:
    begin(client)
    client.lose()
    client.settle()
    assert work.closed == 0
    other = again(client)
    answers = attach(other, 2)
    assert (accepted(answers)["state"], items(answers)) == ("running", [2])
    assert finish(other, work)[-1].value == "done"
    answers = attach(again(client), 1)
    assert (accepted(answers)["state"], items(answers), answers[-1].value) == ("ended", [1, 2], "done")
    assert work.started == 1


def test_attachment_at_next_waits_for_the_next_item(client: Peer, work: Work) -> None:
    begin(client)
    other = again(client)
    assert kinds(attach(other, 3)) == [Kind.ACCEPTED]
    assert finish(other, work)[-1].value == "done"


def test_first_open_that_is_repeated_attaches(client: Peer, work: Work) -> None:
    begin(client, n=2)
    answers = begin(again(client), n=2)
    assert items(answers) == [0, 1]
    assert work.started == 1


@pytest.mark.parametrize(
    ("options", "code", "details"),
    [
        ({"params": {"n": 4}}, Code.FAILED_PRECONDITION, {}),
        ({"method": "other"}, Code.FAILED_PRECONDITION, {}),
        ({"method": "count", "params": {"n": 1}}, Code.FAILED_PRECONDITION, {}),
        ({"id": "unknown"}, Code.NOT_FOUND, {}),
        ({"id": "unknown", "params": {}, "position": 1}, Code.NOT_FOUND, {}),
        ({"position": 4}, Code.OUT_OF_RANGE, {"first": 0, "next": 3}),
        ({"id": "new", "params": {"n": "x"}}, Code.INVALID_ARGUMENT, None),
        ({"id": "new", "params": {"unknown": 1}}, Code.INVALID_ARGUMENT, None),
    ],
    ids=["params", "method", "plain method", "id", "from of an unknown id", "from", "type", "name"],
)
def test_open_that_does_not_fit_is_refused_and_supersedes_nothing(
    client: Peer, work: Work, options: dict[str, Any], code: Code, details: dict[str, Any] | None
) -> None:
    begin(client)
    other = again(client)
    found = refusal(attach(other, **options))
    assert found[0] == code
    assert details is None or found[1] == details
    assert finish(client, work)[-1].value == "done"
    assert work.started == 1


def test_run_of_another_user_is_unknown(client: Peer, work: Work) -> None:
    begin(client)
    bob = client.harness.connect("bob")
    assert refusal(attach(bob))[0] == Code.NOT_FOUND
    bob.send(bob.request(7, "stream.cancel", {"id": ID}), bob.request(8, "stream.list"))
    refused, listed = bob.settle()
    assert (refused.code, listed.value) == (Code.NOT_FOUND, [])
    assert items(begin(bob)) == [0, 1, 2]
    assert work.started == 2


def test_newest_of_two_attachments_reads_and_the_older_one_is_cut(client: Peer, work: Work) -> None:
    begin(client)
    first, second = again(client), again(client)
    for peer in (first, second):
        peer.send(peer.open("work", None, resume={"id": ID, "from": 0}))
    answers = second.settle()
    assert items(answers) == [0, 1, 2]
    for older in (client, first):
        assert older.answers()[-1].error.details == {"reason": "resumed_elsewhere", "detached": True}
    assert finish(second, work)[-1].value == "done"
    assert client.harness.state.counters.streams_cut == {"resumed_elsewhere": 2}


def test_attachment_that_waits_for_credit_is_cut_by_a_newer_one(client: Peer, work: Work) -> None:
    client.send(client.open("work", {}, credit=(1, 1_000), resume={"id": ID, "from": 0}))
    assert items(client.settle()) == [0]
    for _ in range(2):
        other = again(client)
        assert items(attach(other, 0)) == [0, 1, 2]
        assert refusal(client.settle())[1] == {"reason": "resumed_elsewhere", "detached": True}
        assert runs_of(client.harness).attached == 1
        client = other
    assert finish(client, work)[-1].value == "done"


def test_end_leaves_the_run_and_cancel_ends_it(client: Peer, work: Work) -> None:
    begin(client)
    client.send(client.end())
    assert refusal(client.settle()) == (Code.CANCELLED, {"reason": "detached", "detached": True})
    assert (work.closed, runs_of(client.harness).attached) == (0, 0)
    attach(client, stream=2)
    client.send(client.frame(CANCEL, 2))
    assert refusal(client.settle()) == (Code.CANCELLED, {"reason": "caller"})
    assert work.closed == 1
    answers = attach(client, 1, stream=3)
    assert items(answers) == [1, 2]
    assert answers[-1].error.details == {"reason": "caller"}


@pytest.mark.parametrize(("frame", "is_detached"), [("end", True), ("cancel", False)])
@pytest.mark.parametrize("is_running", [True, False])
def test_end_and_cancel_in_the_read_of_the_open(
    client: Peer, work: Work, frame: str, is_detached: bool, is_running: bool
) -> None:
    if is_running:
        begin(client)
        client.send(client.end())
        client.settle()
    opening = client.open("work", {}, stream=2, resume={"id": ID, "from": 0})
    client.send(opening, client.end(2) if frame == "end" else client.frame(CANCEL, 2))
    assert refusal(client.settle())[1].get("detached", False) is is_detached
    assert work.closed == (is_running and not is_detached)
    assert runs_of(client.harness).attached == 0


def test_draining_connection_ends_the_attachment_only(client: Peer, work: Work) -> None:
    begin(client)
    client.protocol.go_away(GoAwayReason.DRAINING)
    client.protocol.cancel_all()
    (goaway, cut) = client.settle()
    assert goaway.kind is Kind.GOAWAY
    assert (cut.error.details["reason"], cut.error.details["detached"]) == ("draining", True)
    assert work.closed == 0
    assert items(attach(again(client), 0)) == [0, 1, 2]


def test_deadline_of_the_first_open_ends_the_run_though_it_is_not_read(client: Peer, work: Work) -> None:
    client.send(client.open("work", {}, resume={"id": ID, "from": 0}, deadline_ms=5_000))
    client.settle()
    assert work.contexts[0].time_left == 5.0
    client.lose()
    pass_time(client.harness, 6.0)
    assert (work.closed, runs_of(client.harness).ended) == (1, {"deadline_exceeded": 1})
    assert attach(again(client))[-1].code == Code.DEADLINE_EXCEEDED


@pytest.mark.parametrize("hours", [1, -1])
def test_wall_clock_that_jumps_neither_ends_nor_prolongs_a_run(client: Peer, work: Work, hours: int) -> None:
    harness = client.harness
    client.send(client.open("work", {}, resume={"id": ID, "from": 0}, deadline_ms=60_000))
    client.settle()
    client.lose()
    harness.clock.wall_ms += hours * 3_600_000
    pass_time(harness, 59.0)
    assert work.closed == 0
    assert items(attach(harness.connect("ada"), 1)) == [1, 2]
    pass_time(harness, 2.0)
    assert runs_of(harness).ended == {"deadline_exceeded": 1}


def test_deadline_of_a_later_open_ends_its_attachment(client: Peer, work: Work) -> None:
    begin(client)
    other = again(client)
    attach(other, deadline_ms=5_000)
    pass_time(client.harness, 6.0)
    assert refusal(other.settle()) == (Code.DEADLINE_EXCEEDED, {"reason": "deadline", "detached": True})
    assert work.closed == 0


def test_id_of_a_run_that_has_gone_is_known_for_ten_minutes(client: Peer, work: Work) -> None:
    begin(client)
    finish(client, work)
    pass_time(client.harness, KEEP + 2 * SWEEP_S)
    other = again(client)
    assert refusal(begin(other))[0] == Code.NOT_FOUND
    pass_time(client.harness, KNOWN_S - 4 * SWEEP_S)
    other = again(client)
    assert refusal(begin(other))[0] == Code.NOT_FOUND
    pass_time(client.harness, 4 * SWEEP_S)
    assert accepted(begin(again(client)))["state"] == "running"
    assert work.started == 2


# --- items and bounds ------------------------------------------------------------------------------------


def test_method_waits_at_the_bound_of_items_until_they_were_taken(client: Peer, work: Work) -> None:
    assert items(begin(client, n=200)) == [*range(BATCH_ITEMS)]
    taken(client, 5)
    other = again(client)
    next_ = 2 * BATCH_ITEMS
    assert refusal(attach(other, 4))[1] == {"first": 5, "next": next_}
    assert items(attach(other, 5)) == [*range(5, next_)]
    taken(other, next_)
    assert refusal(attach(again(client), 5))[0] == Code.OUT_OF_RANGE


def test_method_waits_at_the_bound_of_its_user_and_other_users_do_not(harness: Harness, work: Work) -> None:
    harness.allow_durable(bytes_per_user=65 * BATCH_ITEMS)
    ada, bob, numbers = harness.connect("ada"), harness.connect("bob"), [*range(BATCH_ITEMS)]
    for peer in (ada, bob):
        assert items(attach(peer, 0, {"n": 100}, id="a")) == numbers
    assert items(attach(ada, 0, {"n": 100}, id="b", stream=2)) == numbers, "a batch beyond the bound"
    taken(ada, 10)
    taken(ada, 10, stream=2)
    assert items(ada.settle()) == []


def test_bound_that_a_reload_has_lowered_holds_for_the_next_item(client: Peer, work: Work) -> None:
    begin(client, n=6)
    client.harness.state.runs.reconfigure(RunLimits(items=2, runs_per_user=1), 5.0)
    taken(client, 3)
    attach(again(client), 3)  # the owner appends
    answers = attach(again(client), 3)
    assert (accepted(answers)["first"], items(answers)) == (3, [3, 4, 5])
    assert refusal(attach(again(client), 0, {}, id="new"))[0] == Code.RESOURCE_EXHAUSTED


def test_item_that_a_reload_has_made_too_large_ends_the_attachment_and_is_skipped(
    client: Peer, work: Work
) -> None:
    harness = client.harness
    work.may_end.set()
    harness.add_method(work.large, "large", durable=True)
    assert items(attach(client, 0, {}, method="large")) == [0, bytes(900), 2]
    settings = harness.state.settings
    harness.state.reconfigure(replace(settings, streams=replace(settings.streams, max_item=500)))
    *answers, error = attach(again(client), 0, method="large")
    assert (items(answers), error.code, error.error.details) == ([0], Code.FAILED_PRECONDITION, {})
    assert "streams.max_item_bytes" in error.error.message
    assert items(attach(again(client), 2, method="large")) == [2]


def test_runs_of_a_user_are_limited_and_the_oldest_that_has_ended_makes_room(
    client: Peer, work: Work
) -> None:
    for number in (1, 2, 3):
        attach(client, 0, {}, id=f"run-{number}", stream=number)
    assert refusal(attach(client, 0, {}, id="run-4", stream=4)) == (Code.RESOURCE_EXHAUSTED, {"limit": 3})
    client.send(client.frame(CANCEL, 2))
    client.settle()
    assert accepted(attach(client, 0, {}, id="run-4", stream=4))
    assert refusal(attach(again(client), id="run-2"))[0] == Code.NOT_FOUND


def test_methods_that_ignore_their_cancellation_are_limited(harness: Harness) -> None:
    may_end = asyncio.Event()

    async def stubborn() -> AsyncIterator[int]:
        try:
            yield 0
            await may_end.wait()
        finally:
            await may_end.wait()

    harness.add_method(stubborn, "work", durable=True)
    harness.allow_durable(runs_per_user=2)
    client = harness.connect("ada")
    for number in range(1, MAX_STOPPING + 1):
        assert items(attach(client, 0, {}, id=f"{number}", stream=1)) == [0]
        client.send(client.frame(CANCEL, 1))
        client.settle()
    code, details = refusal(attach(client, 0, {}, id="more"))
    assert (code, details) == (Code.RESOURCE_EXHAUSTED, {"retry_after_ms": 1_000})
    assert items(begin(harness.connect("bob"))) == [0]
    harness.in_loop(may_end.set)
    client.settle()
    assert items(attach(client, 0, {}, id="more")) == [0]


def test_bound_of_all_users_refuses_new_runs(harness: Harness, work: Work) -> None:
    harness.allow_durable(total_bytes=1)
    begin(harness.connect("ada"))
    code, details = refusal(begin(harness.connect("bob")))
    assert (code, details) == (Code.RESOURCE_EXHAUSTED, {"retry_after_ms": 1_000})


@pytest.mark.parametrize(
    ("last", "code"),
    [
        ("large", Code.INTERNAL),
        ("object", Code.INTERNAL),
        ("key error", Code.INTERNAL),
        ("result", Code.INTERNAL),
        ("large result", Code.INTERNAL),
        ("not found", Code.NOT_FOUND),
    ],
)
def test_error_of_the_method_is_the_answer_of_the_run(
    client: Peer, work: Work, last: str, code: Code
) -> None:
    begin(client, last=last)
    (answer,) = finish(client, work)
    assert answer.code == code
    assert work.closed == 1
    assert attach(again(client), 3)[-1].body == answer.body
    if code is Code.NOT_FOUND:
        assert answer.error.details == {"x": 1}  # `detached` is the protocol's


def test_method_that_ignores_its_cancellation_adds_no_items(harness: Harness) -> None:
    async def stubborn() -> AsyncIterator[int]:
        while True:
            try:
                await harness.future()
            except asyncio.CancelledError:
                yield 1
            yield 2

    harness.add_method(stubborn, "work", durable=True)
    harness.allow_durable()
    client = harness.connect("ada")
    begin(client)
    client.send(client.frame(CANCEL, 1))
    client.settle()
    answers = attach(client, stream=2)
    assert (items(answers), answers[-1].error.details) == ([], {"reason": "caller"})


# --- whose run it is -------------------------------------------------------------------------------------


def end_session(reason: EndReason) -> Callable[[Peer], object]:
    def end(peer: Peer) -> object:
        return peer.harness.registry.revoke(peer.opened.session.id, user=None, reason=reason)

    return end


def expire(peer: Peer) -> object:
    return peer.harness.registry.expire(peer.opened.session.id, peer.opened.session.expires_at + 1)


def replace_session(peer: Peer) -> object:
    registry = peer.harness.registry
    return registry.end(peer.opened.session.raw_id, Code.SESSION_REPLACED, EndReason.REPLACED, 1)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (end_session(EndReason.CLOSED), "token_revoked"),
        (end_session(EndReason.BY_OPERATOR), "token_revoked"),
        (expire, None),
        (replace_session, None),
    ],
    ids=["logged out", "revoked", "expired", "replaced"],
)
@pytest.mark.parametrize("is_attached", [True, False])
def test_end_of_the_session_that_has_opened_the_run(
    client: Peer, work: Work, end: Callable[[Peer], object], reason: str | None, is_attached: bool
) -> None:
    begin(client)
    if not is_attached:
        client.lose()
    client.harness.in_loop(lambda: end(client))
    for _ in range(3):
        client.harness.turn()
    assert work.closed == (reason is not None)
    answers = attach(client.harness.connect("ada"))
    assert items(answers) == [0, 1, 2]
    if reason is not None:
        assert answers[-1].error.details == {"reason": reason}


def test_session_that_is_revoked_after_it_expired_ends_its_runs(client: Peer, work: Work) -> None:
    begin(client)
    client.lose()
    client.harness.in_loop(lambda: expire(client))
    pass_time(client.harness, 2 * SWEEP_S)
    assert work.closed == 0
    client.harness.in_loop(lambda: end_session(EndReason.BY_USER)(client))
    pass_time(client.harness, 2 * SWEEP_S)
    assert work.closed == 1


@pytest.mark.parametrize("is_over", [False, True], ids=["too early", "at its time"])
def test_session_that_is_missing_before_its_time_counts_as_revoked(
    client: Peer, work: Work, is_over: bool
) -> None:
    begin(client)
    client.lose()
    harness, session = client.harness, client.opened.session
    pass_time(harness, SWEEP_S)
    if is_over:
        harness.clock.advance(harness.registry.settings.refresh_lifetime_ms / 1000 + 1)
        runs_of(harness).abandon_after = 10.0**9
    harness.in_loop(lambda: harness.registry.forget(session.raw_id))
    pass_time(harness, 2 * SWEEP_S)
    assert runs_of(harness).ended == ({"cancelled": 1})


def test_run_of_an_open_whose_session_was_revoked_meanwhile_ends(client: Peer, work: Work) -> None:
    client.send(client.open("work", {}, resume={"id": ID, "from": 0}))
    registry, session = client.harness.registry, client.opened.session
    client.harness.state.session_connections.remove(session.id)  # so that the stream is not cut
    client.harness.in_loop(lambda: registry.revoke(session.id, user=None, reason=EndReason.BY_USER))
    client.settle()
    assert work.closed == work.started
    assert len(runs_of(client.harness)) == 0


def test_run_of_an_open_whose_session_has_left_the_cache_goes_on(client: Peer, work: Work) -> None:
    """The connection was lost meanwhile. Whether the session was revoked is looked up in the store later."""
    client.send(client.open("work", {}, resume={"id": ID, "from": 0}))
    client.harness.in_loop(lambda: client.harness.registry.forget(client.opened.session.raw_id))
    client.settle()
    assert (work.started, work.closed) == (1, 0)


@pytest.mark.parametrize("who", ["user", "operator", "operator, all"])
def test_revocation_of_a_user_deletes_running_and_ended_runs(client: Peer, work: Work, who: str) -> None:
    harness = client.harness
    begin(client)
    finish(client, work)
    work.may_end.clear()
    attach(client, 0, {}, id="running", stream=2)
    user = None if who == "operator, all" else "ada"
    reason = EndReason.BY_USER if who == "user" else EndReason.BY_OPERATOR
    harness.loop.run_until_complete(harness.state.revoke_all(user, reason))
    client.settle()
    assert work.closed == 2
    assert len(runs_of(harness)) == 0
    other = harness.connect("ada")
    for number, id in enumerate((ID, "running"), 1):
        assert refusal(attach(other, id=id, stream=number))[0] == Code.NOT_FOUND


def test_runs_are_deleted_though_the_store_of_sessions_is_away(
    client: Peer, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*arguments: object) -> int:
        raise Unavailable("away")

    harness = client.harness
    begin(client)
    monkeypatch.setattr(harness.state.sessions, "revoke_user", away)
    with pytest.raises(Unavailable):
        harness.loop.run_until_complete(harness.state.revoke_all("ada", EndReason.BY_USER))
    client.settle()
    assert (work.closed, runs_of(harness).ended) == (1, {"deleted": 1})


def test_run_ends_when_the_role_is_gone_that_its_method_needs(client: Peer, work: Work) -> None:
    harness = client.harness
    begin(client)
    client.lose()
    client.settle()
    harness.state.restrict({"work": Access(frozenset({"worker"}))})
    harness.loop.run_until_complete(harness.state.cut_denied_streams())
    for _ in range(3):
        harness.turn()
    assert (work.closed, runs_of(harness).ended) == (1, {"cancelled": 1})


def login(harness: Harness, key: str = "") -> Peer:
    """Return a client of `ada` whose session is bound to a key."""
    peer = harness.connect()
    if key:
        harness.in_loop(lambda: peer.protocol.prove(key))
    peer.use(harness.registry.open("ada", client="", address="", wall=harness.clock.wall(), key=key))
    return peer


@pytest.mark.parametrize("is_bound", [True, False])
def test_run_of_a_bound_session_is_for_bound_sessions_alone(
    harness: Harness, store: MemoryRuns, work: Work, is_bound: bool
) -> None:
    begin(login(harness, "device:phone"))
    other = login(harness, "device:tablet" if is_bound else "")
    answers = attach(other)
    other.send(other.request(7, "stream.list"), other.request(8, "stream.cancel", {"id": ID}))
    listed, cancelled = [answer for answer in other.settle() if answer.stream > 1]
    assert [run["id"] for run in listed.value] == [ID] * is_bound
    if is_bound:
        assert items(answers) == [0, 1, 2]
        assert cancelled.value == {"cancelled": True}
    else:
        assert refusal(answers)[0] == Code.PERMISSION_DENIED
        assert cancelled.code == Code.PERMISSION_DENIED
        assert work.closed == 0


def rotate(client: Peer) -> None:
    registry, wall = client.harness.registry, client.harness.clock.wall()
    token = client.opened.refresh_token
    client.harness.in_loop(lambda: registry.refresh(token, client="", address="", wall=wall))


def test_cancel_with_a_token_that_was_rotated_elsewhere_ends_the_attachment_only(
    client: Peer, work: Work
) -> None:
    begin(client)
    rotate(client)
    client.send(client.frame(CANCEL, 1))
    (cut,) = [answer for answer in client.settle() if answer.kind is Kind.ERROR]
    assert (cut.error.details["reason"], cut.error.details["detached"]) == ("token_rotated", True)
    assert work.closed == 0


def test_attachment_with_a_token_that_was_rotated_elsewhere_is_cut_after_the_grace(
    client: Peer, work: Work
) -> None:
    begin(client)
    rotate(client)
    pass_time(client.harness, 61.0)
    (cut,) = [answer for answer in client.settle() if answer.kind is Kind.ERROR]
    assert (cut.error.details["reason"], cut.error.details["detached"]) == ("token_rotated", True)
    assert work.closed == 0


# --- the end of a run ------------------------------------------------------------------------------------


def test_run_without_a_reader_is_abandoned(client: Peer, work: Work) -> None:
    begin(client)
    pass_time(client.harness, ABANDON_AFTER / 4)
    client.send(client.end())
    client.settle()
    pass_time(client.harness, ABANDON_AFTER / 2)
    other = again(client)
    attach(other)
    other.send(other.end())
    other.settle()
    pass_time(client.harness, ABANDON_AFTER - 1)  # counted from the last reader
    assert work.closed == 0
    pass_time(client.harness, 3)
    assert work.closed == 1
    other = again(client)
    assert attach(other)[-1].error.details == {"reason": "abandoned"}


def test_list_and_cancel_of_runs(client: Peer, work: Work) -> None:
    begin(client)
    other = again(client)

    def listed() -> dict[str, Any]:
        other.send(other.request(7, "stream.list"))
        ((found,),) = [answer.value for answer in other.settle()]
        return dict(found)

    since = client.harness.clock.wall()
    shown = {"id": ID, "method": "work", "first": 0, "next": 3, "since": since}
    shown |= {"session": client.opened.session.id, "address": client.protocol.peer}
    assert listed() == {**shown, "state": "running", "attached": True}
    for is_cancelled in (True, False):
        other.send(other.request(8, "stream.cancel", {"id": ID}))
        (answer,) = other.settle()
        assert answer.value == {"cancelled": is_cancelled}
    assert listed() == {**shown, "state": "ended", "attached": False}
    assert client.settle()[-1].error.details == {"reason": "caller"}
    assert work.closed == 1


def test_run_of_a_method_that_this_server_does_not_have_is_neither_listed_nor_cancelled(
    client: Peer, work: Work
) -> None:
    """Servers that share a store may serve different versions of an application."""
    begin(client)
    other = again(client)
    del client.harness.state.methods["work"]
    other.send(other.request(7, "stream.list"), other.request(8, "stream.cancel", {"id": ID}))
    listed, cancelled = other.settle()
    assert (listed.value, cancelled.code, work.closed) == ([], Code.PERMISSION_DENIED, 0)


def test_run_whose_end_another_process_has_written_stops(client: Peer, work: Work, store: MemoryRuns) -> None:
    """The owner stood still for so long that others took it for lost."""
    begin(client)
    ((key, state),) = store.table.runs("ada")
    harness = client.harness
    harness.in_loop(lambda: store.table.append(key, state.info.generation, 3, [], owner_lost(3), 0))
    *_, end = client.settle()
    assert (end.code, end.error.details) == (Code.UNKNOWN, {"reason": "owner_lost", "items": 3})
    assert (work.closed, len(runs_of(harness))) == (1, 0)
    assert attach(again(client), 3)[-1].body == end.body


def test_runs_end_with_the_server(client: Peer, work: Work) -> None:
    begin(client)
    client.harness.in_loop(client.harness.state.runs.close)
    assert client.settle()[-1].error.details == {"reason": "draining"}
    assert (work.closed, len(runs_of(client.harness))) == (1, 0)


def test_context_of_a_durable_method_outlives_the_connection(client: Peer, work: Work) -> None:
    begin(client)
    (context,) = work.contexts
    assert (context.user, context.peer, context.connection) == ("ada", client.protocol.peer, f"run {ID}")
    assert context.peer_certificate() is None
    assert not context.stopping.is_set()
    assert context.wall() == client.harness.clock.wall()
    assert context.now() == client.harness.clock.now()
    assert client.harness.loop.run_until_complete(context.find_clients()) == []
    assert context.send_event("note", 1)
    assert [answer.kind for answer in client.settle()] == [Kind.EVENT]
    client.lose()
    client.settle()
    assert not context.send_event("note", 2)
    assert not context.cancelled
    finish(again(client), work)
    assert context.cancelled


def test_method_calls_the_client_on_whichever_connection_it_has(harness: Harness) -> None:
    async def work(context: Context) -> AsyncIterator[Any]:
        for _ in range(2):
            yield 0
            try:
                yield await context.client.call("approve")
            except Unavailable:
                yield "unavailable"

    harness.add_method(work, "work", durable=True)
    harness.allow_calls()
    harness.allow_durable()
    client = harness.connect("ada")
    answers = begin(client)
    assert items(answers) == [0, "unavailable", 0, "unavailable"]
    client.handle("approve")
    client.send(client.open("work", {}, stream=2, resume={"id": "2", "from": 0}))
    (call,) = [answer for answer in client.settle() if answer.kind is Kind.CALL]
    client.send(client.result(call.stream, "yes"))
    assert items(client.settle())[0] == "yes"


# --- stores that are slow or away --------------------------------------------------------------------------


class SlowRuns(MemoryRuns):
    """A store whose openings wait for `may_open`, and fail while it is `away`."""

    def __init__(self, harness: Harness) -> None:
        super().__init__(RunTable(RunLimits()), harness.clock.now)
        self.may_open = asyncio.Event()
        self.away = False

    async def open(self, key: RunKey, opening: Opening) -> tuple[bool, RunState]:
        await self.may_open.wait()
        if self.away:
            raise Unavailable("the store is away", {"retry_after_ms": 5})
        return await super().open(key, opening)


@pytest.fixture
def slow(harness: Harness, work: Work) -> SlowRuns:
    harness.allow_streams()
    store = SlowRuns(harness)
    serve_runs(harness.state, store, ABANDON_AFTER)
    return store


def test_open_while_the_store_is_away_is_refused(harness: Harness, slow: SlowRuns, work: Work) -> None:
    slow.away = True
    slow.may_open.set()
    client = harness.connect("ada")
    assert refusal(begin(client)) == (Code.UNAVAILABLE, {"retry_after_ms": 5})
    assert work.started == 0


def test_two_first_opens_while_the_store_opens_start_one_run(
    harness: Harness, slow: SlowRuns, work: Work
) -> None:
    first = harness.connect("ada")
    second = again(first)
    for peer in (first, second):
        begin(peer)
    attach(third := again(first))  # and one that attaches while the run starts
    harness.in_loop(slow.may_open.set)
    older, newer, newest = [peer.settle() for peer in (first, second, third)]
    assert work.started == 1
    assert items(newest) == [0, 1, 2]
    for answers in (older, newer):
        assert answers[-1].error.details == {"reason": "resumed_elsewhere", "detached": True}


@pytest.mark.parametrize("how", ["lost", "end", "cancel"])
@pytest.mark.parametrize("is_away", [False, True])
def test_connection_that_is_cut_while_the_store_opens_leaves_no_run_that_nothing_runs(
    harness: Harness, slow: SlowRuns, work: Work, how: str, is_away: bool
) -> None:
    client = harness.connect("ada")
    begin(client)
    if how == "lost":
        client.lose()
    else:
        client.send(client.end() if how == "end" else client.frame(CANCEL, 1))
    client.settle()
    slow.away = is_away
    harness.in_loop(slow.may_open.set)
    for _ in range(4):
        harness.turn()
    assert work.started == (not is_away)
    is_cancelled = how == "cancel" and not is_away
    assert work.closed == is_cancelled
    for key, state in slow.table.runs():
        assert (key.id, state.is_attached, state.end is not None) == (ID, False, is_cancelled)


@pytest.mark.parametrize(
    ("key", "params", "is_cancelled"),
    [("device:tablet", None, True), ("", None, False), ("", {"n": 9}, False)],
    ids=["as bound", "unbound", "unbound, other params"],
)
def test_cancel_while_the_store_opens_needs_an_attachment_that_is_accepted(
    harness: Harness, slow: SlowRuns, work: Work, key: str, params: Any, is_cancelled: bool
) -> None:
    slow.may_open.set()
    begin(login(harness, "device:phone"))
    harness.in_loop(slow.may_open.clear)
    other = login(harness, key)
    attach(other, 0, params)
    other.send(other.frame(CANCEL, 1))
    other.settle()
    harness.in_loop(slow.may_open.set)
    other.settle()
    assert work.closed == is_cancelled


def test_accepted_of_a_reader_ahead_of_its_log_fits_its_open(
    harness: Harness, slow: SlowRuns, work: Work
) -> None:
    """A failover has lost items that the client has, and the owner has not written them back yet."""
    slow.table = RunTable(RunLimits(), may_lag=True)
    slow.watch, slow.unwatch = slow.table.watch, slow.table.unwatch
    slow.may_open.set()
    client = harness.connect("ada")
    begin(client)
    info = accepted(attach(again(client), 5))
    assert (info["first"], info["from"], info["next"]) == (0, 5, 5)


def test_server_without_durable_methods_or_streams_announces_none(harness: Harness) -> None:
    harness.allow_streams()
    for streams in (LIMITS, None):
        harness.state.settings = replace(harness.state.settings, streams=streams)
        if streams is None:
            Work(harness)
        serve_runs(harness.state, MemoryRuns(RunTable(RunLimits()), harness.clock.now), 1.0)
        assert harness.state.runs is None
    assert "durable" not in (harness.connect("ada").welcome.value.get("streams") or {})
