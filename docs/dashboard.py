"""The Grafana dashboard: its panels, and its JSON, which `python -m docs.generate` writes."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

WHERE = 'job=~"$job", instance=~"$instance"'
OVER = "$__rate_interval"
LIVE = ', state="live"'
BY, WORKER = "instance, worker", "{{instance}} {{worker}}"


class Panel(NamedTuple):
    """A panel: its title, its Grafana unit, and its expressions with the legends of their lines."""

    title: str
    unit: str
    lines: dict[str, str]
    kind: str = "timeseries"


def rate(name: str, by: str, more: str = "") -> str:
    """Return the rate of a counter per second, summed by some labels."""
    return f"sum by ({by}) (rate({name}{{{WHERE}{more}}}[{OVER}]))"


def quantile(share: float, name: str, by: str = "") -> str:
    """Return a quantile of a histogram."""
    labels = ", ".join(["le", *([by] if by else [])])
    return f"histogram_quantile({share}, {rate(f'{name}_bucket', labels)})"


def now(name: str, more: str = "") -> str:
    """Return a gauge."""
    return f"{name}{{{WHERE}{more}}}"


def total(name: str, more: str = "") -> str:
    """Return a gauge summed over all instances."""
    return f"sum({now(name, more)})"


PANELS: dict[str, list[Panel]] = {
    "Now": [
        Panel("Connections", "short", {total("zcproto_connections"): ""}, "stat"),
        Panel("Live sessions", "short", {total("zcproto_sessions", LIVE): ""}, "stat"),
        Panel("Requests per second", "reqps", {rate("zcproto_requests_total", ""): ""}, "stat"),
        Panel(
            "First certificate to expire",
            "s",
            {f"min({now('zcproto_certificate_left_seconds')})": ""},
            "stat",
        ),
        Panel("Store unavailable for", "s", {f"max({now('zcproto_store_outage_seconds')})": ""}, "stat"),
        Panel(
            "Most used limit",
            "percentunit",
            {f"max({now('zcproto_limit_use')} / {now('zcproto_limit')})": ""},
            "stat",
        ),
    ],
    "Requests": [
        Panel("Calls by method", "reqps", {rate("zcproto_method_calls_total", "method"): "{{method}}"}),
        Panel("Errors by code", "reqps", {rate("zcproto_errors_total", "code") + " > 0": "{{code}}"}),
        Panel("Frames refused", "reqps", {rate("zcproto_frames_refused_total", "reason"): "{{reason}}"}),
        Panel(
            "CPU time of a call",
            "s",
            {
                quantile(0.5, "zcproto_method_duration_seconds"): "p50",
                quantile(0.99, "zcproto_method_duration_seconds"): "p99",
            },
        ),
        Panel(
            "Calls that wait, p99",
            "s",
            {quantile(0.99, "zcproto_method_wait_seconds", "method"): "{{method}}"},
        ),
        Panel("In flight", "short", {now("zcproto_requests_in_flight"): "{{instance}}"}),
    ],
    "Connections and TLS": [
        Panel(
            "Connections",
            "short",
            {
                now("zcproto_tcp_connections"): "TCP {{instance}}",
                now("zcproto_connections"): "ZCP/1 {{instance}}",
            },
        ),
        Panel(
            "Handshakes", "ops", {rate("zcproto_tls_handshakes_completed_total", "instance"): "{{instance}}"}
        ),
        Panel(
            "Handshakes by key exchange", "ops", {rate("zcproto_tls_handshakes_total", "group"): "{{group}}"}
        ),
        Panel(
            "TLS failures by cause",
            "ops",
            {rate("zcproto_tls_failures_total", "cause") + " > 0": "{{cause}}"},
        ),
        Panel("Connections ended", "ops", {rate("zcproto_connections_ended_total", "reason"): "{{reason}}"}),
        Panel(
            "Connections refused", "ops", {rate("zcproto_connections_refused_total", "reason"): "{{reason}}"}
        ),
        Panel("Slow readers", "short", {now("zcproto_slow_readers"): "{{instance}}"}),
        Panel("Handshakes in progress", "short", {now("zcproto_tls_handshakes_in_progress"): "{{instance}}"}),
        Panel(
            "HTTPS responses by status",
            "reqps",
            {rate("zcproto_http_responses_total", "status"): "{{status}}"},
        ),
        Panel("Events sent", "ops", {rate("zcproto_events_sent_total", "instance"): "{{instance}}"}),
        Panel(
            "Streams",
            "short",
            {
                f"sum by (method) ({now('zcproto_streams_open')})": "open: {{method}}",
                rate("zcproto_streams_cut_total", "reason"): "cut a second: {{reason}}",
            },
        ),
        Panel("Items of streams", "ops", {rate("zcproto_stream_items_total", "direction"): "{{direction}}"}),
        Panel(
            "Bytes of items", "Bps", {rate("zcproto_stream_item_bytes_total", "direction"): "{{direction}}"}
        ),
        Panel(
            "Durable runs",
            "short",
            {
                now("zcproto_runs_running"): "methods {{instance}}",
                now("zcproto_runs_attached"): "readers {{instance}}",
            },
        ),
        Panel("Durable runs: ends", "ops", {rate("zcproto_runs_ended_total", "code"): "{{code}}"}),
        Panel("Calls to clients", "ops", {rate("zcproto_client_calls_total", "result"): "{{result}}"}),
        Panel(
            "Clients that handle calls",
            "short",
            {
                now("zcproto_client_handlers"): "registered {{instance}}",
                now("zcproto_client_calls_in_flight"): "calls in flight {{instance}}",
                now("zcproto_client_calls_elsewhere"): "calls to clients elsewhere {{instance}}",
                now("zcproto_pending_calls_waiting"): "pending calls {{instance}}",
            },
        ),
        Panel(
            "Topics: events",
            "ops",
            {
                rate("zcproto_topic_events_total", "topic"): "{{topic}} published",
                rate("zcproto_topic_dropped_total", "topic"): "{{topic}} dropped for slow subscribers",
                rate("zcproto_topic_ended_total", "topic"): "{{topic}} subscribers ended, too slow",
                rate("zcproto_topic_undelivered_total", "reason"): "{{reason}} on the way to other processes",
            },
        ),
        Panel(
            "Topics: subscribers",
            "short",
            {f"sum by (topic) ({now('zcproto_topic_subscribers')})": "{{topic}}"},
        ),
    ],
    "Sessions and logins": [
        Panel("Sessions", "short", {f"sum by (state) ({now('zcproto_sessions')})": "{{state}}"}),
        Panel(
            "Sessions opened and refreshed",
            "ops",
            {
                rate("zcproto_sessions_opened_total", ""): "opened",
                rate("zcproto_sessions_refreshed_total", ""): "refreshed",
            },
        ),
        Panel("Sessions ended", "ops", {rate("zcproto_sessions_ended_total", "reason"): "{{reason}}"}),
        Panel("Logins", "ops", {rate("zcproto_logins_total", "scheme, result"): "{{scheme}} {{result}}"}),
        Panel(
            "Tokens refused",
            "ops",
            {
                rate("zcproto_tokens_refused_total", ""): "invalid",
                rate("zcproto_sessions_not_admitted_total", "reason"): "wrong {{reason}}",
            },
        ),
        Panel(
            "Idempotent requests not run",
            "ops",
            {rate("zcproto_idempotent_answers_total", "result"): "{{result}}"},
        ),
        Panel(
            "Logins throttled", "ops", {rate("zcproto_logins_throttled_total", "instance"): "{{instance}}"}
        ),
        Panel(
            "Reused tokens and replays",
            "short",
            {
                f"sum(increase(zcproto_refresh_tokens_reused_total{{{WHERE}}}[1h]))": "tokens reused per hour",
                f'sum(increase(zcproto_errors_total{{{WHERE}, code="REPLAYED"}}[1h]))': "replays per hour",
            },
        ),
    ],
    "Session store": [
        Panel("State", "short", {now("zcproto_store_state") + " == 1": "{{instance}} {{state}}"}),
        Panel(
            "Operations",
            "s",
            {
                quantile(0.5, "zcproto_store_operation_seconds"): "p50",
                quantile(0.99, "zcproto_store_operation_seconds"): "p99",
            },
        ),
        Panel("Failures", "ops", {rate("zcproto_store_failures_total", "instance"): "{{instance}}"}),
        Panel(
            "Operations in progress", "short", {now("zcproto_store_operations_in_progress"): "{{instance}}"}
        ),
        Panel("Pending revocations", "short", {now("zcproto_store_pending_revocations"): "{{instance}}"}),
        Panel("Tokens looked up", "ops", {rate("zcproto_store_lookups_total", "result"): "{{result}}"}),
    ],
    "Certificates and limits": [
        Panel(
            "Certificates: time left", "s", {now("zcproto_certificate_left_seconds"): "{{instance}} {{path}}"}
        ),
        Panel(
            "Certificates: events per day",
            "short",
            {f"sum by (event) (increase(zcproto_certificate_events_total{{{WHERE}}}[1d])) > 0": "{{event}}"},
        ),
        Panel(
            "Use of limits",
            "percentunit",
            {f"{now('zcproto_limit_use')} / {now('zcproto_limit')}": "{{instance}} {{limit}}"},
        ),
    ],
    "Process": [
        Panel("CPU", "percentunit", {f"rate(process_cpu_seconds_total{{{WHERE}}}[{OVER}])": "{{instance}}"}),
        Panel("Memory", "bytes", {now("process_resident_memory_bytes"): "{{instance}}"}),
        Panel(
            "File descriptors",
            "short",
            {now("process_open_fds"): "{{instance}}", now("process_max_fds"): "limit {{instance}}"},
        ),
        Panel(
            "Loop lag, p99",
            "s",
            {quantile(0.99, "zcproto_loop_lag_seconds", "instance"): "{{instance}}"},
        ),
        Panel(
            "Garbage collections",
            "ops",
            {rate("python_gc_collections_total", "generation"): "{{generation}}"},
        ),
        Panel("Incidents", "short", {f"sum(increase(zcproto_incidents_total{{{WHERE}}}[1h]))": "per hour"}),
    ],
    "Workers": [
        Panel("Connections of workers", "short", {now("zcproto_worker_connections"): WORKER}),
        Panel("Requests of workers", "reqps", {rate("zcproto_worker_requests_total", BY): WORKER}),
        Panel("CPU of workers", "percentunit", {rate("zcproto_worker_cpu_seconds_total", BY): WORKER}),
        Panel("Memory of workers", "bytes", {now("zcproto_worker_resident_memory_bytes"): WORKER}),
        Panel(
            "Loop lag of workers, p99", "s", {quantile(0.99, "zcproto_worker_loop_lag_seconds", BY): WORKER}
        ),
    ],
}

COLUMNS = 24
ACROSS = {"stat": (4, 4), "timeseries": (8, 8)}
"""Width and height of a panel, in grid units; a row has 24 columns."""

SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard() -> str:
    """Return the JSON of the dashboard."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in PANELS.items():
        panels.append(
            _placed(
                {"type": "row", "title": title, "collapsed": False, "panels": []}, len(panels), 0, y, 24, 1
            )
        )
        y += 1
        x = 0
        for panel in row:
            width, height = ACROSS[panel.kind]
            if x + width > COLUMNS:
                x, y = 0, y + height
            panels.append(_placed(_panel(panel), len(panels), x, y, width, height))
            x += width
        y += ACROSS[row[-1].kind][1]
    value = {
        "title": "zcproto",
        "uid": "zcproto",
        "tags": ["zcproto"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
                _variable("job", "label_values(zcproto_build_info, job)"),
                _variable("instance", 'label_values(zcproto_build_info{job=~"$job"}, instance)'),
            ]
        },
        "annotations": {"list": []},
        "panels": panels,
    }
    return json.dumps(value, indent=1) + "\n"


def _placed(panel: dict[str, Any], number: int, x: int, y: int, width: int, height: int) -> dict[str, Any]:
    return {"id": number + 1, "gridPos": {"x": x, "y": y, "w": width, "h": height}, **panel}


def _panel(panel: Panel) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + number),
            "datasource": SOURCE,
            "expr": expr,
            "legendFormat": legend or "__auto",
        }
        for number, (expr, legend) in enumerate(panel.lines.items())
    ]
    return {
        "type": panel.kind,
        "title": panel.title,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {},
        "targets": targets,
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "includeAll": True,
        "multi": True,
        "refresh": 2,
        "current": {"text": "All", "value": "$__all"},
    }
