"""Reports of several processes, added up."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.conftest import Serve
from tests.server.helpers import ServerThread
from zcproto.admin.snapshot import finish_status
from zcproto.workers import merge as module
from zcproto.workers.figures import Member, read_report
from zcproto.workers.merge import (
    MAX_ROWS,
    Report,
    lasting,
    merge,
    pack_report,
    rule_of,
    unpack_report,
)

counts = st.integers(0, 1 << 40)
exact = counts | counts.map(lambda number: number / 1024)
"""Values whose sums are exact in any order."""


@st.composite
def certificates(draw: st.DrawFn) -> list[dict[str, Any]]:
    rows = st.fixed_dictionaries(
        {
            "file": st.sampled_from(["a.crt", "b.crt"]),
            "source": st.sampled_from(["own", "files", "authority"]),
            "pin": st.sampled_from("pq"),
            "seconds_left": st.integers(-9, 9),
        }
    )
    return draw(st.lists(rows, max_size=3))


alerts = st.lists(
    st.fixed_dictionaries(
        {"began_at": counts, "ended_at": st.none() | counts, "kind": st.sampled_from("ab")}
    ),
    max_size=3,
)
buckets = st.just([]) | st.lists(counts, min_size=3, max_size=3)

statuses = st.fixed_dictionaries(
    {
        "version": st.just("1"),
        "pid": st.none() | st.just(7),
        "time": counts,
        "started_at": counts,
        "draining": st.booleans(),
        "addresses": st.just([]) | st.just(["localhost:1"]),
        "connections": st.fixed_dictionaries(
            {"tcp": counts, "limit": st.just(9), "refused": st.dictionaries(st.sampled_from("abc"), counts)}
        ),
        "traffic": st.fixed_dictionaries(
            {"requests_per_s": exact, "rate_window_s": exact, "work": buckets, "waits": buckets}
        ),
        "calls": st.fixed_dictionaries({"ended": st.dictionaries(st.sampled_from("abc"), counts)}),
        "certificates": certificates(),
        "store": st.fixed_dictionaries(
            {
                "state": st.sampled_from(["healthy", "degraded", "recovering"]),
                "refusing": st.booleans(),
                "outages": counts,
            }
        ),
        "alerts": st.fixed_dictionaries({"open": alerts, "over": alerts}),
        "process": st.fixed_dictionaries({"cpu_s": exact, "loop_lag_s": exact}),
    }
)
statistics = st.fixed_dictionaries(
    {
        "requests": counts,
        "running": counts,
        "errors": st.dictionaries(st.sampled_from("123"), counts),
        "http": st.none() | st.fixed_dictionaries({"connections": counts, "connections_opened": counts}),
        "pauses": buckets,
        "last_renewal": st.none() | st.fixed_dictionaries({"at": counts}),
    }
)


@st.composite
def readinesses(draw: st.DrawFn) -> dict[str, Any]:
    reasons = draw(st.lists(st.sampled_from("abc"), unique=True).map(sorted))
    return {
        "ready": not reasons,
        "reasons": reasons,
        "warnings": [],
        "checks": {"draining": draw(st.booleans())},
    }


@st.composite
def reports(draw: st.DrawFn) -> list[Report]:
    """Return reports of several processes, each with a number of its own."""
    numbers = draw(st.lists(st.integers(0, 9), unique=True, max_size=4))
    return [
        Report(
            draw(statuses),
            draw(statistics),
            draw(readinesses()),
            {"zcproto_requests_total": {(): draw(counts)}},
            [{"worker": str(number), "pid": number, "started_at": draw(counts)}],
        )
        for number in numbers
    ]


@given(reports(), st.randoms(use_true_random=False))
def test_order_of_reports_does_not_matter(given_reports: list[Report], random: Any) -> None:
    whole = merge(given_reports)
    shuffled = random.sample(given_reports, len(given_reports))
    assert merge(shuffled) == whole
    for cut in range(1, len(shuffled)):
        assert merge([merge(shuffled[:cut]), merge(shuffled[cut:])]) == whole
    if shuffled:
        assert (
            functools.reduce(lambda one, other: merge([one, other]), (merge([one]) for one in shuffled))
            == whole
        )


@given(reports())
def test_merging_changes_no_report(given_reports: list[Report]) -> None:
    before = copy.deepcopy(given_reports)
    merge(given_reports)
    assert given_reports == before


EVENTS = ("request", "error 3", "error 5", "opened", "closed", "refused full", "cut")


def report_of(events: list[str]) -> Report:
    """Return the report of a process that has counted these events."""
    seen = Counter(events)
    errors = {name.removeprefix("error "): count for name, count in seen.items() if name.startswith("error")}
    return Report(
        {
            "requests": {"total": seen["request"], "in_flight": seen["opened"]},
            "connections": {
                "tcp": seen["opened"] - seen["closed"],
                "refused": {"full": seen["refused full"]},
            },
            "streams": {"cut": seen["cut"]},
            "traffic": {"work": [seen["request"], 0], "requests_per_s": seen["request"]},
        },
        {"errors": errors, "pauses": [seen["cut"]]},
        {},
        {"zcproto_errors_total": {(code,): count for code, count in errors.items()}},
    )


@given(st.lists(st.lists(st.sampled_from(EVENTS)), min_size=1, max_size=4))
def test_merge_of_parts_equals_the_whole(parts: list[list[str]]) -> None:
    whole = report_of([event for part in parts for event in part])
    assert merge(map(report_of, parts)) == whole


@given(st.lists(st.lists(st.sampled_from(EVENTS)), min_size=1, max_size=5), st.sets(st.integers(0, 4)))
def test_counters_of_ended_processes_stay_in_the_sums(parts: list[list[str]], ended: set[int]) -> None:
    """Whatever processes have ended, no total is smaller than before."""
    reports = list(map(report_of, parts))
    before = merge(reports)
    after = merge(lasting(report) if number in ended else report for number, report in enumerate(reports))
    assert after.stats.get("errors", {}) == before.stats["errors"]
    assert after.series.get("zcproto_errors_total", {}) == before.series["zcproto_errors_total"]
    total = before.status["requests"]["total"]
    assert after.status.get("requests", {}).get("total", 0) == total
    assert after.status.get("connections", {}).get("tcp", 0) == sum(
        report.status["connections"]["tcp"] for number, report in enumerate(reports) if number not in ended
    )


def test_loop_lag_is_a_maximum_and_the_state_of_the_store_the_worst() -> None:
    def report(**status: Any) -> Report:
        return Report(status, {}, {}, {})

    status = merge(
        [
            report(process={"loop_lag_s": 0.2, "rss_bytes": 10}, store={"state": "healthy"}, draining=True),
            report(process={"loop_lag_s": 0.1, "rss_bytes": 20}, store={"state": "degraded"}, draining=False),
            report(
                process={"loop_lag_s": 0.0, "rss_bytes": 30}, store={"state": "recovering"}, draining=True
            ),
        ]
    ).status
    assert status == {
        "process": {"loop_lag_s": 0.2, "rss_bytes": 60},
        "store": {"state": "degraded"},
        "draining": False,
    }


def test_what_is_the_same_everywhere_is_not_added() -> None:
    report = Report({"pid": 3, "addresses": ["localhost:1"], "connections": {"limit": 9}}, {}, {}, {})
    coordinator = Report({"pid": 3, "addresses": []}, {}, {}, {})  # it does not listen
    assert merge([coordinator, report, report]).status == {**report.status, "connections": {"limit": 9}}


def test_server_is_ready_while_one_worker_is() -> None:
    def readiness(*reasons: str) -> Report:
        return Report({}, {}, {"ready": not reasons, "reasons": list(reasons)}, {})

    assert merge([readiness("draining"), readiness()]).readiness == {"ready": True, "reasons": []}
    assert merge([readiness("draining"), readiness("store")]).readiness == {
        "ready": False,
        "reasons": ["draining", "store"],
    }


def test_same_certificate_is_listed_once_with_the_shortest_time() -> None:
    def report(*rows: tuple[str, str, int]) -> Report:
        found = [
            {"file": "a.crt", "source": source, "sha256": sha, "days_left": left // 2, "seconds_left": left}
            for source, sha, left in rows
        ]
        return Report({"certificates": found}, {}, {}, {})

    merged = merge([report(("authority", "c", 9), ("own", "a", 4)), report(("own", "a", 2), ("own", "b", 8))])
    assert [
        (one["source"], one["sha256"], one["days_left"], one["seconds_left"])
        for one in merged.status["certificates"]
    ] == [("own", "a", 1, 2), ("own", "b", 4, 8), ("authority", "c", 4, 9)]


def test_lists_are_cut_at_their_bound_and_keep_the_newest() -> None:
    def report() -> Report:
        rows = [{"began_at": moment} for moment in range(MAX_ROWS)]
        return Report({"alerts": {"open": rows}}, {}, {}, {})

    rows = merge([report(), report()]).status["alerts"]["open"]
    assert [row["began_at"] for row in rows] == sorted([*range(MAX_ROWS // 2, MAX_ROWS)] * 2, reverse=True)


def test_nothing_is_the_merge_of_nothing() -> None:
    assert merge([]) == Report({}, {}, {}, {}, [])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"traffic": {"work": [1]}}, {"traffic": {"work": [1, 2]}}),
        ({"requests": {"total": 1}}, {"requests": {"total": "1"}}),
        ({"requests": {"total": 1}}, {"requests": 1}),
        ({"store": {"state": "healthy"}}, {"store": {"state": "unheard of"}}),
        ({"certificates": [{"file": "a"}]}, {"certificates": [{"file": "a"}]}),
        ({"alerts": {"open": [1]}}, {"alerts": {"open": [2]}}),
    ],
)
def test_reports_that_do_not_fit_together_are_refused(one: dict[str, Any], other: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - each has its own cause
        merge([Report(one, {}, {}, {}), Report(other, {}, {}, {})])


# --- real reports ------------------------------------------------------------------------------------------


def of_worker(server: ServerThread, number: int) -> Report:
    return server.in_loop(lambda: read_report(server.server.parts, Member(number, 4711 + number)))


def paths(fields: Any, path: str = "") -> list[str]:
    if not isinstance(fields, dict):
        return [path]
    return [each for key, value in fields.items() for each in paths(value, f"{path}.{key}" if path else key)]


def test_every_figure_has_a_rule(serve: Serve) -> None:
    server = serve(store__url="sqlite")
    with server.client("ada") as client:
        client.refused("no.such.method")
        report = of_worker(server, 1)
    found = {
        (name, path, rule_of(table, path))
        for name, table, fields in (
            ("status", module._STATUS, report.status),
            ("stats", module._STATS, report.stats),
            ("readiness", module._READINESS, report.readiness),
        )
        for path in paths(fields)
    }
    without = {(name, path) for name, path, rule in found if rule == "same"} - {
        ("status", path)
        for path in ("api", "version", "pid", "addresses", "log_level", "connections.limit", "store.url")
    }
    assert without == set()
    rules = {(name, path): rule for name, path, rule in found}
    assert (rules["stats", "running"], rules["stats", "sessions"]) == ("sum", "max")
    assert rules["stats", "requests"] == rules["status", "streams.opened"] == "total"
    assert rule_of(module._STATS, "errors.5") == rule_of(module._STATS, "http.responses.200") == "total"


def test_two_workers_report_twice_the_figures_of_one(serve: Serve) -> None:
    server = serve(store__url="sqlite")
    with server.client("ada") as client:
        client.echo()
        one = of_worker(server, 1)
    whole = unpack_report(msgpack.unpackb(msgpack.packb(pack_report(merge([one, one])))))
    status, single = finish_status(whole.status, whole.workers), finish_status(one.status)
    assert status["requests"]["total"] == 2 * single["requests"]["total"] > 0
    assert status["connections"]["limit"] == single["connections"]["limit"]
    assert status["certificates"] == single["certificates"]
    assert status["traffic"]["work"]["count"] == 2 * single["traffic"]["work"]["count"]
    assert status["traffic"]["work"]["p50"] == single["traffic"]["work"]["p50"]
    assert status["process"]["cpu_s"] == 2 * single["process"]["cpu_s"]
    assert [line["worker"] for line in status["workers"]] == ["1", "1"]
    assert status.keys() == single.keys()
    assert whole.stats["requests"] == 2 * one.stats["requests"]
    assert whole.readiness == one.readiness


def test_packed_report_is_small(serve: Serve) -> None:
    server = serve()
    assert len(msgpack.packb(pack_report(of_worker(server, 1)))) < 16_384


GOOD: Any = pack_report(Report({"a": [1, None, {"b": 2.5}]}, {}, {}, {}, [{"worker": "1"}]))


@pytest.mark.parametrize(
    "change",
    [
        lambda value: None,
        lambda value: value[:4],
        lambda value: [[], *value[1:]],
        lambda value: [{1: 2}, *value[1:]],
        lambda value: [{"a": b"bytes"}, *value[1:]],
        lambda value: [{"a": [1] * 50_000}, *value[1:]],
        lambda value: [{"a": functools.reduce(lambda inner, _: [inner], range(9), 1)}, *value[1:]],
        lambda value: [*value[:3], None, value[4]],
        lambda value: [*value[:4], [1]],
    ],
)
def test_unreadable_report_is_refused(change: Any) -> None:
    assert unpack_report(GOOD).status == {"a": [1, None, {"b": 2.5}]}
    with pytest.raises(ValueError, match="this is not a report"):
        unpack_report(change(list(GOOD)))
