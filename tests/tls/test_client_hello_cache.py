"""Test the cache of ClientHello verdicts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.tls.hello_judge import GOOD, NO_SUITE, PROTOCOLS, SUITES
from tests.tls.hellos import (
    AES_128,
    KEY_SHARE,
    SERVER_NAME,
    SUPPORTED_VERSIONS,
    Hello,
    server_name,
    suite_list,
    versions,
)
from zcproto.tls.client_hello import ACCEPTED, Accepted, ClientHelloJudge, Refusal

SHARING = GOOD.with_extension(KEY_SHARE, bytes(38)).with_extension(SERVER_NAME, server_name(b"a.example"))
Counted = tuple[ClientHelloJudge, list[int]]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Return a judge and the list of sizes of fully parsed hellos."""
    read: list[int] = []
    judge_hello = ClientHelloJudge.judge_hello

    def counting(self: ClientHelloJudge, data: bytes | bytearray, at: int) -> Accepted | Refusal:
        read.append(len(data))
        return judge_hello(self, data, at)

    monkeypatch.setattr(ClientHelloJudge, "judge_hello", counting)
    return ClientHelloJudge(SUITES, PROTOCOLS), read


def of_another_connection(hello: Hello) -> Hello:
    """Return the next hello of the same program."""
    hello = replace(hello, random=bytes(range(32, 64)), session_id=bytes(range(64, 96)))
    extensions = [
        (kind, bytes(each ^ 0xFF for each in content) if kind == KEY_SHARE else content)
        for kind, content in hello.extensions or ()
    ]
    return replace(hello, extensions=extensions)


@pytest.mark.parametrize("hello", [SHARING, GOOD, GOOD.with_extension(KEY_SHARE, b"")])
def test_repeated_hello_is_found_in_cache(hello: Hello, counted: Counted) -> None:
    judge, read = counted
    first = judge.judge_record(hello.bytes())
    assert isinstance(first, Accepted)
    assert judge.judge_record(of_another_connection(hello).bytes()) == first
    assert len(read) == 1


def test_hellos_of_same_size_are_cached_separately(counted: Counted) -> None:
    judge, read = counted
    other = SHARING.with_extension(SERVER_NAME, server_name(b"b.example"))
    for _ in range(3):
        assert judge.judge_record(SHARING.bytes()) == Accepted("a.example")
        assert judge.judge_record(other.bytes()) == Accepted("b.example")
    assert len(read) == 2


def test_refusal_is_not_cached(counted: Counted) -> None:
    judge, read = counted
    for _ in range(2):
        assert judge.judge_record(replace(GOOD, suites=suite_list(AES_128)).bytes()) == NO_SUITE
    assert len(read) == 2


@pytest.mark.parametrize(
    "hello",
    [
        replace(SHARING, session_id=b""),  # frequent clients send only size 32 (RFC 8446, D.4)
        GOOD.with_extension(21, bytes(1_024)),
    ],
)
def test_unusual_hello_is_not_cached(hello: Hello, counted: Counted) -> None:
    judge, read = counted
    for _ in range(2):
        assert isinstance(judge.judge_record(hello.bytes()), Accepted)
    assert len(read) == 2


def test_hello_cache_is_bounded(counted: Counted) -> None:
    judge, read = counted
    names = [server_name(f"{number:03}.example".encode()) for number in range(100)]
    hellos = [SHARING.with_extension(SERVER_NAME, name).bytes() for name in names]
    hellos += [SHARING.with_extension(21, bytes(size)).bytes() for size in range(100)]
    for hello in hellos:
        judge.judge_record(hello)
        assert judge.judge_record(hello) is not None
        assert len(judge._by_head) <= 32
        assert all(len(each.accepted) <= 32 for each in judge._by_head.values())
    assert len(read) == len(hellos), "the last one is always there"


def test_key_share_at_other_position_is_not_a_cache_hit(counted: Counted) -> None:
    """The excluded bytes must be the hello's own key share: elsewhere they hold judged fields."""
    judge, _ = counted
    share = (KEY_SHARE, versions(0x0304, 0x0303))
    judged = (SUPPORTED_VERSIONS, versions(0x0304, 0x0303))
    for extensions in [[share, judged], [judged, share]]:
        hello = replace(GOOD, extensions=extensions)
        assert judge.judge_record(hello.bytes()) is ACCEPTED
        for old in (versions(0x0303) + b"\x03\x03", versions(0x0303, 0x0303)):
            changed = [(kind, old if kind == SUPPORTED_VERSIONS else content) for kind, content in extensions]
            data = replace(GOOD, extensions=changed).bytes()
            assert judge.judge_record(data) == ClientHelloJudge(SUITES, PROTOCOLS).judge_record(data)
            assert isinstance(judge.judge_record(data), Refusal)


def test_any_changed_byte_is_judged_the_same_with_and_without_cache() -> None:
    judge = ClientHelloJudge(SUITES, PROTOCOLS)
    hello = SHARING.bytes()
    for at, byte in enumerate(hello):
        assert judge.judge_record(hello) == Accepted("a.example")
        for other in {0, 1, 32, 33, byte ^ 1, byte ^ 0x80, 255}:
            changed = hello[:at] + bytes([other]) + hello[at + 1 :]
            uncached = ClientHelloJudge(SUITES, PROTOCOLS).judge_record(changed)
            assert judge.judge_record(changed) == uncached, (at, other)
