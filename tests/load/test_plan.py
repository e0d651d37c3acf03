from __future__ import annotations

import resource
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from tests.load.helpers import OPERATOR, plan, users
from zcproto.errors import ConfigError
from zcproto.load import plan as load_plan
from zcproto.load.plan import (
    MAX_KEY_FILE_BYTES,
    Credential,
    Plan,
    Share,
    check_plan,
    processes_for,
    read_credentials,
    require_open_files,
    session_credentials,
    shares,
)


def faults_of(asked: Plan) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_plan(asked)
    return caught.value.faults


STREAMS = {"stream": "repeat", "connections": 10, "pipeline": 2, "duration_s": 2.0}


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({"sessions": 10, "credentials": users(2)}, []),
        ({"connections": 4, "sessions": 5}, ["--sessions 5", "at most --sessions 4"]),
        (
            {"connections": 11, "sessions": 11, "credentials": users(2)},
            ["10 sessions, 5 each", "zcproto user add load --count 4 --out FILE"],
        ),
        ({"sessions": 2, "processes": 3}, ["--processes 3"]),
        ({"payload_bytes": 1 << 30}, ["--payload"]),
        ({**STREAMS, "rate": 4.0}, ["give at least --rate 10"]),
        ({**STREAMS, "rate": 10.0}, []),
    ],
)
def test_impossible_plan_is_refused_with_what_is_possible(changes: dict[str, Any], faults: list[str]) -> None:
    if not faults:
        check_plan(plan(**changes))
        return
    (fault,) = faults_of(plan(**changes))
    assert all(each in fault for each in faults)


def test_operator_session_counts_towards_its_limit() -> None:
    same = users(2)
    faults_of(plan(sessions=10, credentials=same, operator=same[0]))
    check_plan(plan(sessions=9, credentials=same, operator=same[0]))
    places = session_credentials(plan(sessions=9, credentials=same, operator=same[0]))
    assert [places.count(each) for each in same] == [4, 5]


def test_shares_divide_streams_without_changing_them() -> None:
    whole = plan(stream="repeat", connections=10, pipeline=2, rate=40.0, duration_s=5.0, processes=2)
    assert (whole.streams, whole.items_per_stream, whole.load) == (20, 10, 200)
    parts = shares(whole, "127.0.0.1", 0.0, 100.0)
    assert [(each.stream, each.items_per_stream, each.interval_s) for each in parts] == [
        ("repeat", 10, 0.5)
    ] * 2
    assert [each.interval_s for each in shares(plan(), "127.0.0.1", 0.0, 100.0)] == [0.0]
    assert plan().load == 50


def test_all_faults_are_reported_together() -> None:
    assert len(faults_of(plan(connections=4, sessions=50, processes=60, payload_bytes=1 << 30))) == 4


def test_shares_add_up_to_the_plan() -> None:
    whole = plan(connections=11, sessions=7, processes=3, rate=900.0, arrival_rate=300.0)
    parts = shares(whole, "127.0.0.1", 5.0, 600.0)
    assert sum(each.connections for each in parts) == 11
    assert sum(each.rate for each in parts) == 900
    assert sum(each.arrival_rate for each in parts) == 300
    assert sum(each.verify_rate for each in parts) == 600
    dealt = [tuple(each) for part in parts for each in part.credentials]
    assert sorted(dealt) == sorted(tuple(each) for each in session_credentials(whole))
    assert all(part.connections >= len(part.credentials) >= 1 for part in parts)


def test_share_round_trips_as_json() -> None:
    (share,) = shares(plan(ca_file=Path("/x/ca.crt")), "127.0.0.1", 5.0, 600.0)
    assert share.ca_file == "/x/ca.crt"
    assert Share.from_json(share.as_json()) == share


def test_repr_of_plan_contains_no_key() -> None:
    shown = repr(plan()) + repr(OPERATOR) + repr(shares(plan(), "127.0.0.1", 5.0, 600.0))
    assert OPERATOR.key not in shown
    assert "operator" in repr(OPERATOR)


# --- source addresses ---------------------------------------------------------------------------------


def sources_of(asked: Plan, address: str = "127.0.0.1") -> list[list[str | None]]:
    """Return the source addresses of the connections of each process."""
    return [
        [None if source is None else source[0] for source in map(part.source, range(part.connections))]
        for part in shares(asked, address, 0.0, 100.0)
    ]


def test_connections_of_all_processes_are_spread_evenly_over_loopback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert sources_of(plan(connections=3, sessions=3)) == [[None] * 3]  # the system chooses
    monkeypatch.setattr(load_plan, "CONNECTIONS_PER_SOURCE", 3)
    found = sources_of(plan(connections=8, sessions=8, processes=2))
    assert Counter(chain(*found)) == {"127.0.0.1": 3, "127.0.0.2": 3, "127.0.0.3": 2}
    assert found[0] == ["127.0.0.1", "127.0.0.3", "127.0.0.2", "127.0.0.1"]


def test_more_than_255_addresses_continue_in_the_next_byte() -> None:
    (found,) = sources_of(plan(connections=300, sessions=300, sources=300))
    assert (found[0], found[255], len(set(found))) == ("127.0.0.1", "127.0.1.0", 300)


@pytest.mark.parametrize(("platform", "address"), [("darwin", "127.0.0.1"), ("linux", "192.0.2.7")])
def test_further_addresses_are_refused_on_other_systems_and_for_other_hosts(
    platform: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_plan.sys, "platform", platform)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"--sources 2: .* only on Linux"):
        sources_of(plan(sources=2), address)
    assert sources_of(plan(sources=1, connections=2, sessions=2), address) == [[None] * 2]


@pytest.mark.parametrize(
    ("address", "sources", "cure"),
    [
        ("192.0.2.7", None, "give --connections 28232 on each of several machines"),
        ("127.0.0.1", 2, "give --sources 3, or --connections 56464 on each of several machines"),
    ],
)
def test_more_connections_than_ports_are_refused(
    address: str, sources: int | None, cure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "range").write_text("32768\t60999\n")
    monkeypatch.setattr(load_plan, "PORT_RANGE", tmp_path / "range")
    with pytest.raises(ConfigError, match=cure):
        sources_of(plan(connections=60_000, sources=sources), address)


def test_ports_of_unknown_systems_are_those_of_the_standard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_plan, "PORT_RANGE", tmp_path / "missing")
    with pytest.raises(ConfigError, match="16384 ports"):
        sources_of(plan(connections=16_385), "192.0.2.7")


# --- keys files ---------------------------------------------------------------------------------------


def test_keys_file_has_a_name_and_a_key_per_line(tmp_path: Path) -> None:
    path = tmp_path / "load.keys"
    path.write_text("load-1\tAAA\n\nload-2\tBBB\n")
    assert read_credentials(path) == (Credential("load-1", "AAA"), Credential("load-2", "BBB"))


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        (b"", "contains no key"),
        (b"\n \n", "contains no key"),
        (b"load-1 SECRET\n", "line 1: must have a name, a tab and a key"),
        (b"load-1\tAAA\nload-2\t\n", "line 2"),
        (b"\tSECRET\n", "line 1"),
        (b"load-1\tAAA\nload-1\tBBB\n", "twice"),
        (b"\xff\xfe\x00", "is not a text file"),
        (b"\n" * (MAX_KEY_FILE_BYTES + 1), "too large"),
        (None, r"No such file.*zcproto user add"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_invalid_keys_file_is_refused_without_its_content(
    content: bytes | None, phrase: str, tmp_path: Path
) -> None:
    path = tmp_path / "load.keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=phrase) as caught:
        read_credentials(path)
    assert "SECRET" not in str(caught.value)


# --- open files ---------------------------------------------------------------------------------------


class Limits:
    """Fake the limit of open files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, soft: int, hard: int) -> None:
        self.now = (soft, hard)
        monkeypatch.setattr(resource, "getrlimit", lambda kind: self.now)
        monkeypatch.setattr(resource, "setrlimit", self.set)

    def set(self, kind: int, limits: tuple[int, int]) -> None:
        assert kind == resource.RLIMIT_NOFILE
        self.now = limits


@pytest.mark.parametrize(
    ("needed", "hard", "after"),
    [(1024, 4096, 1024), (2000, 4096, 2000), (2000, resource.RLIM_INFINITY, 2000)],
)
def test_file_limit_is_raised_as_needed(
    needed: int, hard: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(monkeypatch, 1024, hard)
    require_open_files(needed, 900, lambda limit: limit)
    assert limits.now == (after, hard)


@pytest.mark.parametrize(("hard", "fitting"), [(4096, 3996), (50, 0)])
def test_fixed_file_limit_names_the_possible_connections(
    hard: int, fitting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(monkeypatch, 20, hard)
    with pytest.raises(ConfigError) as caught:
        require_open_files(5000, 4900, lambda limit: limit - 100)
    assert f"limit of this user is {hard}" in str(caught.value)
    assert "LimitNOFILE=5000" in str(caught.value)
    assert str(caught.value).endswith(f"--connections {fitting}")
    assert limits.now == (hard, hard)


@pytest.mark.parametrize(("connections", "processes"), [(900, 1), (936, 1), (937, 2), (60_000, 65)])
def test_processes_are_as_many_as_open_files_require(
    connections: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Limits(monkeypatch, 256, 1000)
    assert processes_for(connections) == processes
