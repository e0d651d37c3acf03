from __future__ import annotations

import json

from tests.load.helpers import latencies, verified_result
from zcproto.load.record import Record, merged
from zcproto.load.tally import Kind, Tally, total


def test_failed_requests_are_those_that_can_no_longer_be_verified() -> None:
    tally = Tally(planned=20, sent=17, equal=10, unequal=1, lost=2, errors={"INTERNAL": 3}, not_sent={"x": 3})
    assert tally.failed == 9
    in_flight = tally.sent - tally.equal - tally.unequal - tally.lost - 3
    assert in_flight == 1


def test_tallies_add_up() -> None:
    first = Tally(5, 4, 2, 1, 1, {"INTERNAL": 1}, {"gone": 1})
    assert total([first, first, Tally(1, 1, 0, 0, 0, {"ABORTED": 1})]) == Tally(
        11, 9, 4, 2, 2, {"INTERNAL": 2, "ABORTED": 1}, {"gone": 2}
    )


def test_a_record_travels_as_json() -> None:
    record = verified_result().record
    record.lost_links = {"TLS: truncated": 2}
    record.cpu_share = 0.5
    back = Record.from_json(json.loads(json.dumps(record.as_json())))
    assert back.as_json() == record.as_json()
    assert back.requests_sent == 80


def test_records_of_processes_add_up() -> None:
    first, second, idle = verified_result().record, verified_result().record, Record()
    second.load_started, second.load_ended, second.cpu_share = 99.0, 101.0, 0.7
    second.lost_links = {"closed by the server": 1}
    second.request_by_second[5] = latencies(700)
    whole = merged([first, second, idle])
    assert whole.tallies[Kind.LOAD].equal == 100
    assert whole.latencies["request"].total == 2 * first.latencies["request"].total
    assert whole.request_by_second[0].total == 6
    assert whole.request_by_second[5].total == 1
    assert whole.connected_over_time == {0: 8, 1: 12}
    assert whole.answered_over_time == {2: 100, 3: 20}
    assert whole.lost_links == {"closed by the server": 1}
    assert (whole.ready, whole.sessions) == (20, 20)
    assert (whole.load_started, whole.load_ended, whole.cpu_share) == (99.0, 101.0, 0.7)


def test_a_record_of_nothing_is_the_sum_of_none() -> None:
    assert merged([]).as_json() == Record().as_json()
