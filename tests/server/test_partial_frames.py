"""Test the bounds of incomplete frames: per user, per address, in total, and the memory of a server."""

from __future__ import annotations

import resource
import select
import shutil
from pathlib import Path

from tests.server.helpers import eventually
from tests.server.process import ServerProcess
from tests.server.protocol_harness import Harness, Peer, ended, nothing_left
from zcproto.auth import UserFile
from zcproto.config import Config
from zcproto.errors import Code
from zcproto.server.partial_frames import PartialFrameLimits, PartialFrames
from zcproto.wire.frame import Kind

MIB = 1 << 20


def frames_of(total: int = 1000, per_owner: int = 300) -> PartialFrames[str]:
    return PartialFrames(PartialFrameLimits(total, per_owner))


def test_owner_over_its_bound_loses_its_slowest_frame() -> None:
    frames = frames_of()
    assert frames.hold("quick", "ada", 100, 9.0, 10.0) == []
    assert frames.hold("slow", "ada", 150, 0.0, 10.0) == []
    assert frames.hold("other", "ben", 10, 0.0, 10.0) == []
    assert frames.hold("new", "ada", 51, 10.0, 10.0) == ["slow"]
    assert (frames.bytes, frames.most) == (161, 151)


def test_slowest_of_young_frames_is_found() -> None:
    frames = frames_of()
    assert frames.hold("quick", "ada", 100, 9.9, 10.0) == []
    assert frames.hold("slow", "ada", 150, 9.0, 10.0) == []
    assert frames.hold("new", "ada", 51, 10.0, 10.0) == ["slow"]


def test_default_bounds_are_those_of_the_configuration() -> None:
    limits = Config().limits
    assert PartialFrameLimits() == PartialFrameLimits(
        limits.partial_frame_bytes, limits.partial_frame_bytes_per_user
    )


def test_total_over_its_bound_costs_the_largest_owner_a_frame() -> None:
    frames = frames_of(total=500)
    for number in range(3):
        assert frames.hold(f"ada {number}", "ada", 100, number, 10.0) == []
    assert frames.hold("ben", "ben", 150, 0.0, 10.0) == []
    assert frames.hold("eve", "eve", 60, 9.0, 10.0) == ["ada 0"]
    assert frames.bytes == 410


def test_frame_that_grows_is_counted_once_and_may_be_the_one_to_close() -> None:
    frames = frames_of()
    for size in (100, 200, 300):
        assert frames.hold("a", "ada", size, 0.0, 1.0) == []
    assert frames.bytes == 300
    assert frames.hold("a", "ada", 301, 0.0, 1.0) == ["a"]
    assert (frames.bytes, frames.most) == (0, 0)


def test_completed_and_released_frames_are_no_longer_counted() -> None:
    frames = frames_of()
    frames.hold("a", "ada", 100, 0.0, 1.0)
    frames.hold("b", "ada", 100, 0.0, 1.0)
    assert frames.hold("a", "ada", 0, 0.0, 1.0) == []
    frames.release("b")
    frames.release("unknown")
    assert (frames.bytes, frames.most) == (0, 0)


def test_frame_of_a_connection_whose_owner_changes_moves() -> None:
    frames = frames_of()
    frames.hold("a", "192.0.2.7", 100, 0.0, 1.0)
    frames.hold("a", "ada", 120, 0.0, 1.0)
    assert (frames.bytes, frames.most) == (120, 120)


# --- connections -----------------------------------------------------------------------------------------


def unfinished(peer: Peer, size: int) -> bytes:
    return peer.request(1, "big", {"n": bytes(size)})[:-1]


def test_user_over_the_bound_gets_a_clear_error_and_others_nothing(harness: Harness) -> None:
    harness.state.partial_frames.limits = PartialFrameLimits(10 * MIB, 200_000)
    first, second, other = harness.connect(), harness.connect(), harness.connect()
    first.login()
    second.token = first.token
    second.send(second.request(1, "big", {"n": 1}))
    second.answers()
    other.login("ben")
    other.send(unfinished(other, 150_000))
    first.send(unfinished(first, 150_000))
    harness.advance(1.0)
    second.send(unfinished(second, 150_000))
    (answer,) = first.answers()
    assert (answer.kind, answer.stream, answer.code) == (Kind.ERROR, 0, Code.RESOURCE_EXHAUSTED)
    assert "send fewer large frames at once" in answer.error.message
    assert answer.error.details == {"retry_after_ms": 1_000}
    assert first.transport.is_closing()
    assert ended(harness) == {"resource_exhausted": 1}
    assert not second.transport.is_closing()
    assert not other.transport.is_closing()
    second.send(b"x")
    other.send(b"x")
    assert [answer.stream for answer in (*second.answers(), *other.answers())] == [1, 1]
    assert harness.state.partial_frames.bytes == 0
    for each in (first, second, other):
        each.lose()
    nothing_left(harness)


def test_connections_without_a_session_share_the_bound_of_their_address(harness: Harness) -> None:
    harness.state.partial_frames.limits = PartialFrameLimits(10 * MIB, 31_000)
    peers = [harness.connect() for _ in range(3)]
    for peer in peers:
        peer.send(unfinished(peer, 10_000))
        harness.advance(1.0)
    assert [peer.transport.is_closing() for peer in peers] == [False, False, False]
    late = harness.connect()
    late.send(unfinished(late, 10_000))
    assert [peer.transport.is_closing() for peer in (*peers, late)] == [True, False, False, False]
    for peer in (*peers, late):
        peer.lose()
    assert harness.state.partial_frames.bytes == 0
    nothing_left(harness)


def test_connection_that_ends_meanwhile_is_not_cut(harness: Harness) -> None:
    peer = harness.connect()
    peer.protocol.close("by a method")
    peer.protocol.cut_frame()
    assert peer.answers() == []


def test_large_bodies_are_counted_in_both_directions(harness: Harness) -> None:
    peer = harness.connect("ada")
    counters = harness.state.counters
    peer.send(unfinished(peer, 100_000))
    peer.send(b"x")
    peer.send(peer.request(2, "big", {"n": 1, "size": 131_000}))
    assert counters.large_bytes == 0
    peer.send(peer.request(3, "big", {"n": 1, "size": 140_000}))
    assert 140_000 <= counters.large_bytes < 140_100
    big = unfinished(peer, 400_000)
    for start in range(0, len(big), 16_384):
        peer.send(big[start : start + 16_384])
    assert 140_000 + 400_000 - 131_072 <= counters.large_bytes < 140_000 + 400_000
    peer.lose()


def test_frame_that_never_completes_closes_its_connection_and_is_counted(harness: Harness) -> None:
    peer = harness.connect("ada")
    peer.send(peer.request(2, "wait"))
    harness.advance(100.0)
    peer.send(unfinished(peer, 10_000))
    harness.advance(299.0)
    assert not peer.transport.is_closing()
    assert harness.state.partial_frames.bytes > 10_000
    harness.advance(2.0)
    *_, cancelled, goaway = peer.answers()
    assert (cancelled.stream, cancelled.code) == (2, Code.CANCELLED)
    assert (goaway.kind, goaway.value["reason"]) == (Kind.GOAWAY, "slow_frame")
    assert ended(harness) == {"slow_frame": 1}
    assert harness.state.partial_frames.bytes == 0
    peer.lose()
    nothing_left(harness)


# --- a server --------------------------------------------------------------------------------------------


def resident_bytes(process_id: int) -> int:
    return int(Path(f"/proc/{process_id}/statm").read_text().split()[1]) * resource.getpagesize()


def test_unfinished_frames_of_one_token_take_bounded_memory_that_returns(tmp_path: Path, certs: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(0o700)
    shutil.copytree(certs, home / "certs")
    (home / "config.toml").write_text('[certificates]\nkey_types = ["ecdsa-p256"]\n')
    key = UserFile(home / "users.toml").add("ada")
    with ServerProcess(home, certs) as server, server.client("ada", key) as first:
        clients = []
        for _ in range(80):
            clients.append(client := server.client())
            client.token = first.token
            client.call("session.info")  # a connection without a session is closed after some time
        before = resident_bytes(server.process.pid)
        for client in clients:
            client.send(client.request("echo", {"text": "x" * (MIB - 200)})[:-1])
        eventually(lambda: len(select.select([each.tls for each in clients], [], [], 0)[0]) == 80 - 16)
        assert resident_bytes(server.process.pid) - before < 40 * MIB
        assert first.call("echo", {"text": "still served"})
        for client in clients:
            client.close()
        eventually(lambda: resident_bytes(server.process.pid) - before < 12 * MIB)
