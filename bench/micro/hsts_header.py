"""What Strict-Transport-Security costs: a response of the HTTPS side with it and without it.

    python -m bench.micro.hsts_header [--responses 100000] [--json FILE]

A response is all that happens between the bytes of a request and those of its answer, without a network and
without TLS: reading, checking, answering, writing. One with the header and one without it are made in turn, each
timed alone, so that what else the machine does hits both. The figure is the difference between the medians. As it
is small beside the rest, the header's own part is timed alone, too: taking the bytes that stand ready, and joining
them to the rest.
"""

from __future__ import annotations

import argparse
import statistics
import time
from array import array
from pathlib import Path
from typing import Final

from bench.micro.token_check import NS_PER_US, Figure, conclude
from zcproto.common.clock import system_clock
from zcproto.http.connection import HttpConnection, HttpLimits
from zcproto.http.messages import text_response
from zcproto.http.security_headers import SecurityHeaders, StrictTransportSecurity

REQUEST: Final = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nUser-Agent: curl/8\r\nAccept: */*\r\n\r\n"
HEADER: Final = b"strict-transport-security: max-age=31536000; includesubdomains\r\n"
LEAST: Final = 100
MAX_COST_NS: Final = 1_000.0

WITH: Final = SecurityHeaders(StrictTransportSecurity())
WITHOUT: Final = SecurityHeaders(None)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.micro.hsts_header", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--responses", type=int, default=100_000, help="responses of each kind")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    if options.responses < LEAST:
        parser.error(f"at least {LEAST} responses are needed")
    return conclude(measure(options.responses), options.json)


def measure(responses: int) -> list[Figure]:
    check()
    on, off = (statistics.median(times) for times in time_responses(responses))
    alone = time_blocks(WITH, responses) - time_blocks(WITHOUT, responses)
    return [
        Figure("responses of each kind", responses, ""),
        Figure("a response with the header, p50", on / NS_PER_US, "us"),
        Figure("a response without it, p50", off / NS_PER_US, "us"),
        Figure("added by the header", on - off, "ns", MAX_COST_NS),
        Figure("its own part alone", alone, "ns", MAX_COST_NS),
    ]


def check() -> None:
    """What is measured is what it is called."""
    assert answer(WITH).lower().count(HEADER) == 1
    assert HEADER not in answer(WITHOUT).lower()


def connection(security: SecurityHeaders, responses: int = 1) -> HttpConnection:
    return HttpConnection(HttpLimits(max_requests=responses + 1), security, system_clock.now())


def answer(security: SecurityHeaders) -> bytes:
    one = connection(security)
    wall, now = system_clock.wall(), system_clock.now()
    assert one.receive_data(REQUEST, wall, now) is not None
    one.respond(text_response(200, "ok"), wall, now)
    return one.data_to_send()


def time_responses(responses: int) -> tuple[array[int], array[int]]:
    """Nanoseconds of each response with the header, and of each without it."""
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
    """Nanoseconds for taking the header fields and joining them to the rest of a response, the median."""
    rest = answer(security)
    clock, spent = time.perf_counter_ns, array("Q")
    for _ in range(times):
        begin = clock()
        b"".join((b"HTTP/1.1 200 OK", b"\r\n", security.block(), rest))
        spent.append(clock() - begin)
    return statistics.median(spent)


if __name__ == "__main__":
    raise SystemExit(main())
