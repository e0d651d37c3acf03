"""Messages between the supervisor and its processes."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator

import pytest

from zcproto.workers.channel import MAX_MESSAGE, Channel, Message

Pair = tuple[Channel, Channel]
Raw = tuple[socket.socket, Channel]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ends = Channel.pair()
    yield ends
    for end in ends:
        end.close()


@pytest.fixture
def raw() -> Iterator[Raw]:
    """A socket whose bytes a channel receives, and that channel."""
    sending, receiving = socket.socketpair()
    channel = Channel(receiving)
    yield sending, channel
    sending.close()
    channel.close()


def test_messages_arrive_in_order(pair: Pair) -> None:
    ours, theirs = pair
    assert ours.send("ready", names=["a.example"])
    assert ours.send("beat")
    assert theirs.receive() == [Message("ready", {"names": ["a.example"]}), Message("beat", {})]
    assert theirs.receive() == []


def test_message_in_pieces_is_joined(raw: Raw) -> None:
    sending, channel = raw
    for part in (b'["be', b'at",{', b'}]\n["go",{}]\n["dr'):
        sending.sendall(part)
        got = channel.receive()
    assert got == [Message("beat", {}), Message("go", {})]


@pytest.mark.parametrize(
    "data", [b"5\n", b"[]\n", b'["a"]\n', b'["a",{},1]\n', b"{\n", b"\xff\n", b"[" * 60_000 + b"\n"]
)
def test_malformed_message_counts_as_a_lost_peer(raw: Raw, data: bytes) -> None:
    sending, channel = raw
    sending.sendall(data)
    assert channel.receive() is None


def test_endless_message_counts_as_a_lost_peer(raw: Raw) -> None:
    sending, channel = raw
    sending.sendall(b"x" * MAX_MESSAGE)
    results = [channel.receive()]
    while results[-1] == []:
        results.append(channel.receive())
    assert results[-1] is None


def test_too_long_message_is_not_sent(pair: Pair) -> None:
    ours, theirs = pair
    with pytest.raises(ValueError, match="65536 are allowed"):
        ours.send("failed", text="x" * MAX_MESSAGE)
    assert theirs.receive() == []


def test_send_to_a_peer_that_does_not_read_returns_false_without_waiting(pair: Pair) -> None:
    ours, _theirs = pair
    while ours.send("beat", text="x" * 1_000):
        pass


def test_end_of_the_peer_is_noticed(pair: Pair) -> None:
    ours, theirs = pair
    theirs.close()
    assert ours.receive() is None
    assert not ours.send("go")


def test_reset_by_the_peer_is_noticed(pair: Pair) -> None:
    ours, theirs = pair
    ours.send("go")  # unread data: the kernel reports a reset
    theirs.close()
    assert ours.receive() is None


@pytest.mark.parametrize(("outlives", "code"), [(False, -signal.SIGIO), (True, 0)])
def test_process_ends_with_its_peer_until_it_reads_the_channel(outlives: bool, code: int) -> None:
    ours, theirs = Channel.pair()
    ready, readied = os.pipe()
    pid = os.fork()
    if not pid:
        ours.close()
        theirs.end_with_peer()
        if outlives:
            theirs.outlive_peer()
        os.write(readied, b".")
        while theirs.receive() is not None:
            pass
        signal.sigtimedwait((), 0.2)  # a signal that is on its way comes first
        os._exit(0)
    theirs.close()
    os.read(ready, 1)
    ours.close()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
    for descriptor in (ready, readied):
        os.close(descriptor)
