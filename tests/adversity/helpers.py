"""Check that attacks do not disturb a bystander's connection, and shorten timeouts."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

from tests.server.helpers import Client, ServerThread, read_to_end

__all__ = ["Bystander", "fatal_alert", "read_to_end", "short_timeouts", "undisturbed_bystander"]


HANDSHAKE_TIMEOUT = 0.3
WRITE_TIMEOUT = 0.5
"""Seconds that the server waits within `short_timeouts`."""


class Bystander(threading.Thread):
    """Another user's connection that works all the time in its own thread.

    The server thread may use `LIMIT_CPU_S` of CPU during a call, which other programs do not affect.
    """

    LIMIT_CPU_S = 1.0

    def __init__(self, server: ServerThread) -> None:
        super().__init__(name="bystander")
        self._server = server
        self.client: Client = server.client("bystander")
        self.client.echo()
        self.calls = 0
        self.max_cpu = 0.0
        self.waiting = False
        self.failure: BaseException | None = None
        self._ended = threading.Event()

    def run(self) -> None:
        try:
            while not self._ended.wait(0.005):
                started = self._server.cpu_time()
                self.waiting = True
                self.client.echo(size=100)
                self.waiting = False
                self.max_cpu = max(self.max_cpu, self._server.cpu_time() - started)
                self.calls += 1
        except BaseException as error:
            self.failure = error

    def end(self) -> None:
        """Stop and check the calls; close the connection in any case."""
        self._ended.set()
        self.join()
        with contextlib.closing(self.client):
            if self.failure is not None:
                raise AssertionError("the bystander was disturbed") from self.failure
            self.client.echo(size=5_000)
            assert self.client.events == []
            assert self.max_cpu < self.LIMIT_CPU_S, f"the bystander waited for {self.max_cpu:.3f} s of work"


@contextlib.contextmanager
def undisturbed_bystander(server: ServerThread) -> Iterator[Bystander]:
    """Check that another connection works before, during and after the body, and that nothing is left."""
    bystander = Bystander(server)
    bystander.start()
    try:
        yield bystander
    finally:
        bystander.end()
    server.until_left()


@contextlib.contextmanager
def short_timeouts(server: ServerThread) -> Iterator[None]:
    """Shorten the handshake and write timeouts of the server during the body only.

    Other connections of a test may need longer on a busy machine.
    """
    acceptor, state = server.server.parts.acceptor, server.server.state
    before = acceptor.handshake_timeout, state.write_timeout

    def set_timeouts(handshake: float, write: float) -> None:
        acceptor.handshake_timeout, state.write_timeout = handshake, write

    server.in_loop(lambda: set_timeouts(HANDSHAKE_TIMEOUT, WRITE_TIMEOUT))
    try:
        yield
    finally:
        server.in_loop(lambda: set_timeouts(*before))


def fatal_alert(connection: socket.socket) -> int:
    """Return the code of the only plaintext alert before the end of the connection."""
    data, how = read_to_end(connection)
    assert how == "FIN", how
    assert data[:6] == b"\x15\x03\x03\x00\x02\x02", data
    assert len(data) == 7
    return data[6]
