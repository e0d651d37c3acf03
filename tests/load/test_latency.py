from __future__ import annotations

import json

import pytest

from zcproto.load.latency import Latencies


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
def test_what_is_below_the_clocks_grain_is_one_microsecond(seconds: float) -> None:
    latencies = Latencies()
    latencies.add(seconds)
    assert latencies.counts == {1: 1}


def test_the_maximum_is_of_all_in_any_order() -> None:
    latencies = Latencies()
    for seconds in (0.5, 0.001, 0.7, 0.002):
        latencies.add(seconds)
    assert latencies.max_us == pytest.approx(700_000, abs=1)


def test_latencies_add_up_and_travel_as_json() -> None:
    first, second = Latencies({100: 1, 200: 2}, 200), Latencies({200: 1, 300: 1}, 300)
    first.merge(Latencies.from_json(json.loads(json.dumps(second.as_json()))))
    assert first.counts == {100: 1, 200: 3, 300: 1}
    assert first.max_us == 300


def test_keys_stay_few_however_many_durations_come() -> None:
    latencies = Latencies()
    for number in range(100_000):
        latencies.add(number * 97e-6)
    assert latencies.total == 100_000
    assert len(latencies.counts) < 10_000 + 4 * 9_000
