"""The table of answers, beyond the contract of stores."""

from __future__ import annotations

import pytest

from tests.stores.contract import KEEP, LEASE, WALL, StoreTime, digest
from zcproto.stores.answers import LATE_MS, AnswerLimits, Answers, Entry, Key
from zcproto.stores.base import ClaimState

BODY = digest("body")


def answered(answers: Answers, user: str, key: str, answer: bytes = b"x") -> None:
    assert answers.claim(user, key, BODY, LEASE).state is ClaimState.NEW
    answers.keep(user, key, answer, KEEP)


def test_entries_and_bytes_are_counted() -> None:
    time = StoreTime()
    answers = Answers(AnswerLimits(), time)
    answered(answers, "alice", "p", 10 * b"x")
    answered(answers, "bob", "p", 7 * b"x")
    answers.claim("bob", "q", BODY, LEASE)
    assert (len(answers), answers.bytes) == (3, 17)
    time.ms += KEEP
    assert answers.expire(10) == 3
    assert (len(answers), answers.bytes) == (0, 0)
    assert answers._users == {}


def test_claim_names_its_process_by_what_follows_the_digest() -> None:
    changed: dict[Key, Entry | None] = {}
    answers = Answers(AnswerLimits(), StoreTime(), changed.__setitem__)
    answers.claim("alice", "p", BODY + b"one", LEASE)
    claims = [answers.claim("alice", "p", BODY + id, LEASE) for id in (b"one", b"two", b"")]
    assert [(claim.state, claim.is_own) for claim in claims] == [
        (ClaimState.RUNNING, True),
        (ClaimState.RUNNING, False),
        (ClaimState.RUNNING, False),
    ]
    assert answers.claim("alice", "p", digest("other") + b"one", LEASE).state is ClaimState.CONFLICT
    answers.keep("alice", "p", b"x", KEEP)
    assert answers.claim("alice", "p", BODY + b"two", LEASE).state is ClaimState.DONE
    kept = changed["alice", "p"]
    assert kept is not None
    assert kept.digest == BODY


def test_expired_claim_of_another_process_is_kept_until_it_is_released_or_late() -> None:
    time = StoreTime()
    answers = Answers(AnswerLimits(), time)
    answers.claim("alice", "p", BODY + b"one", LEASE)
    answers.claim("alice", "q", BODY + b"one", LEASE)
    time.ms += LEASE
    assert answers.expire(10) == 0
    late = answers.claim("alice", "p", BODY + b"two", LEASE)
    assert (late.state, late.has_expired, late.owner) == (ClaimState.RUNNING, True, b"one")
    conflict = answers.claim("alice", "p", digest("other") + b"two", LEASE)
    assert (conflict.state, conflict.has_expired, conflict.owner) == (ClaimState.CONFLICT, True, b"one")
    answers.release("alice", "p")
    assert answers.claim("alice", "p", BODY + b"two", LEASE).state is ClaimState.NEW
    time.ms += LATE_MS
    assert answers.expire(10) == 1
    assert answers.entry("alice", "q") is None


def test_new_answer_replaces_the_first() -> None:
    answers = Answers(AnswerLimits(), StoreTime())
    answered(answers, "alice", "p", 10 * b"x")
    answers.keep("alice", "p", 3 * b"y", KEEP)
    assert answers.claim("alice", "p", BODY, LEASE).answer == b"yyy"
    assert (len(answers), answers.bytes) == (1, 3)


def test_on_change_is_called_for_every_change() -> None:
    reported: list[tuple[Key, Entry | None]] = []
    answers = Answers(
        AnswerLimits(user_count=1), StoreTime(), lambda key, entry: reported.append((key, entry))
    )
    answers.claim("alice", "p", BODY, LEASE)
    answers.keep("alice", "p", b"x", KEEP)
    answers.claim("alice", "q", BODY, LEASE)
    answers.release("alice", "q")
    names = [(key[1], "gone" if entry is None else "there") for key, entry in reported]
    assert names == [
        ("p", "there"),
        ("p", "gone"),
        ("p", "there"),
        ("p", "gone"),
        ("q", "there"),
        ("q", "gone"),
    ]


def test_restored_entry_is_counted_without_on_change() -> None:
    answers = Answers(AnswerLimits(), StoreTime(), lambda key, entry: pytest.fail("nothing was changed"))
    entry = Entry(BODY, WALL + KEEP)
    entry.running, entry.size = False, 9
    answers.restore(("alice", "p"), entry)
    assert answers.entry("alice", "p") is entry
    assert answers.entry("alice", "q") is None
    assert (len(answers), answers.bytes) == (1, 9)
    # The answer itself is stored elsewhere.
    assert answers.claim("alice", "p", BODY, LEASE).answer == b""


@pytest.mark.parametrize("limit", [0, 1, 2, 3])
def test_expire_removes_at_most_the_limit(limit: int) -> None:
    time = StoreTime()
    answers = Answers(AnswerLimits(), time)
    for key in ("p", "q", "r"):
        answers.claim("alice", key, BODY, LEASE)
    answered(answers, "alice", "s")
    time.ms += KEEP
    assert answers.expire(limit) == limit
    assert len(answers) == 4 - limit


def test_user_evicts_no_answer_of_others() -> None:
    answers = Answers(AnswerLimits(count=100, bytes=1_000, user_count=10, user_bytes=50), StoreTime())
    answered(answers, "bob", "p", 50 * b"x")
    for number in range(200):
        answered(answers, "mallory", f"{number}", (number % 51) * b"x")
    assert answers.claim("bob", "p", BODY, LEASE).state is ClaimState.DONE
    assert len(answers) <= 11


def test_lowered_limit_evicts_answers() -> None:
    answers = Answers(AnswerLimits(count=5, bytes=100, user_count=5, user_bytes=30), StoreTime())
    for number in range(9):  # stored under larger limits
        entry = Entry(BODY, WALL + KEEP)
        entry.running, entry.size = False, 20
        answers.restore((f"user-{number % 3}", f"{number}"), entry)
    answered(answers, "user-0", "new", 30 * b"x")
    assert answers.bytes <= 100
    assert [answers.entry("user-0", key) is not None for key in ("0", "3", "6", "new")] == [
        *3 * [False],
        True,
    ]
    assert len(answers) <= 5
