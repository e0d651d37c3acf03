"""`zcproto status`: the status of a running server, once or continuously."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import click

from zcproto.cli import Instance, instance_options, number_option
from zcproto.cli.control import CONNECT_S, Control, require_control
from zcproto.cli.output import json_text, print_report
from zcproto.common.text import counted, escape_text

STATUS_S = 2 * CONNECT_S
"""The timeout of a response, which takes a millisecond."""

USUAL_SIZE = (100, 40)
_ALTERNATE, _BACK = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_TOP, _REST_OF_LINE, _REST = "\x1b[H", "\x1b[K", "\x1b[J"
_BOLD, _RED, _PLAIN = "\x1b[1m", "\x1b[31m", "\x1b[0m"

MAX_ALERTS = 10
MAX_TEXT = 160
SOON_DAYS = 7
_WIDTH = 14
_KIB = 1024

Line = tuple[str, str]
"""A line and its style: "head", "bad" or ""."""


@click.command()
@click.option("--watch", is_flag=True, help="Show it continuously until Ctrl-C.")
@number_option(
    "--interval", click.FloatRange(0.2, 3600), 1.0, "S", "Seconds between two readings of --watch."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch one object per line.")
@instance_options
def status(instance: Instance, watch: bool, interval: float, as_json: bool) -> None:
    """Show the status of the server of this home folder: connections, sessions, requests, certificates, alerts.

    Exit code 1 if no server runs.
    """
    server = require_control(instance.home, STATUS_S)
    if not watch:
        report = server.get("/v1/status")
        print_report(as_json, report, _plain(report))
    elif as_json or not sys.stdout.isatty():
        for report in _readings(server, interval):
            click.echo(json_text(report) if as_json else f"{_plain(report)}\n")
            sys.stdout.flush()
    else:
        _show(server, interval)


def _readings(server: Control, interval: float) -> Iterator[dict[str, Any]]:
    while True:
        yield server.get("/v1/status")
        time.sleep(interval)


def _plain(report: dict[str, Any]) -> str:
    return "\n".join(text for text, _ in lines_of(report))


def _show(server: Control, interval: float) -> None:
    """Show the status on the alternate screen of a terminal, and restore the terminal at the end."""
    out = sys.stdout
    out.write(_ALTERNATE)
    try:
        for report in _readings(server, interval):
            out.write(frame(report, *shutil.get_terminal_size(USUAL_SIZE)))
            out.flush()
    finally:
        out.write(_BACK)
        out.flush()


def frame(report: dict[str, Any], width: int, height: int) -> str:
    """Return one screen for a terminal: the lines that fit, overwriting the previous ones."""
    colours = {"head": _BOLD, "bad": _RED}
    shown = [
        f"{colours.get(style, '')}{text[:width]}{_PLAIN if style in colours else ''}{_REST_OF_LINE}"
        for text, style in lines_of(report)[: max(1, height - 1)]
    ]
    return _TOP + "\r\n".join(shown) + _REST


# --- lines for people --------------------------------------------------------------------------------------------


def lines_of(report: Mapping[str, Any]) -> list[Line]:
    """Return the status as styled lines, escaped for a terminal."""
    parts = (_server, _traffic, _handshakes, _store, _workers, _certificates, _alerts)
    return [(escape_text(text, MAX_TEXT), style) for part in parts for text, style in part(report)]


def _server(report: Mapping[str, Any]) -> Iterator[Line]:
    process, connections, sessions = report["process"], report["connections"], report["sessions"]
    states = {each["state"] for each in report.get("workers", []) if each["worker"] != "coordinator"}
    state = "DRAINING" if report["draining"] else "serving"
    if states and states.isdisjoint({"serving", "draining"}):
        state = "NO WORKER SERVES"
    yield f"zcproto {report['version']}  {', '.join(report['addresses'])}  {state}", "head"
    yield _row(
        "process",
        f"pid {report['pid']}, up {span(report['uptime_s'])}, {size(process['rss_bytes'])},"
        f" {process['cpu_s']:.0f} s of CPU, log level {report['log_level']}",
    )
    yield _row(
        "connections",
        f"{connections['zcp']:,} ZCP, {connections['http']:,} HTTPS, of at most {connections['limit']:,}"
        f"; refused {sum(connections['refused'].values()):,}",
        bad=connections["tcp"] >= connections["limit"],
    )
    yield _row(
        "sessions",
        f"{sessions['live']:,} live, {sessions['lapsed']:,} to be refreshed;"
        f" opened {sessions['opened']:,}, revoked {sessions['revoked']:,}",
    )


def _traffic(report: Mapping[str, Any]) -> Iterator[Line]:
    requests, traffic = report["requests"], report["traffic"]
    yield _row(
        "requests",
        f"{traffic['requests_per_s']:,.1f}/s, errors {traffic['errors_per_s']:,.1f}/s;"
        f" {requests['total']:,} in all, {requests['in_flight']:,} in flight",
    )
    streams = report["streams"]
    if streams["opened"]:
        yield _row(
            "streams",
            f"{streams['open']:,} open; {streams['opened']:,} in all, {streams['cut']:,} cut;"
            f" {streams['items_sent']:,} items sent, {streams['items_received']:,} received",
        )
    runs = report.get("runs", {})  # none of a server of an earlier version
    if any(runs.values()):
        yield _row(
            "durable runs",
            f"{runs['running']:,} running, {runs['attached']:,} read by clients;"
            f" {runs['ended']:,} ended, {runs['lost']:,} lost; {runs['kept_bytes']:,} bytes kept"
            + (f"; {counted(runs['away'], 'process')} without the store" if runs["away"] else ""),
            bad=runs["away"] > 0,
        )
    calls = report["calls"]
    if calls["handlers"] or calls["ended"]:
        ended = ", ".join(f"{count:,} {result}" for result, count in sorted(calls["ended"].items()))
        yield _row(
            "calls",
            f"handled by {counted(calls['handlers'], 'client')}; {calls['in_flight']:,} in flight;"
            f" {ended or 'none yet'}"
            + (f"; {calls['elsewhere']:,} to other processes" if calls.get("elsewhere") else ""),
        )
    yield _row("CPU time", f"{_percentiles(traffic['work'])}  (of requests, last minute)")
    if traffic["waits"]["count"]:
        yield _row("awaiting", f"{_percentiles(traffic['waits'])}  (of those that awaited)")
    if requests["incidents"]:
        yield _row("incidents", f"{requests['incidents']:,}; see the log", bad=True)


def _handshakes(report: Mapping[str, Any]) -> Iterator[Line]:
    handshakes = report["handshakes"]
    failed = sorted(handshakes["failed"].items(), key=lambda each: (-each[1], each[0]))
    causes = ", ".join(f"{cause} {count:,}" for cause, count in failed)
    yield _row(
        "handshakes",
        f"{handshakes['completed']:,} completed ({report['traffic']['handshakes_per_s']:,.1f}/s),"
        f" {handshakes['in_progress']:,} in progress,"
        f" {sum(handshakes['failed'].values()):,} failed{': ' if causes else ''}{causes}",
    )
    if groups := handshakes.get("groups"):  # none of a server of an earlier version
        yield _row("key exchange", ", ".join(f"{name} {count:,}" for name, count in sorted(groups.items())))


def _store(report: Mapping[str, Any]) -> Iterator[Line]:
    store = report["store"]
    bad = store["state"] != "healthy" or bool(store.get("refusing"))
    pending = store.get("pending_revocations")
    more = f", {counted(pending, 'revocation')} pending" if pending else ""
    refusing = ", all tokens are refused" if store.get("refusing") else ""
    yield _row("store", f"{store['url']}: {store['state']}{refusing}{more}", bad=bad)


def _workers(report: Mapping[str, Any]) -> Iterator[Line]:
    processes = report.get("workers", [])
    workers = [each for each in processes if each["worker"] != "coordinator"]
    if workers:
        serving = sum(each["state"] == "serving" for each in workers)
        yield from (("", ""), (f"workers: {serving} of {len(workers)} serving", "head"))
    for each in processes:
        more = [f"pid {each['pid']}"] if each["pid"] else []
        if each["rss_bytes"] is None:
            more.append(each["state"].upper())
        else:
            if each["state"] != "serving":
                more.append(each["state"])
            if each in workers:
                more += [f"{each['connections']:,} connections", f"{each['requests_per_s']:,.1f} requests/s"]
            more += [f"loop lag {duration(each['loop_lag_s'])}", size(each["rss_bytes"])]
        if each["restarts"]:
            more.append(counted(each["restarts"], "restart"))
        yield f"  {each['worker']:{_WIDTH - 2}}{', '.join(more)}", "bad" if each["rss_bytes"] is None else ""


def _certificates(report: Mapping[str, Any]) -> Iterator[Line]:
    yield from (("", ""), ("certificates", "head"))
    for one in report["certificates"]:
        names = ", ".join(one["site"] or one["names"])
        left = f"{counted(one['days_left'], 'day')} left" if one["seconds_left"] > 0 else "EXPIRED"
        text = f"  {one['file']:20} {one['key_type'] or one['source']:12} {left:14} {names}"
        yield text, "bad" if one["days_left"] < SOON_DAYS else ""


def _alerts(report: Mapping[str, Any]) -> Iterator[Line]:
    alerts = report["alerts"]
    yield from (("", ""), (f"alerts: {len(alerts['open'])} open", "head"))
    for alert in alerts["open"][:MAX_ALERTS]:
        ago = span(max(0, report["time"] - alert["began_at"]) / 1000)
        yield f"  {alert['severity']:9} {alert['title']}  (for {ago})", "bad"
    if len(alerts["open"]) > MAX_ALERTS:
        yield f"  and {len(alerts['open']) - MAX_ALERTS} more: zcproto alert list", "bad"
    for sink in alerts["sinks"]:
        if sink["down"]:
            yield (
                f"  the {sink['name']} is not reachable; waiting: {counted(sink['waiting'], 'message')}",
                "bad",
            )


def _row(name: str, text: str, *, bad: bool = False) -> Line:
    return f"{name:{_WIDTH}}{text}", "bad" if bad else ""


def _percentiles(figures: Mapping[str, Any]) -> str:
    if not figures["count"]:
        return "no requests"
    names = (("p50", "p50"), ("p90", "p90"), ("p99", "p99"), ("p99.9", "p999"))
    return "  ".join(f"{shown} {duration(figures[name])}" for shown, name in names)


def duration(seconds: float) -> str:
    """Return a short time with three digits."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def span(seconds: float) -> str:
    """Return a long time in its two largest units."""
    minutes, hours, days = int(seconds) // 60, int(seconds) // 3600, int(seconds) // 86_400
    if days:
        return f"{days}d {hours % 24}h"
    if hours:
        return f"{hours}h {minutes % 60}m"
    return f"{minutes}m {int(seconds) % 60}s" if minutes else f"{int(seconds)}s"


def size(number: float) -> str:
    """Return a number of bytes in MiB."""
    return f"{number / _KIB / _KIB:,.0f} MiB"
