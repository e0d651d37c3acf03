"""Tests of back-pressure in ServerProtocol: slow peers, suspended requests, write limits."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.server.protocol_harness import WRITE_BUFFER, WRITE_TIMEOUT, Harness, Peer, ended, nothing_left
from zcproto.errors import Code
from zcproto.server.dispatch import FRAMES_PER_TURN
from zcproto.server.protocol import WRITE_BUFFER_HARD_FACTOR, ServerProtocol
from zcproto.wire.frame import CANCEL, PING, Kind


def test_back_pressure_stops_running_requests(harness: Harness, peer: Peer) -> None:
    peer.transport.stuck = True
    peer.send(*(peer.request(n, "big", {"n": n}) for n in range(1, 11)))
    assert harness.ran == [1, 2, 3]  # 27,000 bytes: the third exceeded the limit
    assert not peer.transport.is_reading()
    assert peer.transport.unsent < 2 * WRITE_BUFFER
    peer.read_all()
    assert harness.ran == list(range(1, 11))
    assert peer.transport.is_reading()
    assert [answer.stream for answer in peer.answers()] == list(range(1, 11))


def test_back_pressure_stops_requests_with_unchecked_parameters(harness: Harness, peer: Peer) -> None:
    peer.transport.stuck = True
    peer.send(*(peer.request(n, "big.unchecked") for n in range(1, 11)))
    assert harness.ran == [1, 2, 3]
    peer.read_all()
    assert harness.ran == list(range(1, 11))


def test_back_pressure_resumes_as_the_peer_reads(harness: Harness, peer: Peer) -> None:
    peer.transport.stuck = True
    peer.send(*(peer.request(n, "big", {"n": n}) for n in range(1, 11)))
    streams = [answer.stream for answer in peer.answers()]
    while not peer.transport.is_reading():
        before = len(harness.ran)
        peer.transport.drain()
        assert len(harness.ran) - before <= 3
        streams += [answer.stream for answer in peer.answers()]
    assert streams == list(range(1, 11))


def test_small_answers_are_gathered_within_the_bound(harness: Harness, peer: Peer) -> None:
    peer.transport.stuck = True
    for read in range(100):
        if not peer.transport.is_reading():
            break
        first = read * 20 + 1
        peer.send(*(peer.request(n, "big", {"n": n, "size": 100}) for n in range(first, first + 20)))
    assert not peer.transport.is_reading()
    assert peer.transport.unsent < 2 * WRITE_BUFFER
    peer.read_all()
    assert len(peer.answers()) == len(harness.ran)


def test_connection_with_many_requests_lets_others_run_in_between(harness: Harness, peer: Peer) -> None:
    other = harness.connect("bob")
    total = 2 * FRAMES_PER_TURN + 1
    requests = [peer.request(n, "big", {"n": n, "size": 0}) for n in range(1, total + 1)]
    peer.send(*requests)
    assert harness.ran == list(range(1, FRAMES_PER_TURN + 1))
    assert not peer.transport.is_reading()
    other.send(other.request(1, "big", {"n": 0}))
    harness.turn()
    assert harness.ran[FRAMES_PER_TURN] == 0
    assert len(harness.ran) == total + 1
    assert peer.transport.is_reading()
    assert [answer.stream for answer in peer.answers()] == list(range(1, total + 1))


def test_connection_with_slow_methods_waits_for_its_next_turn_sooner(harness: Harness, peer: Peer) -> None:
    def slow(n: int) -> None:
        harness.ran.append(n)
        harness.clock.advance(0.001 * (n % 8 == 0))

    harness.add_method(slow)
    peer.send(*(peer.request(n, "slow", {"n": n}) for n in range(1, 41)))
    assert len(harness.ran) == 16
    harness.turn()
    assert len(harness.ran) == 40
    assert peer.transport.is_reading()


def test_connection_that_ends_in_its_slice_keeps_no_request(harness: Harness, peer: Peer) -> None:
    requests = [peer.request(n, "big", {"n": n, "size": 0}) for n in range(1, FRAMES_PER_TURN)]
    peer.send(*requests, peer.request(500, "close.and.answer"), peer.request(501, "big", {"n": 501}))
    peer.lose()
    nothing_left(harness)
    assert 501 not in harness.ran


def test_deadline_during_back_pressure_loses_no_request(harness: Harness, peer: Peer) -> None:
    peer.send(peer.request(50, "wait", None, deadline_ms=5_000), peer.request(51, "wait"))
    peer.transport.stuck = True
    peer.send(*(peer.request(n, "big", {"n": n}) for n in range(1, 11)))
    assert harness.ran == [1, 2, 3]
    harness.advance(6.0)
    peer.read_all()
    assert harness.ran == list(range(1, 11))
    answers = {answer.stream: answer for answer in peer.answers()}
    assert set(answers) == {50, *range(1, 11)}
    assert answers[50].code == Code.DEADLINE_EXCEEDED
    harness.turn()
    assert harness.futures[0].cancelled()
    harness.in_loop(lambda: harness.futures[1].set_result("still here"))
    harness.turn()
    assert [answer.value for answer in peer.answers()] == ["still here"]


def test_cancel_behind_suspended_requests_is_processed_in_order(peer: Peer) -> None:
    peer.send(peer.request(50, "wait"))
    peer.transport.stuck = True
    requests = [peer.request(n, "big", {"n": n}) for n in range(1, 6)]
    peer.send(*requests, peer.frame(CANCEL, 50), peer.frame(PING))
    assert 50 not in {answer.stream for answer in peer.answers()}
    peer.read_all()
    kinds = [(answer.kind, answer.stream) for answer in peer.answers()]
    assert kinds[-2:] == [(Kind.ERROR, 50), (Kind.PONG, 0)]


def test_peer_that_does_not_read_is_reset(harness: Harness, peer: Peer) -> None:
    peer.send(peer.request(50, "wait"))
    peer.transport.stuck = True
    peer.send(*(peer.request(n, "big", {"n": n}) for n in range(1, 11)))
    harness.advance(WRITE_TIMEOUT - 1)
    assert not peer.transport.aborted
    harness.advance(2)
    assert peer.transport.aborted
    assert ended(harness) == {"write_timeout": 1}
    peer.protocol.resume_writing()
    assert harness.ran == [1, 2, 3]
    nothing_left(harness)
    assert harness.futures[0].cancelled()


def test_slow_steady_reader_is_kept(harness: Harness, peer: Peer) -> None:
    peer.transport.stuck = True
    peer.send(*(peer.request(n, "big", {"n": n}) for n in range(1, 11)))
    peer.transport.unsent += 4 * 16_384  # as if much had been written before
    peer.protocol.pause_writing()
    for _ in range(4):
        harness.advance(WRITE_TIMEOUT - 1)
        peer.transport.unsent -= 16_384
        harness.advance(1)
        assert not peer.transport.aborted
    harness.advance(WRITE_TIMEOUT + 1)
    assert peer.transport.aborted


def test_dripping_reader_is_reset(harness: Harness, peer: Peer) -> None:
    peer.transport.stuck = True
    peer.send(*(peer.request(n, "big", {"n": n}) for n in range(1, 11)))
    peer.transport.unsent -= 16_383
    harness.advance(WRITE_TIMEOUT + 1)
    assert peer.transport.aborted


def test_added_output_does_not_hide_reading(harness: Harness, peer: Peer) -> None:
    peer.send(peer.request(50, "wait"))
    peer.transport.stuck = True
    peer.send(*(peer.request(n, "big", {"n": n}) for n in range(1, 11)))
    peer.transport.unsent -= 16_384
    harness.futures[0].set_result(bytes(16_384))
    harness.turn()
    harness.advance(WRITE_TIMEOUT + 1)
    assert not peer.transport.aborted
    harness.advance(WRITE_TIMEOUT + 1)
    assert peer.transport.aborted


def test_peer_that_reads_in_time_is_kept(harness: Harness, peer: Peer) -> None:
    for _ in range(3):
        peer.transport.stuck = True
        peer.send(*(peer.request(n, "big", {"n": n}) for n in range(1, 4)))
        assert not peer.transport.is_reading()
        harness.advance(WRITE_TIMEOUT - 1)
        peer.read_all()
        harness.advance(2)
    assert not peer.transport.aborted
    assert len(peer.answers()) == 9


def test_write_buffer_over_the_hard_limit_resets_the_connection(harness: Harness, peer: Peer) -> None:
    peer.send(*(peer.request(n, "wait") for n in range(1, 17)))
    peer.transport.stuck = True
    most = 0

    def answer(future: asyncio.Future[Any]) -> None:
        nonlocal most
        if not future.done():
            harness.in_loop(lambda: future.set_result(bytes(15_000)))
            harness.turn()
        most = max(most, peer.transport.unsent)

    for future in harness.futures:
        answer(future)
    assert peer.transport.aborted
    assert ended(harness) == {"write_buffer_full": 1}
    assert most < WRITE_BUFFER_HARD_FACTOR * WRITE_BUFFER + 16_000
    nothing_left(harness)


def test_reset_during_processing_keeps_no_request(harness: Harness, peer: Peer) -> None:
    peer.transport.stuck = True
    size = (WRITE_BUFFER_HARD_FACTOR + 1) * WRITE_BUFFER
    peer.send(*(peer.request(n, "big", {"n": n, "size": size}) for n in range(1, 4)))
    assert peer.transport.aborted
    assert harness.ran == [1]
    peer.read_all()  # a late callback of the transport
    assert harness.ran == [1]
    nothing_left(harness)


def test_pause_writing_without_connection_does_nothing(harness: Harness) -> None:
    protocol = ServerProtocol(harness.state)
    protocol.pause_writing()
    protocol.resume_writing()
    peer = harness.connect()
    peer.lose()
    peer.protocol.pause_writing()
    peer.protocol.resume_writing()
    nothing_left(harness)
