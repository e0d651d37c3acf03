"""The checker of histories: what breaks a promise, and what does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from bench.scenarios.history import (
    ELSEWHERE_S,
    HERE_S,
    CutOff,
    History,
    Probe,
    Session,
    Token,
    Verdict,
    acknowledge,
    begin,
)

HERE, THERE = "here", "elsewhere"
ACCEPTED, REFUSED, UNKNOWN = Verdict


class Story:
    """A history with one session at the start, opened at 0. Its methods return it, so that one follows another."""

    def __init__(self, per_user: int = 2) -> None:
        self.history = History(per_user)
        self.token = self.history.opened(-0.1, 0.0)

    @property
    def session(self) -> Session:
        return self.token.session

    def revoked(self, sent: float = 10.0, acked: float | None = 10.1) -> Story:
        begin(self.session.end, sent)
        if acked is not None:
            acknowledge(self.session.end, HERE, acked)
        return self

    def cut_off(self, node: str, since: float, until: float) -> Story:
        self.history.cut_offs.append(CutOff(node, since, until))
        return self

    def tried(
        self, verdict: Verdict, at: float, node: str = HERE, token: Token | None = None, census: str = ""
    ) -> Story:
        self.history.probes.append(Probe(token or self.token, node, at, at + 0.01, verdict, census, "CODE"))
        return self

    def refreshed(self, may_be_lost: bool = False) -> Token:
        begin(self.token.replaced, 1.0)
        return self.history.refreshed(self.token, HERE, 1.1, may_be_lost=may_be_lost)

    def may_be_lost(self) -> Story:
        self.session.may_be_lost = True
        return self

    @property
    def broken(self) -> list[str]:
        return self.history.violations()


BOUND_THERE = 20.0 + ELSEWHERE_S
"""When a server elsewhere refuses what was revoked, if the network was cut off until 20 s."""


@pytest.mark.parametrize(
    ("story", "is_broken"),
    [
        (lambda: Story().tried(ACCEPTED, 1.0).tried(UNKNOWN, 2.0).tried(ACCEPTED, 3.0, THERE), False),
        (lambda: Story().tried(UNKNOWN, 9.0, census="at the end"), True),
        (lambda: Story().tried(REFUSED, 1.0), True),
        (lambda: Story().may_be_lost().tried(REFUSED, 1.0), False),
        # a revocation that is not acknowledged
        (lambda: Story().revoked(10.0, None).tried(ACCEPTED, 11.0).tried(ACCEPTED, 99.0, THERE), False),
        (lambda: Story().revoked(10.0, None).tried(REFUSED, 11.0).tried(REFUSED, 99.0, THERE), False),
        (lambda: Story().revoked(10.0).tried(REFUSED, 9.0), True),  # before it was sent
        # the bound of the server
        (lambda: Story().revoked().tried(ACCEPTED, 10.0 + HERE_S), False),
        (lambda: Story().revoked().tried(ACCEPTED, 10.2 + HERE_S), True),
        (lambda: Story().revoked().tried(ACCEPTED, 10.0 + ELSEWHERE_S, THERE), False),
        (lambda: Story().revoked().tried(ACCEPTED, 10.2 + ELSEWHERE_S, THERE), True),
        # a server that was cut off, and a revocation of one
        (lambda: Story().revoked().cut_off(THERE, 12, 20).tried(ACCEPTED, BOUND_THERE - 0.1, THERE), False),
        (lambda: Story().revoked().cut_off(THERE, 12, 20).tried(ACCEPTED, BOUND_THERE + 0.1, THERE), True),
        (lambda: Story().revoked().cut_off(HERE, 9, 20).tried(ACCEPTED, BOUND_THERE - 0.1, THERE), False),
        (lambda: Story().revoked().cut_off(HERE, 9, 20).tried(ACCEPTED, BOUND_THERE + 0.1, THERE), True),
        # other outages do not extend the time
        (lambda: Story().revoked().cut_off(HERE, 11, 20).tried(ACCEPTED, 15.5), True),
        (lambda: Story().revoked().cut_off(HERE, 11, 20).tried(ACCEPTED, 15.5, THERE), True),
        (lambda: Story().revoked().cut_off(THERE, 16, 20).tried(ACCEPTED, 15.5, THERE), True),
        (lambda: Story().revoked().cut_off(THERE, 5, 9).tried(ACCEPTED, 15.5, THERE), True),
    ],
)
def test_answer_breaks_a_promise_or_not(story: Callable[[], Story], is_broken: bool) -> None:
    assert bool(story().broken) is is_broken


def test_violation_names_session_server_and_time() -> None:
    (refused,) = Story().tried(REFUSED, 1.0).broken
    assert refused == "session 0, token 0 was refused here although nothing has ended it: CODE"
    (late,) = Story().revoked().tried(ACCEPTED, 10.1 + HERE_S + 0.5).broken
    assert late == "session 0, token 0 was accepted here 0.5 s after the latest time for it"


@pytest.mark.parametrize(
    ("may_be_lost", "node", "at", "census", "is_excused"),
    [
        (True, THERE, 4.0, "", True),
        (True, THERE, 3.0 + ELSEWHERE_S + 0.1, "", False),
        (True, THERE, 1.5, "", False),
        (True, THERE, 4.0, "at the end", False),
        (True, HERE, 4.0, "", False),
        (False, THERE, 4.0, "", False),
    ],
)
def test_lost_refresh_is_excused_elsewhere_until_its_server_has_repeated_it(
    may_be_lost: bool, node: str, at: float, census: str, is_excused: bool
) -> None:
    story = Story().cut_off(THERE, 2.0, 3.0)
    token = story.refreshed(may_be_lost)
    assert (story.tried(REFUSED, at, node, token, census).broken == []) is is_excused


def test_replaced_token_is_revoked_and_the_new_one_is_not() -> None:
    story = Story()
    new = story.refreshed()
    assert story.tried(REFUSED, 6.5).tried(ACCEPTED, 6.5, token=new).broken == []
    assert story.tried(ACCEPTED, 6.5).broken
    assert new.name == "session 0, token 1"


@pytest.mark.parametrize(
    ("verdict", "broken"),
    [(None, True), (REFUSED, False), (ACCEPTED, True)],
    ids=["permitted number is open", "a failover lost one", "a failover kept it"],
)
def test_opening_beside_as_many_as_permitted_breaks_the_limit(verdict: Verdict | None, broken: bool) -> None:
    story = Story(per_user=2)
    other = story.history.opened(1.0, 1.1, may_be_lost=verdict is not None)
    assert story.broken == []
    story.history.opened(2.0, 2.1)
    if verdict is not None:
        story.tried(verdict, 9.0, token=other, census="after the fault")
    assert story.broken == (["session 2 was opened beside 2 live ones"] if broken else [])


def test_session_whose_revocation_was_sent_makes_room() -> None:
    story = Story(per_user=1).revoked(1.0, None)
    story.history.opened(2.0, 2.1)
    assert story.broken == []


def test_census_counts_sessions_and_tokens_of_each() -> None:
    story = Story(per_user=1)
    story.session.end.sent = 0.5
    new = story.refreshed()
    other = story.history.opened(1.0, 1.1)
    for token in (story.token, new, other):
        story.tried(ACCEPTED, 1.2, token=token, census="at the end")
    assert story.broken == [
        "2 sessions are accepted here, at the end",
        "2 tokens of session 0 are accepted here, at the end",
    ]


@pytest.mark.parametrize(
    ("answers", "may_repeat", "runs", "broken"),
    [
        ("a", False, 1, []),
        ("", False, 1, []),
        ("ab", False, 1, ["the request k got different answers"]),
        ("a", False, 0, ["the request k was answered and did not run"]),
        ("a", False, 2, ["the request k ran 2 times"]),
        ("ab", True, 2, []),  # a store that lost its answer
    ],
)
def test_request_with_a_key_runs_once(answers: str, may_repeat: bool, runs: int, broken: list[str]) -> None:
    story = Story()
    for answer in answers:
        story.history.answered("k", answer, may_repeat=may_repeat)
    story.history.ran(Counter({"k": runs}))
    assert story.broken == broken


@pytest.mark.parametrize(("shown", "holds"), [(5_000, True), (4_001, True), (3_999, False)])
def test_last_use_is_not_forgotten(shown: int, holds: bool) -> None:
    story = Story()
    story.history.used(story.session, 5_000)
    story.history.shown_use(story.session, THERE, shown)
    assert (story.broken == []) is holds


def test_first_acknowledgement_counts() -> None:
    end = Story().session.end
    for acked in (3.0, 2.0, 4.0):
        acknowledge(end, f"node {acked}", acked)
        begin(end, acked)
    assert (end.sent, end.acked, end.node) == (2.0, 2.0, "node 2.0")
