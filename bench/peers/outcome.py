"""The figures beside one another: ratios by round, bars, and what cannot be compared."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, Final

from bench.peers.measure import GRPC, NAMES, STREAMS, UVICORN, WEBSOCKETS, ZCPROTO, Figures

REQUEST: Final = "request_us"
CONNECT: Final = "connect_us"
MEMORY: Final = "memory_kib"

UNITS: Final = {REQUEST: "us", CONNECT: "us", MEMORY: "KiB"}

BARS: Final = {
    REQUEST: {GRPC: 1 / 10, UVICORN: 1 / 2, WEBSOCKETS: 3 / 5, STREAMS: 3 / 4},
    CONNECT: {},
    MEMORY: {STREAMS: 1 / 7, GRPC: 1.0, UVICORN: 1.0},
}
"""What zcproto may take at most, as a part of what the other takes."""

NOTES: Final = {
    ZCPROTO: {
        REQUEST: "token, nonce, timestamp and limits are checked, params are decoded and encoded, requests counted",
        CONNECT: "with WELCOME and session.open: the digest of a key compared, a session with two tokens made",
        MEMORY: "each with a session of its own",
    },
    STREAMS: {
        REQUEST: "a length and bytes: no routing, no sessions, no limits but of size",
        CONNECT: "TLS and nothing else, with two session tickets, as the standard library sends them",
        MEMORY: "no sessions",
    },
    GRPC: {
        REQUEST: "HTTP/2 with headers, deadlines and flow control; bytes instead of protobuf, no interceptors",
        CONNECT: "with the settings of HTTP/2; TLS is BoringSSL's, which chooses its own suite",
        MEMORY: "no sessions; its C core keeps memory of its own",
    },
    UVICORN: {
        REQUEST: "HTTP/1.1 parsed, an ASGI application called; no framework, no access log, no cookies or tokens",
        CONNECT: "TLS and nothing else, with two session tickets",
        MEMORY: "no sessions",
    },
    WEBSOCKETS: {
        REQUEST: "masked binary messages; no compression, no pings by the clock, no sessions",
        CONNECT: "with the HTTP upgrade",
        MEMORY: "no sessions; compression, off here, would add to it",
    },
}
"""What the figure of a server has in it, or has not."""


@dataclass(frozen=True, slots=True)
class Row:
    """One server's figure. `ratio` is zcproto's in terms of it, the median of all rounds; of zcproto None."""

    figure: str
    name: str
    value: float
    unit: str
    note: str
    ratio: float | None = None
    least: float | None = None
    most: float | None = None
    bar: float | None = None

    @property
    def holds(self) -> bool:
        return self.bar is None or (self.ratio is not None and self.ratio <= self.bar)

    def as_json(self) -> dict[str, Any]:
        told = {name: getattr(self, name) for name in self.__slots__}
        return {**told, "holds": self.holds}


def rows(figures: Figures) -> list[Row]:
    """All of them, by figure."""
    found = []
    for figure, by_round in ((REQUEST, figures.request_s), (CONNECT, figures.connect_s)):
        found += [_timed(figure, name, by_round) for name in NAMES]
    if figures.memory_kib:
        found += [_weighed(name, figures.memory_kib) for name in NAMES]
    return found


def _timed(figure: str, name: str, by_round: dict[str, list[float]]) -> Row:
    value = statistics.median(by_round[name]) * 1e6
    if name == ZCPROTO:
        return Row(figure, name, value, UNITS[figure], NOTES[name][figure])
    ratios = [ours / theirs for ours, theirs in zip(by_round[ZCPROTO], by_round[name], strict=True)]
    return Row(
        figure,
        name,
        value,
        UNITS[figure],
        NOTES[name][figure],
        ratio=statistics.median(ratios),
        least=min(ratios),
        most=max(ratios),
        bar=BARS[figure].get(name),
    )


def _weighed(name: str, kib: dict[str, float]) -> Row:
    bar = BARS[MEMORY].get(name)
    ratio = None if name == ZCPROTO else kib[ZCPROTO] / kib[name]
    return Row(MEMORY, name, kib[name], UNITS[MEMORY], NOTES[name][MEMORY], ratio=ratio, bar=bar)


def reasons(found: list[Row]) -> list[str]:
    """Why it failed, if it did."""
    return [
        f"{row.figure}: {row.ratio:.3f} of {row.name}, at most {row.bar:.3f} was wanted"
        for row in found
        if not row.holds
    ]
