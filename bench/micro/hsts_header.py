"""Strict-Transport-Security: a response of the HTTPS side with it and without it.

A response is all that happens between the bytes of a request and those of its answer, without a network and
without TLS. One with the header and one without it are made in turn, each timed alone, so that disturbances of
the machine hit both. The figure is the difference of the medians. It is small beside the rest, so the header's
own part is timed alone, too: taking the prepared bytes, and joining them to the rest.
"""

from __future__ import annotations

import statistics
import time
from array import array
from typing import Final

import click

from bench.command import measurement
from bench.micro.timing import time_rows
from bench.report import Row
from zcproto.common.clock import system_clock
from zcproto.http.connection import HttpConnection, HttpLimits
from zcproto.http.messages import SecurityHeaders, text_response

REQUEST: Final = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nUser-Agent: curl/8\r\nAccept: */*\r\n\r\n"
HEADER: Final = b"strict-transport-security: max-age=31536000; includesubdomains\r\n"
LEAST: Final = 100
MAX_COST_NS: Final = 1_000.0

WITH: Final = SecurityHeaders(tls=True)
WITHOUT: Final = SecurityHeaders(tls=False)


def measure(responses: int) -> list[Row]:
    assert answer(WITH).lower().count(HEADER) == 1
    assert HEADER not in answer(WITHOUT).lower()
    on, off = time_responses(responses)
    added = statistics.median(on) - statistics.median(off)
    alone = time_blocks(WITH, responses) - time_blocks(WITHOUT, responses)
    return [
        Row("responses", "responses of each kind", responses),
        *time_rows("with", "a response with the header", on, "us", "p50"),
        *time_rows("without", "a response without it", off, "us", "p50"),
        Row("added_ns", "added by the header", added, "ns", below=MAX_COST_NS),
        Row("alone_ns", "the header's own part", alone, "ns", below=MAX_COST_NS),
    ]


def connection(security: SecurityHeaders, responses: int = 1) -> HttpConnection:
    return HttpConnection(HttpLimits(max_requests=responses + 1), security, system_clock.now())


def answer(security: SecurityHeaders) -> bytes:
    one = connection(security)
    wall, now = system_clock.wall(), system_clock.now()
    assert one.receive_data(REQUEST, wall, now) is not None
    one.respond(text_response(200, "ok"), wall, now)
    return one.data_to_send()


def time_responses(responses: int) -> tuple[array[int], array[int]]:
    """Return the nanoseconds of each response with the header, and of each without it."""
    on, off = array("Q"), array("Q")
    both = [(connection(WITH, responses), on), (connection(WITHOUT, responses), off)]
    wall, now = system_clock.wall(), system_clock.now()
    response = text_response(200, "ok")
    clock = time.perf_counter_ns
    for _ in range(responses):
        for one, times in both:
            begin = clock()
            one.receive_data(REQUEST, wall, now)
            one.respond(response, wall, now)
            one.data_to_send()
            times.append(clock() - begin)
            one.sent.clear()
        both.reverse()  # neither is always the first
    assert all(len(times) == responses and not one.closing for one, times in both)
    return on, off


def time_blocks(security: SecurityHeaders, times: int) -> float:
    """Return the median of the nanoseconds for taking the header fields and joining them to a response."""
    rest = answer(security)
    clock, spent = time.perf_counter_ns, array("Q")
    for _ in range(times):
        begin = clock()
        b"".join((b"HTTP/1.1 200 OK", b"\r\n", security.block(), rest))
        spent.append(clock() - begin)
    return statistics.median(spent)


@measurement
@click.option(
    "--responses", type=click.IntRange(LEAST), default=100_000, show_default=True, help="Of each kind."
)
def command(responses: int) -> list[Row]:
    return measure(responses)
