"""Tests of the bystander: it detects every disturbance and leaves no connection."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.adversity.helpers import Bystander, undisturbed_bystander
from tests.server.conftest import Serve
from tests.server.helpers import ServerThread, eventually
from zcproto.server.protocol import ServerProtocol


def block_loop(server: ServerThread, bystander: Bystander) -> None:
    """Keep the loop busy while the bystander waits."""

    def work() -> None:
        while not bystander.waiting:
            pass
        end = time.thread_time() + 2 * bystander.LIMIT_CPU_S
        while time.thread_time() < end:
            pass

    server.in_loop(work)


def bystander_protocol(server: ServerThread) -> ServerProtocol:
    (protocol,) = server.server.state.connections
    return protocol


def pause_connection(server: ServerThread, bystander: Bystander) -> None:
    """Stop reading the bystander's connection until it gives up."""
    protocol = bystander_protocol(server)
    bystander.client.tls.settimeout(0.5)
    server.in_loop(protocol.pause_writing)
    eventually(lambda: bystander.failure)
    server.in_loop(protocol.resume_writing)


def abort_connection(server: ServerThread, bystander: Bystander) -> None:
    server.in_loop(lambda: bystander_protocol(server).abort("write_timeout"))
    eventually(lambda: bystander.failure)


def revoke_session(server: ServerThread, bystander: Bystander) -> None:
    """Revoke the bystander's session, which sends it an event."""
    with server.client("bystander") as other:
        other.call("session.revoke", {"all": True})
    eventually(lambda: bystander.failure)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (block_loop, "waited for"),
        (pause_connection, "disturbed"),
        (abort_connection, "disturbed"),
        (revoke_session, "disturbed"),
    ],
)
def test_bystander_detects_every_disturbance(
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    attack: Callable[[ServerThread, Bystander], None],
    message: str,
) -> None:
    monkeypatch.setattr(Bystander, "LIMIT_CPU_S", 0.1)
    server = serve()
    with pytest.raises(AssertionError, match=message), undisturbed_bystander(server) as bystander:
        attack(server, bystander)
    server.until_left()


def test_bystander_passes_on_a_quiet_server(serve: Serve) -> None:
    server = serve()
    with undisturbed_bystander(server) as bystander:
        eventually(lambda: bystander.calls >= 10)
