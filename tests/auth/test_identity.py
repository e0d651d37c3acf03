"""Schemes of embedding programs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from zcproto.auth import CallableAuthenticator, Identity
from zcproto.auth.identity import Answer


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(
    ("answer", "identity"),
    [
        (None, None),
        ("alice", Identity("alice", False)),
        (Identity("alice"), Identity("alice", False)),
        (Identity("root", operator=True), Identity("root", True)),
        ("x" * 128, Identity("x" * 128)),
    ],
)
async def test_answer_becomes_an_identity(answer: Answer, identity: Identity | None, waits: bool) -> None:
    seen: list[tuple[Mapping[str, Any], str]] = []

    def plain(params: Mapping[str, Any], address: str) -> Answer:
        seen.append((params, address))
        return answer

    async def waiting(params: Mapping[str, Any], address: str) -> Answer:
        await asyncio.sleep(0)
        return plain(params, address)

    authenticator = CallableAuthenticator("own", waiting if waits else plain)
    assert authenticator.scheme == "own"
    result = authenticator.authenticate({"scheme": "own", "ticket": b"t"}, "192.0.2.1")
    if waits:
        assert not isinstance(result, Identity | None)
        result = await result
    assert result == identity
    assert seen == [({"scheme": "own", "ticket": b"t"}, "192.0.2.1")]


@pytest.mark.parametrize("answer", [True, False, 0, 1, b"alice", ["alice"], ("alice", True), object()])
async def test_answer_of_another_type_is_refused(answer: Any) -> None:
    async def waiting(params: Mapping[str, Any], address: str) -> Any:
        return answer

    with pytest.raises(TypeError, match=type(answer).__name__):
        CallableAuthenticator("own", lambda params, address: answer).authenticate({}, "")
    result = CallableAuthenticator("own", waiting).authenticate({}, "")
    assert result is not None
    assert not isinstance(result, Identity)
    with pytest.raises(TypeError, match="'own'"):
        await result


@pytest.mark.parametrize("name", ["", "x" * 129])
def test_user_name_of_invalid_length_is_refused(name: str) -> None:
    for answer in (name, Identity(name)):
        with pytest.raises(ValueError, match="1 to 128"):
            CallableAuthenticator("own", lambda params, address, answer=answer: answer).authenticate({}, "")
