"""Tests of `server.*` and of the default application over real TLS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest

from tests.server.conftest import Serve
from tests.server.helpers import RESPONSE, Client, wall
from zcproto.app.app import App
from zcproto.common.roles import OPERATORS
from zcproto.errors import Code
from zcproto.server.protocol_methods import LISTED, server_methods
from zcproto.sessions.token import token_text
from zcproto.wire.frame import MIN_LENGTH, NO_TOKEN

# --- server.info and server.stats ----------------------------------------------------------------------------


def names(client: Client) -> list[str]:
    return [method["name"] for method in client.call("server.info")["methods"]]


def test_server_info_lists_callable_methods_only(serve: Serve) -> None:
    app = App()

    @app.method("news", public=True)
    def news(limit: int = 10) -> list[str]:
        """The latest news."""
        return []

    app.method("shout")(lambda: None)
    app.method("restart", roles=OPERATORS)(lambda: None)
    server = serve(app)
    public = ["news", "server.info", "session.open", "session.refresh"]
    sessions = [f"session.{name}" for name in ("attach", "close", "handle", "info", "list", "revoke")]
    ours = sorted([*public, *sessions, "shout"])
    for_operators = ["server.revoke", "server.sessions", "server.stats"]
    with server.client() as stranger, server.client("ada") as user, server.client("operator") as operator:
        assert names(stranger) == public
        assert names(user) == ours
        assert names(operator) == sorted([*ours, "restart", *for_operators])
        info = stranger.call("server.info")
        assert info["methods"][0] == {
            "name": "news",
            "doc": "The latest news.",
            "shape": "unary",
            "params": [{"name": "limit", "type": "int", "required": False}],
            "schema": {
                "params": {
                    "type": "object",
                    "properties": {"limit": {"type": "integer", "default": 10}},
                    "additionalProperties": False,
                },
                "result": {"type": "array", "items": {"type": "string"}},
            },
        }
        assert info["versions"] == [1]
        assert (info["pins"], info["pins_next"]) == (server.server.pins, None)
        assert abs(info["time"] - wall()) < 5_000


Choice = Literal[tuple(f"choice {number}" for number in range(400))]


def test_schemas_of_server_info_are_bounded(serve: Serve) -> None:
    app = App()
    for number in range(10):

        @app.method(f"m{number}")
        def choose(choice: Choice) -> None:
            """Take one of many."""

    nested: Any = int
    for _ in range(30):
        nested = list[nested]

    def deep(deep: Any) -> None:
        """Take what clients could not read the schema of."""

    deep.__annotations__["deep"] = nested
    large = next(iter(app)).schema_size
    app.method("deep")(deep)
    with serve(app, **{"limits.max_frame_bytes": 4 * 3 * large + MIN_LENGTH}).client("ada") as client:
        listed = {method["name"]: "schema" in method for method in client.call("server.info")["methods"]}
    assert [listed[name] for name in ("m0", "m1", "m2", "m3", "m9", "deep")] == [True] * 3 + [False] * 3


def test_schemas_are_made_before_the_first_client(serve: Serve) -> None:
    methods = serve().server.state.methods
    assert [name for name, method in methods.items() if not method._schema_size] == []


def test_methods_of_server_info_can_be_called(serve: Serve) -> None:
    server = serve()
    for user in (None, "ada", "operator"):
        with server.client(user) as client:
            listed = set(names(client))
            for method in server.server.state.methods:
                if method not in ("session.close", "session.revoke"):
                    codes = {Code.UNAUTHENTICATED, Code.PERMISSION_DENIED}
                    client.send(client.request(method))
                    answer = client.answer(client.stream)
                    may = answer.kind == RESPONSE or answer.code not in codes
                    assert may == (method in listed), method


def test_server_stats_refuses_other_users(connect: Callable[..., Client], user: str) -> None:
    assert connect(user).refused("server.stats").code == Code.PERMISSION_DENIED
    assert connect().refused("server.stats").code == Code.UNAUTHENTICATED


def test_server_stats_counts_events(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as ada, server.client("operator") as operator:
        ada.echo()
        ada.refused("no.such.method")
        stats = operator.call("server.stats")
        assert stats["connections"] == stats["tcp_connections"] == stats["handshakes_completed"] == 2
        assert stats["sessions"] == 2
        assert stats["requests"] >= 4
        assert stats["errors"] == {"12": 1}
        assert stats["running"] == stats["handshakes_in_progress"] == 0
        assert stats["rss_bytes"] > 10_000_000
        assert stats["cpu_s"] > 0
        assert stats["longest_pause_s"] >= stats["longest_own_pause_s"] >= 0
        assert len(stats["pauses"]) == 11
        ada.close()
        server.until(lambda: len(server.server.state.connections) == 1)
        stats = operator.call("server.stats")
        assert (stats["connections"], stats["connections_opened"]) == (1, 2)
        assert stats["connections_ended"] == {"closed_by_peer": 1}
        assert stats["sessions"] == 2


# --- the default application ------------------------------------------------------------------------------


def test_echo_returns_its_params(connect: Callable[..., Client], user: str) -> None:
    client = connect(user)
    params = {"a": [1, 2.5, None, True, b"\x00", {"ä": "ö"}]}
    assert client.call("echo", params) == params
    assert client.call("echo") == {}


def test_time_returns_the_server_clock(connect: Callable[..., Client], user: str) -> None:
    assert abs(connect(user).call("time") - wall()) < 5_000


def test_sleep_waits_and_is_bounded(connect: Callable[..., Client], user: str) -> None:
    client = connect(user)
    assert client.call("sleep", {"ms": 0}) == {}
    assert client.call("sleep", {"ms": 1}) == {}
    for ms in (-1, 3_600_001):
        assert client.refused("sleep", {"ms": ms}).code == Code.INVALID_ARGUMENT
    client.send(client.request("sleep", {"ms": 3_600_000}))
    client.cancel(client.stream)
    assert client.answer(client.stream).code == Code.CANCELLED


def test_default_methods_need_a_session(connect: Callable[..., Client]) -> None:
    client = connect()
    assert {client.refused(method).code for method in ("echo", "repeat", "sleep", "time")} == {
        Code.UNAUTHENTICATED
    }


# --- server.sessions and server.revoke -------------------------------------------------------------------


def test_server_sessions_lists_all_sessions_without_secrets(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as ada, server.client("ada"), server.client("operator") as operator:
        found = operator.call("server.sessions")
        assert [each["user"] for each in found] == ["ada", "ada", "operator"]
        assert [each["roles"] for each in found] == [[], [], ["operator"]]
        assert operator.call("server.sessions", {"user": "ada"}) == found[:2]
        assert operator.call("server.sessions", {"user": "stranger"}) == []
        own = ada.call("session.info")
        del own["connections"]
        assert found[0].items() >= {**own, "last_used_at": found[0]["last_used_at"]}.items()
        assert found[0]["refresh_expires_at"] == ada.opened["refresh_expires_at"]
        for secret in (ada.token, ada.opened["refresh_token"]):
            assert token_text(secret) not in str(found)
            assert str(secret) not in str(found)


def test_operator_methods_refuse_other_users(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as ada:
        for method in ("server.sessions", "server.revoke"):
            assert ada.refused(method, {"user": "ada"}).code == Code.PERMISSION_DENIED
            ada.token, token = NO_TOKEN, ada.token
            assert ada.refused(method).code == Code.UNAUTHENTICATED
            ada.token = token
        ada.echo()


def test_revocations_are_reported_with_who_made_them(serve: Serve) -> None:
    server = serve()
    reported: list[tuple[str, int, bool]] = []
    server.server.state.on_revoked = lambda *revoked: reported.append(revoked)
    with server.client("ada") as ada, server.client("ada") as other, server.client("operator") as operator:
        ada.call("session.revoke", {"id": other.opened["id"]})
        operator.call("server.revoke", {"user": "ada"})
    assert reported == [("user ada", 1, True), ("operator operator", 1, False)]


def test_server_revoke_by_ids(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve()
    with server.client("ada") as ada, server.client("bob") as bob, server.client("operator") as operator:
        ids = [ada.opened["id"], bob.opened["id"], bob.opened["id"], "A" * 22, "no id"]
        assert operator.call("server.revoke", {"ids": ids}) == {"revoked": 2}
        for client in (ada, bob):
            assert client.event().value == ["session.revoked", {"reason": "revoked by an operator"}]
            assert client.refused("echo").code == Code.TOKEN_REVOKED
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
        assert ada.refused("echo").code == Code.TOKEN_REVOKED
        bob.echo()


def test_server_revoke_all_includes_the_operator(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as ada, server.client("operator") as operator:
        assert operator.call("server.revoke", {"all": True}) == {"revoked": 2}
        for client in (ada, operator):
            assert client.refused("echo").code == Code.TOKEN_REVOKED


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"all": False},
        {"ids": ["x"], "all": True},
        {"ids": [], "user": "ada"},
        {"ids": ["x"] * 1_001},
        {"ids": [5]},
    ],
)
def test_server_revoke_needs_exactly_one_selector(serve: Serve, params: dict[str, Any]) -> None:
    server = serve()
    with server.client("operator") as operator:
        assert operator.refused("server.revoke", params).code == Code.INVALID_ARGUMENT
        operator.echo()


def test_server_sessions_is_bounded(serve: Serve) -> None:
    server = serve()

    def fill() -> None:
        for number in range(LISTED + 10):
            server.server.state.registry.open(
                f"{number:0128}", client="c" * 128, address="192.0.2.7", wall=number
            )

    server.in_loop(fill)
    with server.client("operator") as operator:
        found = operator.call("server.sessions")
        assert [int(each["user"]) for each in found] == list(range(LISTED))


def test_operator_methods_are_marked_operator(serve: Serve) -> None:
    server = serve()
    methods = server_methods(server.server.state)
    assert [method.name for method in methods if method.roles == OPERATORS] == [
        "server.sessions",
        "server.revoke",
    ]
