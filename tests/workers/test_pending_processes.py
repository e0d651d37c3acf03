"""Pending calls of a server of several processes, of which some are killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.server.asking import APP, answer, ask, handle, offer, result, withdrawn
from tests.server.helpers import Client
from tests.server.process import ServerProcess
from tests.workers.test_processes import pids, zcproto
from zcproto.wire.frame import Kind

Connect = Callable[[int], Client]


@pytest.fixture
def server(home: Path, certs: Path) -> Iterator[ServerProcess]:
    (home / "asking.py").write_text(APP)
    with (home / "config.toml").open("a") as config:
        config.write("\n[sessions]\nper_user = 1000\n")
    with ServerProcess(home, certs, "--workers", "2", app="asking:app") as server:
        yield server


@pytest.fixture
def connect(server: ServerProcess, key: str) -> Iterator[Connect]:
    """Yield what connects a client of ada to the process of this id, or to another one than that of -id."""
    with ExitStack() as stack:
        spare: list[tuple[int, Client]] = []

        def connect(pid: int) -> Client:
            while True:
                for index, (found, client) in enumerate(spare):
                    if found == pid or (pid <= 0 and found != -pid):
                        del spare[index]
                        if client.is_open():  # its worker may have been killed
                            return client
                        break
                client = stack.enter_context(server.client("ada", key))
                spare.append((client.call("pid"), client))

        yield connect


def test_pending_call_reaches_the_clients_of_all_workers_and_is_answered_once(
    server: ServerProcess, connect: Connect, home: Path
) -> None:
    caller = connect(0)
    pid = caller.call("pid")
    here, there, without = connect(pid), connect(-pid), connect(-pid)
    handle(here)
    handle(there)
    handle(without, "other")
    ask(caller)
    (call_id, first), (same_id, second) = offer(here), offer(there)
    assert call_id == same_id
    late = connect(-pid)
    handle(late)
    assert offer(late)[0] == call_id
    answer(there, second, "there")
    assert result(caller) == "there"
    withdrawn(here, first)
    answer(here, first, "too late")
    ask(caller)
    (_, first), (_, second) = offer(here), offer(there)
    answer(here, first, "here")
    answer(there, second, "there")
    assert result(caller) in ("here", "there")
    assert Kind.CALL not in [frame.kind for frame in without.events]
    asked, answered, _, twice = server.events("call.asked", "call.answered")
    assert (asked["call"], answered["call"]) == (call_id, call_id)
    assert (asked["session"], answered["session"]) == (
        caller.opened["id"],
        there.opened["id"],
    )
    assert answered["peer"].startswith("127.0.0.1")
    assert twice["event"] == "call.answered"
    assert server.events("call.withdrawn") == []


def test_operator_lists_answers_and_refuses_calls_of_all_workers(connect: Connect, home: Path) -> None:
    first = connect(0)
    second = connect(-first.call("pid"))
    handle(first)
    ask(first)
    ask(second)
    ids = {offer(first)[0] for _ in range(2)}
    listed = zcproto(home, "calls", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    rows = json.loads(listed.stdout)
    assert {row["id"] for row in rows} == ids
    assert [row["params"] for row in rows] == [{"tool": "ls"}] * 2
    assert zcproto(home, "calls", "answer", rows[0]["id"], '"yes"').returncode == 0
    assert zcproto(home, "calls", "refuse", rows[1]["id"]).returncode == 0
    assert {result(first), result(second)} == {"yes", "PermissionDenied"}
    again = zcproto(home, "calls", "answer", rows[0]["id"], '"yes"')
    assert (again.returncode, "no pending call has this id" in again.stderr) == (1, True)


def test_token_that_was_refreshed_in_another_worker_answers_nothing(connect: Connect) -> None:
    caller = connect(0)
    user = connect(caller.call("pid"))
    thief = connect(-caller.call("pid"))
    thief.token = user.token
    handle(thief)
    ask(caller)
    call_id, stolen = offer(thief)
    refreshed = user.call("session.refresh", {"refresh_token": user.opened["refresh_token"]}, token=bytes(32))
    answer(thief, stolen, "stolen")
    user.token = refreshed["token"]
    handle(user)
    same_id, call = offer(user)
    assert same_id == call_id
    answer(user, call, "mine")
    assert result(caller) == "mine"


def test_pending_calls_whatever_is_killed(server: ServerProcess, connect: Connect) -> None:
    caller = connect(0)
    pid = caller.call("pid")
    here, there = connect(pid), connect(-pid)
    other = there.call("pid")
    handle(here)
    handle(there)

    ask(caller)
    _, (_, call) = offer(here), offer(there)
    os.kill(pids(server)["coordinator"], signal.SIGKILL)
    answer(there, call, "coordinator")
    assert result(caller) == "coordinator"

    ask(caller)
    (call_id, first), (same_id, _) = offer(here), offer(there)
    assert call_id == same_id
    os.kill(other, signal.SIGKILL)
    again = connect(-pid)
    handle(again)
    same_id, call = offer(again)
    assert call_id == same_id
    answer(again, call, "worker")
    assert result(caller) == "worker"
    withdrawn(here, first)

    ask(caller)
    _, call = offer(again)
    os.kill(pid, signal.SIGKILL)
    withdrawn(again, call)
