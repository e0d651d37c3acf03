"""Typed parameters and results: a method that takes and returns a nested dataclass, beside one of a plain dict.

The difference of the two is compared with `validate_python` and `dump_python` of pydantic alone. All three are run
in turn, each timed alone, so that disturbances of the machine hit all.
"""

from __future__ import annotations

import statistics
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import click
from pydantic import TypeAdapter

from bench.command import measurement
from bench.micro.timing import time_rows
from bench.report import Row
from zcproto.app.app import Method

LEAST: Final = 100
MOST_ADDED: Final = 1.3
"""Times pydantic alone: the calls of Python around it, and the limits on what a request makes it list."""


@dataclass
class Line:
    item: str
    count: int
    price: float


@dataclass
class Address:
    street: str
    city: str


@dataclass
class Order:
    id: int
    address: Address
    lines: list[Line]
    note: str | None = None


ORDER: Final[dict[str, Any]] = {
    "id": 7,
    "address": {"street": "Am Delft 1", "city": "Emden"},
    "lines": [{"item": "tea", "count": 2, "price": 4.5}, {"item": "cup", "count": 1, "price": 9.0}],
    "note": None,
}


def typed(order: Order) -> Order:
    return order


def plain(order: dict[str, Any]) -> dict[str, Any]:
    return order


def runner(method: Method) -> Callable[[], bytes]:
    params = {"order": ORDER}
    return lambda: method.encode(method.function(**method.bind(params)))


def measure(calls: int) -> list[Row]:
    adapter = TypeAdapter(Order)
    runs = [runner(Method("typed", typed)), runner(Method("plain", plain))]
    assert runs[0]() == runs[1]()
    with_pydantic: list[Callable[[], object]] = [
        *runs,
        lambda: adapter.dump_python(adapter.validate_python(ORDER)),
    ]
    times = [array("Q") for _ in with_pydantic]
    clock = time.perf_counter_ns
    for _ in range(calls):
        for run, spent in zip(with_pydantic, times, strict=True):
            begin = clock()
            run()
            spent.append(clock() - begin)
    of_typed, of_plain, alone = times
    added = statistics.median(of_typed) - statistics.median(of_plain)
    return [
        Row("calls", "calls of each kind", calls),
        *time_rows("typed", "a nested dataclass both ways", of_typed, "us", "p50"),
        *time_rows("plain", "the same as a dict", of_plain, "us", "p50"),
        *time_rows("pydantic", "validate_python and dump_python alone", alone, "us", "p50"),
        Row("added", "added, times pydantic alone", added / statistics.median(alone), "", below=MOST_ADDED),
    ]


@measurement
@click.option("--calls", type=click.IntRange(LEAST), default=50_000, show_default=True, help="Of each kind.")
def command(calls: int) -> list[Row]:
    return measure(calls)
