"""The status of a server as lines for people. Pure: figures in, lines out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zcproto.common.text import escape_text

MAX_ALERTS = 10
MAX_TEXT = 160
SOON_DAYS = 7
_WIDTH = 14
_KIB = 1024

Line = tuple[str, str]
"""A line, and what it is: "head", "bad" or ""."""


def lines_of(found: Mapping[str, Any]) -> list[Line]:
    """All of it. Nothing in a line can move a cursor, whatever the server says."""
    lines = [
        *_server(found),
        *_traffic(found),
        *_handshakes(found["handshakes"], found["traffic"]),
        *_store(found["store"]),
        *_certificates(found["certificates"]),
        *_alerts(found["alerts"], found["time"]),
    ]
    return [(escape_text(text, MAX_TEXT), style) for text, style in lines]


def _server(found: Mapping[str, Any]) -> list[Line]:
    process, connections, sessions = found["process"], found["connections"], found["sessions"]
    state = "DRAINING" if found["draining"] else "serving"
    refused = sum(connections["refused"].values())
    return [
        (f"zcproto {found['version']}  {', '.join(found['addresses'])}  {state}", "head"),
        _row(
            "process",
            f"pid {found['pid']}, up {span(found['uptime_s'])}, {size(process['rss_bytes'])},"
            f" {process['cpu_s']:.0f} s of CPU, log level {found['log_level']}",
        ),
        _row(
            "connections",
            f"{connections['zcp']:,} ZCP, {connections['http']:,} HTTPS, of at most {connections['limit']:,}"
            f"; refused {refused:,}",
            bad=connections["tcp"] >= connections["limit"],
        ),
        _row(
            "sessions",
            f"{sessions['live']:,} live, {sessions['lapsed']:,} to be refreshed;"
            f" opened {sessions['opened']:,}, revoked {sessions['revoked']:,}",
        ),
    ]


def _traffic(found: Mapping[str, Any]) -> list[Line]:
    requests, traffic = found["requests"], found["traffic"]
    return [
        _row(
            "requests",
            f"{traffic['requests_per_s']:,.1f}/s, errors {traffic['errors_per_s']:,.1f}/s;"
            f" {requests['total']:,} in all, {requests['in_flight']:,} in flight",
        ),
        _row("latency", f"{_percentiles(traffic['work'])}  (at work, last minute)"),
        *(
            [_row("", f"{_percentiles(traffic['waits'])}  (those that waited)")]
            if traffic["waits"]["count"]
            else []
        ),
        *(
            [_row("faults", f"{requests['incidents']:,}; the log has each", bad=True)]
            if requests["incidents"]
            else []
        ),
    ]


def _handshakes(handshakes: Mapping[str, Any], traffic: Mapping[str, Any]) -> list[Line]:
    failed = sorted(handshakes["failed"].items(), key=lambda each: (-each[1], each[0]))
    causes = ", ".join(f"{cause} {count:,}" for cause, count in failed)
    return [
        _row(
            "handshakes",
            f"{handshakes['completed']:,} completed ({traffic['handshakes_per_s']:,.1f}/s),"
            f" {handshakes['in_progress']:,} in progress,"
            f" {sum(handshakes['failed'].values()):,} failed{': ' if causes else ''}{causes}",
        )
    ]


def _store(store: Mapping[str, Any]) -> list[Line]:
    bad = store["state"] != "healthy" or bool(store.get("refusing"))
    more = f", {store['pending_revocations']} revocations wait" if store.get("pending_revocations") else ""
    refusing = ", all tokens are refused" if store.get("refusing") else ""
    return [_row("store", f"{store['url']}: {store['state']}{refusing}{more}", bad=bad)]


def _certificates(certificates: Sequence[Mapping[str, Any]]) -> list[Line]:
    lines: list[Line] = [("", ""), ("certificates", "head")]
    for one in certificates:
        names = ", ".join(one["site"] or one["names"])
        left = f"{one['days_left']} days left" if one["seconds_left"] > 0 else "EXPIRED"
        text = f"  {one['file']:20} {one['key_type'] or one['source']:12} {left:14} {names}"
        lines.append((text, "bad" if one["days_left"] < SOON_DAYS else ""))
    return lines


def _alerts(alerts: Mapping[str, Any], now: int) -> list[Line]:
    lines: list[Line] = [("", ""), (f"alerts: {len(alerts['open'])} open", "head")]
    for alert in alerts["open"][:MAX_ALERTS]:
        ago = span(max(0, now - alert["began_at"]) / 1000)
        lines.append((f"  {alert['severity']:9} {alert['title']}  (for {ago})", "bad"))
    if len(alerts["open"]) > MAX_ALERTS:
        lines.append((f"  and {len(alerts['open']) - MAX_ALERTS} more: zcproto alert list", "bad"))
    for sink in alerts["sinks"]:
        if sink["down"]:
            lines.append((f"  they do not reach the {sink['name']}: {sink['waiting']} wait", "bad"))
    return lines


def _row(name: str, text: str, *, bad: bool = False) -> Line:
    return f"{name:{_WIDTH}}{text}", "bad" if bad else ""


def _percentiles(figures: Mapping[str, Any]) -> str:
    if not figures["count"]:
        return "no requests"
    names = (("p50", "p50"), ("p90", "p90"), ("p99", "p99"), ("p99.9", "p999"))
    return "  ".join(f"{shown} {duration(figures[name])}" for shown, name in names)


def duration(seconds: float) -> str:
    """A short time, with three digits."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def span(seconds: float) -> str:
    """A long time, in its two largest units."""
    minutes, hours, days = int(seconds) // 60, int(seconds) // 3600, int(seconds) // 86_400
    if days:
        return f"{days}d {hours % 24}h"
    if hours:
        return f"{hours}h {minutes % 60}m"
    return f"{minutes}m {int(seconds) % 60}s" if minutes else f"{int(seconds)}s"


def size(number: float) -> str:
    """Bytes, in MiB."""
    return f"{number / _KIB / _KIB:,.0f} MiB"
