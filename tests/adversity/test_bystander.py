"""Tests of the bystander: it detects every disturbance and leaves no connection."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.adversity.helpers import Bystander, left_alone
from tests.server.conftest import Serve
from tests.server.helpers import ServerThread, eventually
from zcproto.server.protocol import ServerProtocol


def hold(server: ServerThread, bystander: Bystander) -> None:
    """Keep the loop busy while the bystander waits."""

    def work() -> None:
        while not bystander.waiting:
            pass
        end = time.thread_time() + 2 * bystander.LIMIT_CPU_S
        while time.thread_time() < end:
            pass

    server.in_loop(work)


def the_bystanders_own(server: ServerThread) -> ServerProtocol:
    (protocol,) = server.server.state.connections
    return protocol


def stall(server: ServerThread, bystander: Bystander) -> None:
    """Stop reading the bystander's connection until it gives up."""
    protocol = the_bystanders_own(server)
    server.in_loop(protocol.pause_writing)
    eventually(lambda: bystander.failure)
    server.in_loop(protocol.resume_writing)


def cut(server: ServerThread, bystander: Bystander) -> None:
    server.in_loop(lambda: the_bystanders_own(server).abort("write_timeout"))
    eventually(lambda: bystander.failure)


def tell(server: ServerThread, bystander: Bystander) -> None:
    """Revoke the bystander's session, which sends it an event."""
    with server.client("bystander") as other:
        other.call("session.revoke", {"all": True})
    eventually(lambda: bystander.failure)


@pytest.mark.parametrize(
    ("attack", "found"),
    [(hold, "waited for"), (stall, "disturbed"), (cut, "disturbed"), (tell, "disturbed")],
)
def test_bystander_detects_every_disturbance(
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    attack: Callable[[ServerThread, Bystander], None],
    found: str,
) -> None:
    monkeypatch.setattr(Bystander, "LIMIT_CPU_S", 0.1)
    monkeypatch.setattr(Bystander, "LIMIT_S", 20.0 if attack is hold else 1.0)
    server = serve()
    with pytest.raises(AssertionError, match=found), left_alone(server) as bystander:
        attack(server, bystander)
    server.until_left()


def test_bystander_passes_on_a_quiet_server(serve: Serve) -> None:
    server = serve()
    with left_alone(server) as bystander:
        eventually(lambda: bystander.calls >= 10)
