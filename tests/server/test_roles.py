"""Tests of roles: who may call a method, by the application and by the configuration."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Literal

import pytest

from tests.server.conftest import Serve
from tests.server.helpers import PATIENT_CLIENT, Client, ServerThread, eventually
from zcproto import App, Context, Identity
from zcproto.app.app import Access
from zcproto.auth.identity import Channel
from zcproto.client.blocking import BlockingClient, connect_blocking
from zcproto.common.roles import MAX_ROLE, MAX_ROLES, NO_ROLES, is_role, roles_from
from zcproto.config import LogConfig, RoleConfig
from zcproto.errors import Cancelled, Code, ConfigError, PermissionDenied
from zcproto.observe.log import configure_logging
from zcproto.server.access import access_of

OPEN, PROTOCOL = {"any", "who"}, {"server.info"}


class ByName:
    """Gives each user the roles in its name: "ada.admin.billing"."""

    scheme = "name"

    def authenticate(self, params: Any, address: str, channel: Channel) -> Identity:
        user, *roles = params["user"].split(".")
        return Identity(user, roles={*roles})


def application() -> App:
    app = App(authenticators=[ByName()])
    app.method("open", public=True)(lambda: "open")
    app.method("any")(lambda: "any")
    app.method("invoice.create", roles={"billing", "admin"})(lambda: "created")
    app.method("invoice.delete", roles={"admin"})(lambda: "deleted")

    @app.method("who")
    def who(context: Context) -> list[str]:
        return sorted(context.roles)

    return app


def tables(*roles: dict[str, Any]) -> tuple[RoleConfig, ...]:
    return tuple(RoleConfig(**role) for role in roles)


def client_of(server: ServerThread, user: str) -> Client:
    client = server.client()
    client.token = client.call("session.open", {"scheme": "name", "user": user})["token"]
    return client


def listed(client: Client) -> set[str]:
    """Return the methods of the application, and of operators, that `server.info` lists."""
    names = {method["name"] for method in client.call("server.info")["methods"]}
    return {name for name in names if not name.startswith("session.")} - PROTOCOL - {"open"}


# --- in the application --------------------------------------------------------------------------------------


def test_session_needs_one_of_the_roles_of_a_method(serve: Serve) -> None:
    server = serve(application(), users_file=True)
    with client_of(server, "ada") as ada, client_of(server, "bob.billing") as bob:
        assert bob.call("invoice.create") == "created"
        assert bob.call("any") == "any"
        assert bob.call("who") == ["billing"]
        answers = [
            ada.refused("invoice.create"),
            ada.refused("invoice.delete"),
            bob.refused("invoice.delete"),
        ]
        assert {answer.code for answer in answers} == {Code.PERMISSION_DENIED}
        assert len({(answer.message, str(answer.details)) for answer in answers}) == 1
        assert ada.call("open") == "open"


def test_missing_role_is_logged_and_not_answered(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LogConfig(format="json"))
    server = serve(application(), users_file=True)
    with client_of(server, "ada.reader") as ada:
        capsys.readouterr()
        answer = ada.refused("invoice.create")
    assert "billing" not in answer.message
    assert answer.details == {}
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "request.denied" in line]
    event = json.loads(line)
    assert (event["what"], event["user"], event["missing"]) == ("invoice.create", "ada", ["admin", "billing"])
    assert "denied" not in event


def test_server_info_lists_what_the_roles_allow(serve: Serve) -> None:
    server = serve(application(), users_file=True)
    with client_of(server, "ada") as ada, client_of(server, "bob.billing") as bob:
        assert listed(ada) == OPEN
        assert listed(bob) == OPEN | {"invoice.create"}
    with client_of(server, "eve.operator.admin") as eve:
        of_operators = {"server.sessions", "server.revoke", "server.stats"}
        assert listed(eve) == OPEN | {"invoice.create", "invoice.delete"} | of_operators


def test_roles_survive_a_refresh_and_are_listed(serve: Serve) -> None:
    server = serve(application(), users_file=True)
    with client_of(server, "ada.billing.admin") as ada, client_of(server, "eve.operator.x") as eve:
        opened = ada.call("session.open", {"scheme": "name", "user": "ada.billing"})
        refreshed = ada.call("session.refresh", {"refresh_token": opened["refresh_token"]})
        assert ada.call("who", token=refreshed["token"]) == ["billing"]
        found = {each["id"]: each["roles"] for each in eve.call("server.sessions")}
        assert found[opened["id"]] == ["billing"]
        assert sorted(found.values()) == [["admin", "billing"], ["billing"], ["operator", "x"]]


# --- in the configuration ------------------------------------------------------------------------------------


def test_allow_has_the_effect_of_a_role_in_the_code(serve: Serve) -> None:
    roles = [
        {"name": "billing", "allow": ["invoice.*", "any"], "deny": ["invoice.create"]},
        {"name": "support", "allow": ["server.sessions"]},
    ]
    server = serve(application(), users_file=True, auth__role=roles)
    with client_of(server, "ada") as ada, client_of(server, "bob.billing.admin") as bob:
        assert listed(ada) == {"who"}
        assert ada.refused("any").code == Code.PERMISSION_DENIED
        assert listed(bob) == OPEN | {"invoice.delete"}
        assert bob.refused("invoice.create").code == Code.PERMISSION_DENIED
    with client_of(server, "eve.support") as eve, client_of(server, "max.admin") as max_:
        assert listed(eve) == {"who", "server.sessions"}
        assert eve.call("server.sessions")
        assert max_.call("invoice.create") == "created"


def test_denying_role_is_logged(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LogConfig(format="json"))
    server = serve(application(), users_file=True, auth__role=[{"name": "guest", "deny": ["any"]}])
    with client_of(server, "ada.guest") as ada, client_of(server, "bob") as bob:
        assert bob.call("any") == "any"
        capsys.readouterr()
        assert ada.refused("any").code == Code.PERMISSION_DENIED
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "request.denied" in line]
    event = json.loads(line)
    assert event["denied"] == ["guest"]
    assert "missing" not in event


def test_reload_applies_roles_to_open_sessions(serve: Serve) -> None:
    app = application()
    server = serve(app, users_file=True)
    with client_of(server, "ada.guest") as ada:
        assert ada.call("any") == "any"
        reloaded = server.reload(auth__role=[{"name": "guest", "deny": ["any"]}])
        assert [each.key for each in reloaded.applied] == ["auth.role"]
        assert ada.refused("any").code == Code.PERMISSION_DENIED
        calls = server.server.state.methods["any"].calls
        server.reload(auth__role=[])
        assert ada.call("any") == "any"
        method = server.server.state.methods["any"]
        assert (method.calls, method.admits_sessions) == (calls + 1, True)
    assert next(method for method in app if method.name == "any").access is None  # other servers may serve it


@pytest.mark.parametrize("rule", ["deny", "allow"])
def test_reload_that_denies_a_method_cuts_its_streams_of_the_role_only(
    serve: Serve, rule: Literal["deny", "allow"], capsys: pytest.CaptureFixture[str]
) -> None:
    app, gate, ended = application(), asyncio.Event(), []

    @app.method("feed")
    async def feed(context: Context) -> AsyncIterator[int]:
        try:
            yield 1
            await gate.wait()
            yield 2
        finally:
            ended.append(context.user)

    server = serve(app, users_file=True)
    configure_logging(LogConfig(level="info", format="json"))
    denied, allowed = ("ada.guest", "bob.staff")
    role = {"name": "guest", "deny": ["feed"]} if rule == "deny" else {"name": "staff", "allow": ["feed"]}

    def connect(user: str) -> BlockingClient:
        login = {"scheme": "name", "user": user}
        address = f"localhost:{server.port}"
        return connect_blocking(address, login=login, ca_file=server.ca_file, **PATIENT_CLIENT)

    with connect(denied) as ada, connect(allowed) as bob:
        with ada.stream("feed") as cut, ada.stream("feed") as also_cut, bob.stream("feed") as kept:
            assert [next(iter(each)) for each in (cut, also_cut, kept)] == [1, 1, 1]
            server.reload(auth__role=[role])
            for stream in (cut, also_cut):
                with pytest.raises(Cancelled) as error:
                    next(iter(stream))
                assert error.value.details == {"reason": "denied"}
            eventually(lambda: ended == ["ada", "ada"])
            server.in_loop(gate.set)
            assert next(iter(kept)) == 2
        assert ada.call("any") == "any"
        with pytest.raises(PermissionDenied), ada.stream("feed") as stream:
            next(iter(stream))
    assert server.server.state.counters.streams_cut["denied"] == 2
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if "stream.cut" in line]
    assert [(line["user"], line["what"], line["reason"]) for line in lines] == [("ada", "feed", "denied")] * 2


def test_reload_with_an_unknown_method_changes_nothing(serve: Serve) -> None:
    server = serve(application(), users_file=True)
    with client_of(server, "ada") as ada:
        with pytest.raises(ConfigError, match=r"auth.role\[0\].deny: 'anny' matches no method"):
            server.reload(auth__role=[{"name": "guest", "allow": ["any"], "deny": ["anny"]}])
        assert ada.call("any") == "any"


@pytest.mark.parametrize(
    "pattern", ["no.such", "no.*", "open", "session.*", "session.close", "device.*", "server.info", "sess*"]
)
def test_pattern_must_match_a_method_that_needs_a_session(serve: Serve, pattern: str) -> None:
    state = serve(application(), users_file=True).server.state
    with pytest.raises(ConfigError, match="matches no method that needs a session"):
        access_of(state.methods, tables({"name": "guest", "deny": [pattern]}))


def test_star_means_the_methods_of_the_application_only(serve: Serve) -> None:
    state = serve(application(), users_file=True).server.state
    access = access_of(state.methods, tables({"name": "admin", "allow": ["*"]}))
    assert {name for name, each in access.items() if "admin" in each.needed} == {
        *("any", "who", "invoice.create", "invoice.delete")
    }
    access = access_of(state.methods, tables({"name": "admin", "allow": ["server.*"]}))
    assert {name for name, each in access.items() if "admin" in each.needed and name != "invoice.create"} == {
        *("server.sessions", "server.revoke", "server.stats", "invoice.delete")
    }


def test_all_faults_of_patterns_are_reported(serve: Serve) -> None:
    state = serve(application(), users_file=True).server.state
    with pytest.raises(ConfigError) as caught:
        access_of(state.methods, tables({"name": "a", "allow": ["x", "any"]}, {"name": "b", "deny": ["y"]}))
    assert [fault.split(":")[0] for fault in caught.value.faults] == [
        "auth.role[0].allow",
        "auth.role[1].deny",
    ]


# --- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("needed", "denied", "roles", "admitted"),
    [
        ("", "", "", True),
        ("a b", "", "b", True),
        ("a", "", "", False),
        ("a", "", "b", False),
        ("", "a", "b", True),
        ("", "a", "a b", False),
        ("a", "b", "a b", False),
    ],
)
def test_access_needs_one_role_and_no_denied_one(
    needed: str, denied: str, roles: str, admitted: bool
) -> None:
    access = Access(frozenset(needed.split()), frozenset(denied.split()))
    assert access.admits(frozenset(roles.split())) is admitted


def test_roles_have_names_of_a_small_alphabet() -> None:
    assert roles_from(()) == NO_ROLES
    assert all(map(is_role, ["a", "A.b", "team:ops", "x" * MAX_ROLE, "a/b@c-d", "_"]))
    assert not any(map(is_role, ["", "a b", "x" * (MAX_ROLE + 1), "-a", ":a", "ä", "a\n", "a,b", 5, None]))
    with pytest.raises(TypeError, match="give a set of names"):
        roles_from("admin")
    with pytest.raises(ValueError, match="a name has 1 to 64 characters"):
        roles_from({"a b"})
    with pytest.raises(ValueError, match="at most 32 names"):
        roles_from({f"r{number}" for number in range(MAX_ROLES + 1)})
