"""Records of a generator process: latencies and outcomes, as JSON and added up."""

from __future__ import annotations

import json

import pytest

from tests.load.helpers import latencies, verified_result
from zcproto.load.record import Latencies, Record, RequestKind, Tally, merge_records


def test_failed_excludes_requests_in_flight() -> None:
    tally = Tally(planned=20, sent=17, equal=10, unequal=1, lost=2, errors={"INTERNAL": 3}, not_sent={"x": 3})
    assert tally.failed == 9
    in_flight = tally.sent - tally.equal - tally.unequal - tally.lost - 3
    assert in_flight == 1


def test_tallies_add_up() -> None:
    first = Tally(5, 4, 2, 1, 1, {"INTERNAL": 1}, {"gone": 1})
    whole = Tally()
    for each in (first, first, Tally(1, 1, 0, 0, 0, {"ABORTED": 1})):
        whole.merge(each)
    assert whole == Tally(11, 9, 4, 2, 2, {"INTERNAL": 2, "ABORTED": 1}, {"gone": 2})


def test_record_round_trips_as_json() -> None:
    record = verified_result().record
    record.lost_connections = {"TLS: truncated": 2}
    record.cpu_share = 0.5
    back = Record.from_json(json.loads(json.dumps(record.as_json())))
    assert back.as_json() == record.as_json()
    assert back.requests_sent == 80


def test_records_of_processes_add_up() -> None:
    first, second, idle = verified_result().record, verified_result().record, Record()
    second.load_started, second.load_ended, second.cpu_share = 99.0, 101.0, 0.7
    second.lost_connections = {"closed by the server": 1}
    second.request_by_second[5] = latencies(700)
    whole = merge_records([first, second, idle])
    assert whole.tallies[RequestKind.LOAD].equal == 100
    assert whole.latencies["request"].total == 2 * first.latencies["request"].total
    assert whole.request_by_second[0].total == 6
    assert whole.request_by_second[5].total == 1
    assert whole.connected_over_time == {0: 8, 1: 12}
    assert whole.answered_over_time == {2: 100, 3: 20}
    assert whole.lost_connections == {"closed by the server": 1}
    assert (whole.ready, whole.sessions) == (20, 20)
    assert (whole.load_started, whole.load_ended, whole.cpu_share) == (99.0, 101.0, 0.7)


def test_sum_of_no_records_is_empty() -> None:
    assert merge_records([]).as_json() == Record().as_json()


# --- latencies --------------------------------------------------------------------------------------


def test_short_durations_are_counted_to_the_microsecond() -> None:
    latencies = Latencies()
    for micros in (1, 250, 250, 9_999):
        latencies.add(micros / 1e6 + 1e-9)
    assert latencies.counts == {1: 1, 250: 2, 9_999: 1}
    assert latencies.max_us == 9_999
    assert latencies.total == 4


@pytest.mark.parametrize(
    ("micros", "counted"), [(12_345, 12_340), (1_234_567, 1_234_000), (60_000_001, 60_000_000)]
)
def test_long_durations_keep_four_digits_and_an_exact_maximum(micros: int, counted: int) -> None:
    latencies = Latencies()
    latencies.add(micros / 1e6 + 1e-9)
    assert latencies.counts == {counted: 1}
    assert latencies.max_us == micros


@pytest.mark.parametrize("seconds", [0.0, -0.001, 1e-7])
def test_shortest_duration_is_one_microsecond(seconds: float) -> None:
    latencies = Latencies()
    latencies.add(seconds)
    assert latencies.counts == {1: 1}


def test_maximum_does_not_depend_on_the_order() -> None:
    latencies = Latencies()
    for seconds in (0.5, 0.001, 0.7, 0.002):
        latencies.add(seconds)
    assert latencies.max_us == pytest.approx(700_000, abs=1)


def test_latencies_add_up_and_round_trip_as_json() -> None:
    first, second = Latencies({100: 1, 200: 2}, 200), Latencies({200: 1, 300: 1}, 300)
    first.merge(Latencies.from_json(json.loads(json.dumps(second.as_json()))))
    assert first.counts == {100: 1, 200: 3, 300: 1}
    assert first.max_us == 300


def test_number_of_keys_is_bounded() -> None:
    latencies = Latencies()
    for number in range(100_000):
        latencies.add(number * 97e-6)
    assert latencies.total == 100_000
    assert len(latencies.counts) < 10_000 + 4 * 9_000
