"""A sealed pair can be opened by the holder of the spent refresh token only."""

from __future__ import annotations

from zcproto.sessions.token import TOKEN_SIZE
from zcproto.stores.service import open_pair, seal_pair

SPENT, DIGEST = TOKEN_SIZE * b"s", TOKEN_SIZE * b"d"
TOKEN, REFRESH = TOKEN_SIZE * b"t", TOKEN_SIZE * b"r"


def test_sealed_pair_opens_with_the_spent_token() -> None:
    sealed = seal_pair(SPENT, DIGEST, TOKEN, REFRESH)
    assert TOKEN not in sealed
    assert REFRESH not in sealed
    assert open_pair(SPENT, DIGEST, sealed) == (TOKEN, REFRESH)


def test_sealed_pair_does_not_open_with_another_token_or_for_another_session() -> None:
    sealed = seal_pair(SPENT, DIGEST, TOKEN, REFRESH)
    assert open_pair(REFRESH, DIGEST, sealed) is None
    assert open_pair(SPENT, SPENT, sealed) is None


def test_damaged_pair_does_not_open() -> None:
    sealed = seal_pair(SPENT, DIGEST, TOKEN, REFRESH)
    damaged = [b"", sealed[:-1], sealed + b"x", bytes([sealed[0] ^ 1]) + sealed[1:]]
    assert [open_pair(SPENT, DIGEST, each) for each in damaged] == [None] * 4
