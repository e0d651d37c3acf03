"""Records of a generator process: latencies and outcomes, as JSON and added up."""

from __future__ import annotations

import json

import pytest

from tests.load.helpers import latencies, verified_result
from zcproto.load.record import Latencies, Record, RequestKind, Tally, merge_records


def test_tallies_add_up() -> None:
    first = Tally(5, 4, 2, 1, 1, {"INTERNAL": 1}, {"gone": 1})
    whole = Tally()
    for each in (first, first, Tally(1, 1, 0, 0, 0, {"ABORTED": 1})):
        whole.merge(each)
    assert whole == Tally(11, 9, 4, 2, 2, {"INTERNAL": 2, "ABORTED": 1}, {"gone": 2})
    in_flight = Tally(20, 17, 10, 1, 2, {"INTERNAL": 3}, {"x": 3})
    assert in_flight.failed == 9  # without the request in flight


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
    assert merge_records([]).as_json() == Record().as_json()


# --- latencies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("micros", "counts"),
    [
        ([1, 250, 9_999, 250], {1: 1, 250: 2, 9_999: 1}),
        ([12_345], {12_340: 1}),
        ([60_000_001, 1_234_567], {1_234_000: 1, 60_000_000: 1}),
        ([0.0, -1_000, 0.1], {1: 3}),
    ],
    ids=["to the microsecond", "four digits", "an exact maximum", "at least one microsecond"],
)
def test_durations_are_counted_by_four_digits(micros: list[float], counts: dict[int, int]) -> None:
    latencies = Latencies()
    for each in micros:
        latencies.add(each / 1e6 + 1e-9)
    assert (latencies.counts, latencies.total) == (counts, len(micros))
    assert latencies.max_us == int(max(0, *micros))


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
