"""Servers name what is unsafe about a real Valkey: in the log, by an alert, in /readyz and on the command line."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.admin.https_client import ask
from tests.server.helpers import AnsweredError, ServerThread, eventually
from tests.stores.valkey.server_process import ServerProcess, running, wait_for
from zcproto.cli import main
from zcproto.errors import Code

PROGRAM = "valkey-server"
SAFE = ("--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction")
HOUR_MS = 3_600_000


def open_alerts(server: ServerThread) -> dict[str, str]:
    """Return the titles of the open alerts about the store, by kind."""
    found = server.in_loop(server.server.parts.alerts.center.open_alerts)
    return {each.kind.value: each.title for each in found if each.kind.value.startswith("store.")}


def logged(text: str, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


def serve(folder: Path, certs: Path, store: ServerProcess) -> ServerThread:
    return ServerThread(folder / "home", certs, store__url=store.url)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--maxmemory-policy", "allkeys-lru"), "maxmemory-policy is not noeviction"),
        (("--maxmemory-policy", "volatile-ttl"), "maxmemory-policy is not noeviction"),
        (("--appendonly", "no"), "appendonly is off"),
        (("--appendfsync", "everysec"), "appendfsync is not always"),
        ((), "min-replicas-to-write is 0"),
        ((), "the clock of the store and this one are 3"),  # 3,599 if a second ends between the two
        ((), ""),
    ],
)
def test_unsafe_store_is_named_everywhere(
    tmp_path: Path, certs: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], named: str
) -> None:
    with ExitStack() as stack:
        store = stack.enter_context(running(PROGRAM, tmp_path / "store", *SAFE, *options))
        if "replicas" in named:
            replica = ("--replicaof", "127.0.0.1", str(store.port))
            stack.enter_context(running(PROGRAM, tmp_path / "replica", *replica))
            wait_for(lambda: store.command("ROLE")[2] != [])
        server = serve(tmp_path, certs, store)
        if "clock" in named:
            server.clock.ahead_ms = HOUR_MS
        stack.enter_context(server)
        eventually(lambda: server.stats["store"]["state"] == "healthy")
        eventually(lambda: bool(open_alerts(server)) == bool(named))
        assert main(["store", "check", store.url]) == 0
        text = capsys.readouterr().err
        readiness = json.loads(ask(server, "/readyz").body)
        assert readiness["ready"]
        if not named:
            assert (text, open_alerts(server), readiness["warnings"]) == ("", {}, [])
            return
        assert named in open_alerts(server)["store.misconfigured"]
        (line,) = logged(text, "store.misconfigured")
        assert [fault.startswith(named) for fault in line["faults"]] == [True]
        assert readiness["warnings"] == [f"store: {fault}" for fault in line["faults"]]
        assert (f"note: {named}" in text) == (
            "clock" not in named
        )  # the command has the clock of this machine


def test_store_that_was_out_at_the_start_is_examined_when_it_answers(
    tmp_path: Path, certs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        store = stack.enter_context(running(PROGRAM, tmp_path / "store", *SAFE, "--appendonly", "no"))
        store.stop()
        with monkeypatch.context() as patch:
            patch.setattr("zcproto.stores.valkey.servers.OPEN_TIMEOUT_S", 0.25)
            server = stack.enter_context(serve(tmp_path, certs, store))
        assert "store.misconfigured" not in open_alerts(server)
        store.go_on()
        eventually(lambda: "appendonly is off" in open_alerts(server).get("store.misconfigured", ""))


def test_flushall_ends_all_sessions_and_is_an_alert(
    tmp_path: Path, certs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as stack:
        store = stack.enter_context(running(PROGRAM, tmp_path / "store", *SAFE))
        server = stack.enter_context(serve(tmp_path, certs, store))
        client = stack.enter_context(server.client("ada"))
        client.echo()
        store.command("FLUSHALL")
        eventually(lambda: "deleted by a command" in open_alerts(server).get("store.emptied", ""))
        assert len(logged(capsys.readouterr().err, "store.flushed")) == 1

        def is_ended() -> bool:
            try:
                client.echo()
            except AnsweredError as answered:
                return answered.code == Code.TOKEN_REVOKED
            return False

        eventually(is_ended)
