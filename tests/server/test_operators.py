"""Tests of the operators' methods server.sessions and server.revoke."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import Serve
from tests.server.helpers import AnsweredError, Client
from zcproto.errors import Code
from zcproto.server.protocol_methods import LISTED, REVOKED_AT_ONCE, operator_methods
from zcproto.sessions.token import token_text
from zcproto.wire.frame import NO_TOKEN


def refused(client: Client, method: str, **params: Any) -> AnsweredError:
    with pytest.raises(AnsweredError) as error:
        client.call(method, params)
    return error.value


def test_server_sessions_lists_all_sessions_without_secrets(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as ada, server.client("ada"), server.client("operator") as operator:
        found = operator.call("server.sessions")
        assert [each["user"] for each in found] == ["ada", "ada", "operator"]
        assert [each["operator"] for each in found] == [False, False, True]
        assert operator.call("server.sessions", {"user": "ada"}) == found[:2]
        assert operator.call("server.sessions", {"user": "stranger"}) == []
        own = ada.call("session.info")
        assert found[0].items() >= {**own, "last_used_at": found[0]["last_used_at"]}.items()
        assert found[0]["refresh_expires_at"] == ada.opened["refresh_expires_at"]
        for secret in (ada.token, ada.opened["refresh_token"]):
            assert token_text(secret) not in str(found)
            assert str(secret) not in str(found)


def test_operator_methods_refuse_other_users(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as ada:
        for method in ("server.sessions", "server.revoke"):
            assert refused(ada, method, user="ada").code == Code.PERMISSION_DENIED
            ada.token, token = NO_TOKEN, ada.token
            assert refused(ada, method).code == Code.UNAUTHENTICATED
            ada.token = token
        ada.echo()


def test_server_revoke_by_ids(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve()
    with server.client("ada") as ada, server.client("bob") as bob, server.client("operator") as operator:
        ids = [ada.opened["id"], bob.opened["id"], bob.opened["id"], "A" * 22, "no id"]
        assert operator.call("server.revoke", {"ids": ids}) == {"revoked": 2}
        for client in (ada, bob):
            assert client.event().value == ["session.revoked", {"reason": "revoked by an operator"}]
            assert refused(client, "echo").code == Code.TOKEN_REVOKED
        assert operator.call("server.revoke", {"ids": ids}) == {"revoked": 0}
        operator.echo()
    log = capsys.readouterr().err
    assert '"event":"operator.revoked"' in log
    assert '"operator":"operator"' in log


def test_server_revoke_by_user(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as ada, server.client("bob") as bob, server.client("operator") as operator:
        assert operator.call("server.revoke", {"user": "ada"}) == {"revoked": 1}
        assert operator.call("server.revoke", {"user": "ada"}) == {"revoked": 0}
        assert refused(ada, "echo").code == Code.TOKEN_REVOKED
        bob.echo()


def test_server_revoke_all_includes_the_operator(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as ada, server.client("operator") as operator:
        assert operator.call("server.revoke", {"all": True}) == {"revoked": 2}
        for client in (ada, operator):
            assert refused(client, "echo").code == Code.TOKEN_REVOKED


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"all": False},
        {"ids": ["x"], "all": True},
        {"ids": [], "user": "ada"},
        {"ids": ["x"] * (REVOKED_AT_ONCE + 1)},
        {"ids": [5]},
    ],
)
def test_server_revoke_needs_exactly_one_selector(serve: Serve, params: dict[str, Any]) -> None:
    server = serve()
    with server.client("operator") as operator:
        assert refused(operator, "server.revoke", **params).code == Code.INVALID_ARGUMENT
        operator.echo()


def test_server_sessions_is_bounded(serve: Serve) -> None:
    server = serve()

    def fill() -> None:
        for number in range(LISTED + 10):
            server.server.state.registry.open(
                f"{number:0128}", operator=False, client="c" * 128, address="192.0.2.7", wall=number
            )

    server.in_loop(fill)
    with server.client("operator") as operator:
        found = operator.call("server.sessions")
        assert [int(each["user"]) for each in found] == list(range(LISTED))


def test_operator_methods_are_marked_operator(serve: Serve) -> None:
    server = serve()
    methods = operator_methods(server.server.state)
    assert [method.name for method in methods if method.operator] == ["server.sessions", "server.revoke"]
