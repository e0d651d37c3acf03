"""What a server with workers does once, and not in each of them."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.server.helpers import AnsweredError, Client, eventually
from tests.server.process import ServerProcess, home_with
from tests.workers.test_processes import CONFIG as PROCESSES
from tests.workers.test_processes import pids, since, zcproto
from zcproto.auth import UserFile
from zcproto.errors import Code

CONFIG = f"""{PROCESSES}
[limits]
login_failures = 3
connections_per_address = 12

[sessions]
per_user = 100

[alerts]
throttled_logins = 3
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, certs: Path) -> Iterator[ServerProcess]:
    home = home_with(tmp_path_factory.mktemp("once"), certs, CONFIG)
    with ServerProcess(home, certs, "--workers", "2") as server:
        yield server


class User(NamedTuple):
    name: str
    key: str


@pytest.fixture
def user(server: ServerProcess, request: pytest.FixtureRequest) -> User:
    """Return a user of this test alone."""
    name = request.node.name
    return User(name, UserFile(server.home / "users.toml").add(name).reveal())


@contextlib.contextmanager
def clients_of_each(server: ServerProcess, user: User) -> Iterator[dict[str, Client]]:
    """Yield a client with a session for each worker."""
    new = since(server)
    with contextlib.ExitStack() as stack:
        found: dict[str, Client] = {}
        opened: list[Client] = []
        while len(found) < 2:
            opened.append(stack.enter_context(server.client(*user)))
            eventually(lambda: len(new("session.opened")) == len(opened))
            worker = new("session.opened")[-1]["worker"]
            if found.setdefault(worker, opened[-1]) is not opened[-1]:
                opened[-1].close()  # many in a row may come to one worker, and connections are limited
        yield found


def is_revoked(client: Client) -> bool:
    """Return whether the session of a client is refused."""
    try:
        client.call("echo", {"n": 1})
    except AnsweredError as error:
        return error.code == Code.TOKEN_REVOKED
    return False


def test_sessions_of_a_user_who_is_disabled_end_once_and_everywhere(
    server: ServerProcess, user: User
) -> None:
    new = since(server)
    with clients_of_each(server, user) as clients:
        UserFile(server.home / "users.toml").disable(user.name)
        for client in clients.values():
            eventually(lambda client=client: is_revoked(client))  # type: ignore[misc]
    eventually(lambda: new("alert.began"))
    assert [line["worker"] for line in new("user.gone")] == ["coordinator"]
    assert len(new("alert.began")) == 1


def test_user_disabled_while_the_coordinator_is_replaced_loses_the_sessions(
    server: ServerProcess, user: User
) -> None:
    new = since(server)
    with clients_of_each(server, user) as clients:
        os.kill(pids(server)["coordinator"], signal.SIGKILL)
        UserFile(server.home / "users.toml").disable(user.name)
        for client in clients.values():
            eventually(lambda client=client: is_revoked(client))  # type: ignore[misc]
    eventually(lambda: new("user.gone"))
    assert [line["worker"] for line in new("user.gone")] == ["coordinator"]


def ask(client: Client, **params: object) -> Any:
    """Call with an idempotency key; return the answer."""
    client.send(client.request("echo", params, {"idempotency_key": "k"}))
    return client.answer(client.stream)


def test_idempotency_key_is_claimed_once_for_all_workers(server: ServerProcess, user: User) -> None:
    with clients_of_each(server, user) as clients:
        one, other = clients.values()
        assert ask(one, n=1).value == ask(other, n=1).value == {"n": 1}
        assert ask(other, n=2).code == Code.FAILED_PRECONDITION


def test_outcome_is_unknown_soon_after_the_worker_of_a_keyed_request_was_killed(
    server: ServerProcess, user: User
) -> None:
    with clients_of_each(server, user) as clients:
        (worker, killed), (_, other) = clients.items()
        request = ("sleep", {"ms": 100_000}, {"idempotency_key": "k"})
        killed.send(killed.request(*request), killed.request("echo", {}, {"idempotency_key": "later"}))
        assert killed.answer(killed.stream).value == {}  # both claims were made
        os.kill(pids(server)[worker], signal.SIGKILL)
        other.send(other.request(*request))
        assert other.answer(other.stream).code == Code.UNKNOWN


def test_certificates_are_renewed_once_and_served_by_every_worker(server: ServerProcess) -> None:
    new = since(server)
    assert zcproto(server.home, "cert", "renew").returncode == 0
    eventually(lambda: len(new("certificate.renewed", "certificate.loaded")) >= 3)
    found = {line["worker"]: line["event"] for line in new("certificate.renewed", "certificate.loaded")}
    assert found == {
        "coordinator": "certificate.loaded",
        "1": "certificate.loaded",
        "2": "certificate.loaded",
    }


# --- what refuses later clients ----------------------------------------------------------------------------------


def test_failed_logins_are_counted_over_all_workers(server: ServerProcess, user: User) -> None:
    new = since(server)
    codes: list[int] = []
    began = time.monotonic()
    while codes.count(Code.RESOURCE_EXHAUSTED) < 3:
        with server.client() as client, pytest.raises(AnsweredError) as refused:
            client.open_session(user.name, "x" * 43)
        codes.append(refused.value.code)
    # Three are free, then one each after 1, 2 and 4 seconds.
    rejected = codes.count(Code.UNAUTHENTICATED)
    assert 3 <= rejected <= 3 + math.log2(time.monotonic() - began + 1)
    eventually(lambda: new("alert.began"))
    (alert,) = new("alert.began")
    assert (alert["worker"], alert["kind"]) == ("coordinator", "login.throttled")


def test_connections_of_an_address_are_counted_over_all_workers(server: ServerProcess) -> None:
    def admitted() -> int:
        kept = 0
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):  # closed, or reset
            while kept < 20:
                stack.enter_context(server.client())
                kept += 1
        return kept

    eventually(lambda: admitted() == 12)  # connections of before may still end
