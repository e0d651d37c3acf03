"""Stored `sts` policies."""

from __future__ import annotations

import json
import multiprocessing
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import WALL
from zcproto.client.dial import MAX_AGE, MAX_FILE_SIZE, MAX_HOSTS, KnownHosts
from zcproto.errors import ConfigError, TlsError

DAY_MS = 86_400_000


def sts(max_age: int = 86_400 * 30, include_subdomains: bool = False) -> dict[str, Any]:
    return {"max_age": max_age, "include_subdomains": include_subdomains}


@pytest.fixture
def hosts(tmp_path: Path) -> KnownHosts:
    return KnownHosts(tmp_path / "home" / "known_hosts.json")


def is_refused(hosts: KnownHosts, host: str, wall: int = WALL) -> bool:
    try:
        hosts.require(host, wall)
    except TlsError as error:
        return error.failure == "sts_policy"
    return False


def test_host_without_policy_is_allowed(hosts: KnownHosts) -> None:
    assert not is_refused(hosts, "a.example")


def test_host_with_policy_is_refused_until_expiry(hosts: KnownHosts) -> None:
    hosts.learn("a.example", sts(), WALL)
    assert is_refused(hosts, "a.example")
    assert is_refused(hosts, "a.example", WALL + 30 * DAY_MS - 1_000)
    assert not is_refused(hosts, "a.example", WALL + 30 * DAY_MS)
    assert not is_refused(hosts, "b.example")
    assert not is_refused(hosts, "www.a.example")
    assert not is_refused(hosts, "example")


def test_refusal_names_remaining_days_and_file(hosts: KnownHosts) -> None:
    hosts.learn("a.example", sts(), WALL)
    with pytest.raises(TlsError) as caught:
        hosts.require("a.example", WALL + DAY_MS * 10)
    assert "21 more days" in str(caught.value)
    assert str(hosts.path) in str(caught.value)


def test_subdomains_are_covered_with_include_subdomains(hosts: KnownHosts) -> None:
    hosts.learn("a.example", sts(include_subdomains=True), WALL)
    assert is_refused(hosts, "a.example")
    assert is_refused(hosts, "x.y.a.example")
    assert not is_refused(hosts, "xa.example")


def test_policy_of_subdomain_does_not_hide_its_parent(hosts: KnownHosts) -> None:
    hosts.learn("a.example", sts(include_subdomains=True), WALL)
    hosts.learn("x.a.example", sts(max_age=10), WALL)
    assert is_refused(hosts, "x.a.example", WALL + 20_000)


def test_max_age_0_forgets_a_host(hosts: KnownHosts) -> None:
    hosts.learn("a.example", sts(), WALL)
    hosts.learn("b.example", sts(), WALL)
    hosts.learn("a.example", sts(0), WALL)
    assert not is_refused(hosts, "a.example")
    assert is_refused(hosts, "b.example")


def test_max_age_0_of_an_unknown_host_writes_nothing(hosts: KnownHosts) -> None:
    hosts.learn("a.example", sts(0), WALL)
    assert not hosts.path.exists()


@pytest.mark.parametrize("address", ["192.0.2.1", "::1", "fe80::1%eth0"])
def test_ip_address_has_no_policy(hosts: KnownHosts, address: str) -> None:
    hosts.learn(address, sts(), WALL)
    assert not hosts.path.exists()
    hosts.require(address, WALL)


def test_expiry_is_extended_on_disk_once_a_day(hosts: KnownHosts) -> None:
    hosts.learn("a.example", sts(), WALL)
    first = hosts.path.stat().st_ino
    hosts.learn("a.example", sts(), WALL + DAY_MS // 2)
    assert hosts.path.stat().st_ino == first
    hosts.learn("a.example", sts(), WALL + DAY_MS)
    assert is_refused(hosts, "a.example", WALL + 31 * DAY_MS - 1_000)


def test_changed_policy_is_written_at_once(hosts: KnownHosts) -> None:
    hosts.learn("a.example", sts(), WALL)
    hosts.learn("a.example", sts(include_subdomains=True), WALL)
    assert is_refused(hosts, "x.a.example")
    hosts.learn("a.example", sts(max_age=60), WALL)
    assert not is_refused(hosts, "a.example", WALL + 61_000)


def test_short_policy_is_extended_in_its_second_half(hosts: KnownHosts) -> None:
    hosts.learn("a.example", sts(60), WALL)
    first = hosts.path.stat().st_ino
    hosts.learn("a.example", sts(60), WALL + 29_000)
    assert hosts.path.stat().st_ino == first
    hosts.learn("a.example", sts(60), WALL + 40_000)
    assert is_refused(hosts, "a.example", WALL + 90_000)
    hosts.learn("a.example", sts(60), WALL + 200_000)
    assert is_refused(hosts, "a.example", WALL + 250_000)


def test_policy_is_limited_to_ten_years(hosts: KnownHosts) -> None:
    hosts.learn("a.example", sts(2**63), WALL)
    assert is_refused(hosts, "a.example", WALL + (MAX_AGE - 1) * 1_000)
    assert not is_refused(hosts, "a.example", WALL + MAX_AGE * 1_000)


def test_file_and_folder_are_private(hosts: KnownHosts) -> None:
    hosts.learn("a.example", sts(), WALL)
    assert stat.S_IMODE(hosts.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(hosts.path.parent.stat().st_mode) == 0o700
    assert {path.name for path in hosts.path.parent.iterdir()} == {
        "known_hosts.json",
        "known_hosts.json.lock",
    }


def test_expired_and_earliest_policies_are_dropped(hosts: KnownHosts) -> None:
    hosts.path.parent.mkdir()
    known = {
        f"h{number}.example": {"until": WALL // 1_000 + 1_000 + number, "include_subdomains": False}
        for number in range(MAX_HOSTS)
    }
    known["old.example"] = {"until": WALL // 1_000 - 1, "include_subdomains": False}
    hosts.path.write_text(json.dumps({"hosts": known}))
    hosts.learn("new.example", sts(), WALL)
    kept = json.loads(hosts.path.read_text())["hosts"]
    assert len(kept) == MAX_HOSTS
    assert "h0.example" not in kept
    assert "old.example" not in kept
    assert "new.example" in kept


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "null",
        "\x00",
        '{"hosts": []}',
        '{"hosts": ""}',
        '{"hosts": null}',
        '{"hosts": {"a.example": {"until": 9007199254740992, "include_subdomains": true}}}',
        '{"hosts": {"a.example": 5}}',
        '{"hosts": {"a.example": {"until": 5}}}',
        '{"hosts": {"a.example": {"until": "5", "include_subdomains": true}}}',
        '{"hosts": {"a.example": {"until": 5, "include_subdomains": 1}}}',
        "[" * 100_000,
    ],
)
def test_damaged_file_is_not_treated_as_empty(hosts: KnownHosts, content: str) -> None:
    hosts.path.parent.mkdir()
    hosts.path.write_text(content)
    assert is_refused(hosts, "b.example")
    with pytest.raises(ConfigError, match="damaged"):
        hosts.learn("b.example", sts(), WALL)
    assert hosts.path.read_text() == content


def test_oversized_file_is_refused(hosts: KnownHosts) -> None:
    hosts.path.parent.mkdir()
    hosts.path.write_bytes(b" " * (MAX_FILE_SIZE + 2))
    assert is_refused(hosts, "a.example")


def test_unreadable_file_is_not_treated_as_empty(hosts: KnownHosts) -> None:
    hosts.path.mkdir(parents=True)
    assert is_refused(hosts, "a.example")


def test_failed_write_keeps_the_old_file(hosts: KnownHosts, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts.learn("a.example", sts(), WALL)
    before = hosts.path.read_text()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="space"):
        hosts.learn("b.example", sts(), WALL)
    assert hosts.path.read_text() == before
    assert len(list(hosts.path.parent.iterdir())) == 2


def _learn(path: Path, number: int) -> None:
    KnownHosts(path).learn(f"h{number}.example", sts(), WALL)


def test_concurrent_processes_lose_no_policy(hosts: KnownHosts) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_learn, args=(hosts.path, number)) for number in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(json.loads(hosts.path.read_text())["hosts"]) == 8
