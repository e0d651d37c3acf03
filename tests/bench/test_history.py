"""The checker of histories: what breaks a promise, and what does not."""

from __future__ import annotations

from collections import Counter

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
    """A history with one session at the start, opened at 0."""

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

    def tried(
        self, verdict: Verdict, at: float, node: str = HERE, token: Token | None = None, census: str = ""
    ) -> Story:
        self.history.probes.append(Probe(token or self.token, node, at, at + 0.01, verdict, census, "CODE"))
        return self

    @property
    def broken(self) -> list[str]:
        return self.history.violations()


def test_live_session_may_be_accepted_and_unavailable() -> None:
    story = Story().tried(ACCEPTED, 1.0).tried(UNKNOWN, 2.0).tried(ACCEPTED, 3.0, THERE, census="at the end")
    assert story.broken == []


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
    story = Story()
    begin(story.token.replaced, 1.0)
    token = story.history.refreshed(story.token, HERE, 1.1, may_be_lost=may_be_lost)
    story.history.cut_offs.append(CutOff(THERE, 2.0, 3.0))
    assert (story.tried(REFUSED, at, node, token, census).broken == []) is is_excused


def test_live_session_that_is_refused_is_lost() -> None:
    assert Story().tried(REFUSED, 1.0).broken == [
        "session 0, token 0 was refused here although nothing has ended it: CODE"
    ]


def test_session_that_may_be_lost_may_be_refused() -> None:
    story = Story()
    story.session.may_be_lost = True
    assert story.tried(REFUSED, 1.0).broken == []


@pytest.mark.parametrize("verdict", [ACCEPTED, REFUSED])
def test_both_answers_are_right_while_a_revocation_is_not_acknowledged(verdict: Verdict) -> None:
    assert Story().revoked(10.0, None).tried(verdict, 11.0).tried(verdict, 99.0, THERE).broken == []


def test_refusal_before_the_revocation_was_sent_is_a_loss() -> None:
    assert Story().revoked(10.0).tried(REFUSED, 9.0).broken


@pytest.mark.parametrize(("node", "bound"), [(HERE, HERE_S), (THERE, ELSEWHERE_S)])
def test_revoked_session_may_be_accepted_until_the_bound_of_the_server(node: str, bound: float) -> None:
    assert Story().revoked(10.0, 10.1).tried(ACCEPTED, 10.1 + bound - 0.1, node).broken == []
    (sentence,) = Story().revoked(10.0, 10.1).tried(ACCEPTED, 10.1 + bound + 0.5, node).broken
    assert sentence == f"session 0, token 0 was accepted {node} 0.5 s after the latest time for it"


def test_server_that_was_cut_off_has_its_time_from_the_recovery_on() -> None:
    def story(at: float) -> Story:
        made = Story().revoked(10.0, 10.1).tried(ACCEPTED, at, THERE)
        made.history.cut_offs.append(CutOff(THERE, 12.0, 20.0))
        return made

    assert story(20.0 + ELSEWHERE_S - 0.1).broken == []
    assert story(20.0 + ELSEWHERE_S + 0.1).broken


def test_revocation_of_a_server_that_is_cut_off_reaches_others_after_its_recovery() -> None:
    def story(at: float) -> Story:
        made = Story().revoked(10.0, 10.1).tried(ACCEPTED, at, THERE)
        made.history.cut_offs.append(CutOff(HERE, 9.0, 20.0))
        return made

    assert story(20.0 + ELSEWHERE_S - 0.1).broken == []
    assert story(20.0 + ELSEWHERE_S + 0.1).broken


@pytest.mark.parametrize(
    "cut_off", [CutOff(HERE, 11.0, 20.0), CutOff(THERE, 16.0, 20.0), CutOff(THERE, 5.0, 9.0)]
)
def test_other_outages_do_not_extend_the_time(cut_off: CutOff) -> None:
    for node in (HERE, THERE):
        story = Story().revoked(10.0, 10.1).tried(ACCEPTED, 15.5, node)
        story.history.cut_offs.append(cut_off)
        assert story.broken


def test_replaced_token_is_revoked_and_the_new_one_is_not() -> None:
    story = Story()
    begin(story.token.replaced, 5.0)
    new = story.history.refreshed(story.token, HERE, 5.1)
    story.tried(REFUSED, 6.5).tried(ACCEPTED, 6.5, token=new)
    assert story.broken == []
    assert Story.tried(story, ACCEPTED, 6.5).broken
    assert new.name == "session 0, token 1"


def test_opening_beside_as_many_as_permitted_breaks_the_limit() -> None:
    story = Story(per_user=2)
    story.history.opened(1.0, 1.1)
    assert story.broken == []
    story.history.opened(2.0, 2.1)
    assert story.broken == ["session 2 was opened beside 2 live ones"]


@pytest.mark.parametrize(("verdict", "is_broken"), [(REFUSED, False), (ACCEPTED, True)])
def test_session_that_a_failover_lost_makes_room(verdict: Verdict, is_broken: bool) -> None:
    story = Story(per_user=2)
    lost = story.history.opened(1.0, 1.1, may_be_lost=True)
    story.history.opened(2.0, 2.1)
    story.tried(verdict, 9.0, token=lost, census="after the fault")
    assert story.broken == (["session 2 was opened beside 2 live ones"] if is_broken else [])


def test_session_whose_revocation_was_sent_makes_room() -> None:
    story = Story(per_user=1).revoked(1.0, None)
    story.history.opened(2.0, 2.1)
    assert story.broken == []


def test_census_counts_sessions_and_tokens_of_each() -> None:
    story = Story(per_user=1)
    story.session.end.sent = 0.5
    begin(story.token.replaced, 0.6)
    new = story.history.refreshed(story.token, HERE, 900.0)
    other = story.history.opened(1.0, 1.1)
    for token in (story.token, new, other):
        story.tried(ACCEPTED, 900.0, token=token, census="at the end")
    assert story.broken == [
        "2 sessions are accepted here, at the end",
        "2 tokens of session 0 are accepted here, at the end",
    ]


def test_no_answer_in_a_census_is_a_fault() -> None:
    assert Story().tried(UNKNOWN, 9.0, census="at the end").broken == [
        "session 0, token 0 gets no answer here, at the end"
    ]


@pytest.mark.parametrize(
    ("answers", "runs", "broken"),
    [
        (["a", "a"], 1, []),
        ([], 1, []),
        (["a", "b"], 1, ["the request k got different answers"]),
        (["a"], 0, ["the request k was answered and did not run"]),
        (["a"], 2, ["the request k ran 2 times"]),
        ([], 2, ["the request k ran 2 times"]),
    ],
)
def test_request_with_a_key_runs_once(answers: list[str], runs: int, broken: list[str]) -> None:
    story = Story()
    for answer in answers:
        story.history.answered("k", answer)
    story.history.ran(Counter({"k": runs}))
    assert story.broken == broken


def test_request_may_be_repeated_by_a_store_that_lost_its_answer() -> None:
    story = Story()
    for answer in "ab":
        story.history.answered("k", answer, may_repeat=True)
    story.history.ran(Counter({"k": 2}))
    assert story.broken == []


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


def test_faults_of_a_cell_are_violations() -> None:
    story = Story()
    story.history.faults.append("the operation got INTERNAL")
    assert story.broken == ["the operation got INTERNAL"]
