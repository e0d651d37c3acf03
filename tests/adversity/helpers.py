"""What the tests of bad input share: a bystander that must not notice, and plain sockets."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

from ..server.helpers import Client, ServerThread, read_to_end

__all__ = ["Bystander", "fatal_alert", "left_alone", "read_to_end"]


class Bystander(threading.Thread):
    """Another user's connection that goes on working all the time, in a thread of its own."""

    def __init__(self, server: ServerThread) -> None:
        super().__init__(name="bystander")
        self.client: Client = server.client("bystander")
        self.client.echo()
        self.calls = 0
        self.slowest = 0.0
        self.failure: BaseException | None = None
        self._ended = threading.Event()

    def run(self) -> None:
        try:
            while not self._ended.wait(0.005):
                started = time.monotonic()
                self.client.echo(size=100)
                self.slowest = max(self.slowest, time.monotonic() - started)
                self.calls += 1
        except BaseException as error:
            self.failure = error

    def end(self) -> None:
        self._ended.set()
        self.join()
        if self.failure is not None:
            raise AssertionError("the bystander was disturbed") from self.failure
        self.client.echo(size=5_000)
        assert self.client.events == []
        assert self.slowest < 1.0, f"the bystander waited for {self.slowest:.3f} s"
        self.client.close()


@contextlib.contextmanager
def left_alone(server: ServerThread) -> Iterator[Bystander]:
    """While the body attacks, another connection works, before, during and after; then nothing is left."""
    bystander = Bystander(server)
    bystander.start()
    try:
        yield bystander
    finally:
        bystander.end()
    server.until_left()


def fatal_alert(connection: socket.socket) -> int:
    """The number of the one plaintext alert before the end of the connection."""
    data, how = read_to_end(connection)
    assert how == "FIN", how
    assert data[:6] == b"\x15\x03\x03\x00\x02\x02", data
    assert len(data) == 7
    return data[6]
