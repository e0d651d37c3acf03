"""Define every metric, and render readings of them for Prometheus.

    server objects count in plain integers  ->  at a scrape, sources read them  ->  Metrics.render writes them

All work happens at a scrape. docs/reference/metrics.md is generated from the table below; add a metric there first.

Rules:
- A metric has a fixed set of labels with few values: names of causes, methods, files and identity providers, never
  of users or peers.
- Each series appears once; of two readings the later one counts.
- Over several processes, counters and histograms are added. A gauge is added, too, unless the table says `max` or
  `min`: then the highest or lowest value is reported.
- The registry is separate from the global one of prometheus_client.

Must not know: where the values come from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Final, TypeAlias

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from zcproto.common.text import escape_text
from zcproto.observe.histogram import Histogram

TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"

MAX_LABEL: Final = 200
"""Maximum characters of a label value: paths may be long."""

_PREFIXES: Final = ("zcproto_", "process_", "python_")  # the others are usual for any process
_NAME: Final = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_UNITS: Final = ("seconds", "bytes")
_OPENMETRICS_VERSIONS: Final = ("0.0.1", "1.0.0")
_generate_openmetrics: Final[Callable[[CollectorRegistry], bytes]] = openmetrics.generate_latest
_NEVER: Final = re.compile(r"0(\.0{0,3})?")

# Title of a part of the page, NAME KIND [max|min] (LABELS), meaning.
_TABLE: Final = """\
# The server
zcproto_build_info gauge max (version python openssl)
    Always 1; the labels are the versions of zcproto, Python and OpenSSL.
zcproto_draining gauge min
    1 while the server drains, else 0.
zcproto_limit gauge max (limit)
    Value of a limit. `limit` is the name of its setting, if it has one.
zcproto_limit_use gauge max (limit)
    Current use of a limit. For limits per connection or address: the highest use of any of them.
zcproto_log_lines_lost_total counter
    Log lines that could not be written. Lines suppressed by a limit are counted in the log itself.
zcproto_audit_lines_lost_total counter
    Lines of the audit trail that could not be written.
zcproto_incidents_total counter
    Unexpected exceptions of methods or the server. Each is logged with its stack and the caller's incident
    id.
zcproto_telemetry_items_total counter (signal result)
    What was to be sent to a collector. `signal`: traces (spans), metrics (readings of all of them), logs (records);
    `result`: sent, failed (the collector did not take it), dropped (the queue was full, or the server ended).
zcproto_config_reloads_total counter (result)
    Reloads of the configuration. A refused one was invalid and changed nothing.
zcproto_config_refused gauge max
    1 after a refused reload, until one succeeds: a restart would fail.
zcproto_file_unreadable gauge max
    1 while users.toml, devices.toml or tokens.toml cannot be read: a restart would fail.

# Connections
zcproto_tcp_connections gauge
    Open TCP connections, including those in their handshake.
zcproto_connections gauge
    Open ZCP/1 connections.
zcproto_connections_opened_total counter
    ZCP/1 connections opened.
zcproto_connections_ended_total counter (reason)
    ZCP/1 connections ended. `reason`: a rule of the server, such as idle, no_session, slow_frame
    (limits.frame_timeout) or peer_silent (with streams), a protocol code, or a cause of zcproto_tls_failures_total.
zcproto_connections_refused_total counter (reason)
    Connections refused at accept. `reason`: full (limits.max_connections), per_address
    (limits.connections_per_address), per_network (its share of tls.max_pending waits for handshakes),
    flooding (limits.failed_handshakes_per_network), exhausted
    (no descriptor or memory left; retried).
zcproto_write_pauses_total counter
    Times that a peer read too slowly: its streams waited, or nothing was read from it.
zcproto_slow_readers gauge
    Connections paused until their peer reads.
zcproto_events_sent_total counter
    Events sent by methods and the server, except session.expiring.

# TLS
zcproto_tls_handshakes_completed_total counter
    TLS handshakes completed.
zcproto_tls_handshakes_total counter (group)
    TLS handshakes completed, by the group of their key exchange. X25519MLKEM768 is the post-quantum one.
zcproto_tls_handshakes_in_progress gauge
    TLS handshakes in progress, from the complete ClientHello on.
zcproto_tls_handshakes_pending gauge (state)
    Connections whose handshake has not begun. `state`: silent (without a complete ClientHello), or ready (waits
    for tls.max_handshakes or for CPU time).
zcproto_tls_failures_total counter (cause)
    TLS handshakes and connections that failed.

# Certificates
zcproto_certificate_expires_timestamp_seconds gauge min (path source site key_type)
    Expiry of a certificate in use, in seconds since the Unix epoch. `source`: own (managed), files, authority
    (the CA of managed certificates), client_authority.
zcproto_certificate_left_seconds gauge min (path source site key_type)
    Remaining validity of a certificate in use by the server's clock; negative if it has expired.
zcproto_certificate_lifetime_seconds gauge min (path source site key_type)
    The whole validity of a certificate in use, without authorities.
zcproto_certificate_events_total counter (event)
    Certificate events: loaded, renewed, invalid files, expiry and others.
zcproto_certificate_last_renewal_timestamp_seconds gauge max
    Time of the last renewal of managed certificates, successful or not, in seconds since the Unix epoch.
    Missing before the first one since the start.
zcproto_certificate_last_renewal_success gauge min
    1 if the last renewal succeeded, 0 if it failed. Missing before the first one since the start.

# Sessions
zcproto_sessions gauge max (state)
    Sessions known to this server. `state`: live, or lapsed (the token has expired; a refresh revives it). With
    several workers: live are those in their common store, lapsed ones included; with Valkey, those that one worker
    knows.
zcproto_sessions_opened_total counter
    Sessions opened here.
zcproto_sessions_refreshed_total counter
    Refreshes of sessions.
zcproto_sessions_ended_total counter (reason)
    Live sessions that ended or whose token expired. `reason`: expired, idle, closed (by the client), by_user,
    by_operator, user_changed, device_removed, replaced, disconnected (evicted without a connection),
    refresh_reused, elsewhere (by another server), other.
zcproto_sessions_revoked_total counter
    Sessions revoked here, live and lapsed, for whatever reason. Those closed by their clients do not count.
zcproto_refresh_tokens_reused_total counter
    Spent refresh tokens that were reused and ended their session: the token may be stolen.
zcproto_tokens_refused_total counter
    Invalid tokens refused.
zcproto_sessions_not_admitted_total counter (reason)
    Valid tokens refused by session binding. `reason`: user (removed), address, client.

# Logins
zcproto_logins_total counter (scheme result)
    Logins. `scheme`: the login scheme, or session.attach; `result`: accepted, refused, failed (the authenticator
    raised an exception or took too long).
zcproto_logins_pending gauge
    Logins that wait for their authenticators.
zcproto_logins_throttled_total counter
    Logins refused without a check after too many failures.
zcproto_oidc_keys_age_seconds gauge max (issuer)
    Seconds since the keys of an identity provider were fetched. Missing before the first time. Logins fetch
    them: the age grows without logins.
zcproto_oidc_keys_failing gauge max (issuer)
    1 while the last fetch of the keys has failed, else 0.
zcproto_oidc_fetches_total counter (issuer result)
    Fetches of the keys. `result`: fetched, failed.

# Requests
zcproto_requests_total counter
    Requests dispatched to a method, including unknown and forbidden methods.
zcproto_method_calls_total counter (method)
    Calls of each method.
zcproto_requests_in_flight gauge
    Calls in flight that wait for something, over all connections.
zcproto_method_duration_seconds histogram (method)
    Loop time of a call, up to its answer or first await. Sampled from one read every 16 ms.
zcproto_method_wait_seconds histogram (method)
    Duration of calls that awaited something, from the first await to the end. Measured for all of them.
zcproto_errors_total counter (code)
    Error frames sent, by the name of their code.
zcproto_frames_refused_total counter (reason code)
    Frames refused before they became a call. `reason`: token, stale, stale_dropped (without answer; counted
    when the connection ends), malformed, deadline (already passed), key_not_proved, max_streams, max_open
    (streams.max_open), draining, too_large_without_session.
zcproto_requests_limited_total counter (limit)
    Requests refused because a user or an address sent too many. `limit`: the key in the section `limits`:
    requests_per_user, requests_per_address, public_requests_per_address, running_per_user, running_per_address.
zcproto_thread_calls_refused_total counter
    Calls of methods with thread=True that were refused because too many waited for a thread
    (limits.waiting_for_thread).
zcproto_idempotent_requests_running gauge
    Requests with an idempotency key that are running.
zcproto_idempotent_answers_total counter (result)
    Requests with an idempotency key that were not run. `result`: repeated (answered with the first result),
    conflict (the key was used for another request), lost (the result of the first request is unknown), refused
    (too many requests of the user were running).

# Streams
zcproto_streams_open gauge (method)
    Streams that have not ended, over all connections. They are requests in flight, too.
zcproto_streams_opened_total counter
    Streams opened.
zcproto_stream_items_total counter (direction)
    Items of streams. `direction`: sent (to clients), received.
zcproto_stream_item_bytes_total counter (direction)
    Size of these items, with 64 bytes for the header of each.
zcproto_streams_cut_total counter (reason)
    Streams cancelled before their methods had returned. `reason`: caller, deadline, token_expired, token_revoked,
    token_rotated (the client has not shown the token of a refresh), session_replaced, draining, slow
    (streams.stall_timeout; not those in zcproto_topic_ended_total), stale (freshness.tolerance), wrong_token,
    denied (a reload of `auth.role`), memory (streams.memory_bytes), slow_frame (limits.frame_timeout),
    detached (the client left its run), resumed_elsewhere (a newer attachment).

# Durable streams
zcproto_runs_running gauge
    Methods of durable streams that run in this process, whether a client reads them or not.
zcproto_runs_attached gauge
    Durable streams that read a run.
zcproto_runs_kept_bytes gauge
    Memory of this process that counts against streams.durable_bytes: of all runs and their items, or with a shared
    store of its own runs, with copies of the items that were not taken.
zcproto_run_items_total counter
    Items of these methods.
zcproto_runs_ended_total counter (code)
    Methods that ended. `code`: that of the answer, ok for a result; deleted if the sessions of the user were
    revoked.
zcproto_runs_away gauge
    Processes that cannot reach the store of durable runs.
zcproto_runs_lost_total counter
    Runs that this process has ended with UNKNOWN, because the process that ran the method was lost.
zcproto_runs_repaired_total counter
    Logs of runs of which a failover of the store had lost a part, which was written back.

# Topics
zcproto_topic_subscribers gauge (topic)
    Streams that subscribe to the topic.
zcproto_topic_events_total counter (topic)
    Events published; each once, whatever the number of subscribers.
zcproto_topic_dropped_total counter (topic)
    Events that slow subscribers have missed. Counted when the subscriber reads again.
zcproto_topic_ended_total counter (topic)
    Streams that were cancelled because their subscriber had missed events of a topic with slow="end".
zcproto_topics_away gauge
    Processes whose topics with the scope "server" are cut off from those of the others.
zcproto_topic_undelivered_total counter (reason)
    Events of topics with the scope "server" that processes did not get: lost (published while the process was cut
    off, or not acknowledged), missed (counted by the process that did not get them), unreadable (sealed by another
    key), refused (publishing failed because too much waited).

# Calls to clients
zcproto_client_handlers gauge
    Sessions whose clients handle calls, over all connections.
zcproto_client_calls_total counter (result)
    Calls to clients. `result`: answered, failed (by the client), deadline, withdrawn (the method was cancelled),
    closed (the connection or the session ended); not sent: unavailable (no handler), limited, invalid.
zcproto_client_calls_in_flight gauge
    Methods that wait for the answer of a client.
zcproto_pending_calls_waiting gauge
    Calls that wait for the answer of any client of their user.
zcproto_pending_calls_total counter (result)
    Pending calls that ended. `result`: answered, failed (with an error of the client or operator), expired,
    withdrawn (with the method or the session of its caller), refused (at a limit).
zcproto_client_calls_elsewhere gauge
    Methods of this process that wait for the answer of a client of another worker or server, which counts the call
    in zcproto_client_calls_in_flight.
zcproto_client_answers_dropped_total counter
    Answers of clients to no call, or too late. Counted when the connection ends.

# The store of sessions
zcproto_store_state gauge max (state)
    1 for the current state of the session store, 0 for the others: healthy; degraded (unavailable and not
    used); recovering (a probe is running).
zcproto_store_refusing gauge max
    1 while every token is refused because an outage exceeds store.grace.
zcproto_store_outage_seconds gauge max
    Duration of the current outage of the store; 0 without one.
zcproto_store_outages_total counter
    Outages of the store begun.
zcproto_store_failures_total counter
    Failed operations of the store.
zcproto_store_operations_in_progress gauge
    Operations of the store in progress.
zcproto_store_operation_seconds histogram
    Duration of operations of the store, including failed ones.
zcproto_store_pending_revocations gauge
    Revocations on the local disk not yet written to the store.
zcproto_store_changes_total counter
    Changes by other servers, received from the store.
zcproto_store_lookups_total counter (result)
    Unknown tokens looked up in a shared store. `result`: found, missed.

# The event loop
zcproto_loop_held_total counter (method)
    Times that a method, or a middleware, held the event loop for longer than 100 ms, during which nothing else ran.
zcproto_loop_lag_seconds histogram
    Delay of a timer of the event loop: how long a request may have waited. Measured every 5 ms under
    heavy traffic or while it lags, every 20 ms under light traffic, else twice a second.

# Workers
zcproto_worker_up gauge max (worker)
    1 if the worker answers, 0 if it does not answer in time. Only with server.workers above 1, as all metrics of
    this part. `worker`: 1 and so on, or coordinator, the process that keeps what the workers share.
zcproto_worker_restarts_total counter (worker)
    Times that the process was replaced because it had ended unexpectedly.
zcproto_worker_connections gauge (worker)
    Open TCP connections of a worker.
zcproto_worker_requests_total counter (worker)
    Requests dispatched by a worker and its predecessors of this number.
zcproto_worker_cpu_seconds_total counter (worker)
    CPU time of a worker and its predecessors of this number.
zcproto_worker_resident_memory_bytes gauge (worker)
    Resident memory of a worker, with the pages that it shares with the others.
zcproto_worker_loop_lag_seconds histogram (worker)
    The delays of zcproto_loop_lag_seconds by worker: the sum over all hides a single slow one.

# HTTPS
zcproto_http_connections gauge
    Open HTTPS connections.
zcproto_http_connections_opened_total counter
    HTTPS connections opened.
zcproto_http_responses_total counter (status)
    Responses over HTTPS, by status.
zcproto_http_write_timeouts_total counter
    HTTPS connections reset because their peer did not read.

# Alerts
zcproto_alerts_open gauge (severity)
    Active alerts, by severity.
zcproto_alerts_raised_total counter (kind)
    Alerts raised, sent or only counted. `kind`: see docs/alerts.md.
zcproto_alert_messages_total counter (sink result)
    Messages about alerts by sink (webhook, command). `result`: arrived; failed (one attempt, may be retried);
    lost (given up).
zcproto_alert_messages_waiting gauge (sink)
    Messages waiting for delivery.
zcproto_alert_sink_down gauge max (sink)
    1 if the last delivery failed, else 0.

# The process
process_cpu_seconds_total counter
    CPU time of the process, user and system.
process_resident_memory_bytes gauge
    Resident memory of the process.
process_virtual_memory_bytes gauge
    Address space of the process.
process_start_time_seconds gauge min
    Start time of the process, in seconds since the Unix epoch.
process_open_fds gauge max
    Open file descriptors.
process_max_fds gauge max
    The limit of file descriptors.

# The interpreter
python_gc_collections_total counter (generation)
    Runs of the garbage collector, by generation.
python_gc_objects_collected_total counter (generation)
    Objects collected, by generation.
python_gc_objects_uncollectable_total counter (generation)
    Objects found uncollectable, by generation.
python_info gauge max (version implementation major minor patchlevel)
    Always 1; the labels are the version of Python.
"""
_HEAD: Final = re.compile(r"(\S+) (counter|gauge|histogram)(?: (max|min))?(?: \((.+)\))?")


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric with its full name. `kind` is counter, gauge or histogram, `labels` are names.

    `across` is how the values of several processes become one: sum, max or min.
    """

    name: str
    kind: str
    across: str
    help: str
    labels: tuple[str, ...]

    @property
    def unit(self) -> str:
        """Return the unit in the name: seconds, bytes, or empty."""
        last = self.name.removesuffix("_total").rpartition("_")[2]
        return last if last in _UNITS else ""


def parse_metric(entry: str) -> Metric:
    """Return the metric of one entry of the table, which must follow the conventions of Prometheus."""
    head, *help_lines = entry.split("\n    ")
    match = _HEAD.fullmatch(head)
    assert match is not None, f"{head!r} is not: NAME KIND [max|min] (LABELS)"
    name, kind, across, labels = match.groups(default="")
    metric = Metric(name, kind, across or "sum", " ".join(help_lines), tuple(labels.split()))
    assert name.startswith(_PREFIXES), name
    assert all(map(_NAME.fullmatch, (name, *metric.labels))), name
    assert name.endswith("_total") == (kind == "counter"), name
    assert metric.help.endswith("."), name
    assert not across or kind == "gauge", name
    assert "le" not in metric.labels, name
    return metric


TABLE: Final[dict[str, tuple[Metric, ...]]] = {
    title: tuple(map(parse_metric, re.split(r"\n(?! )", entries.strip())))
    for title, entries in re.findall(r"^# (.+)\n((?:[^#\n].*\n)+)", _TABLE, re.MULTILINE)
}
"""The metrics of each part, in the order of the page."""

METRICS: Final[dict[str, Metric]] = {metric.name: metric for part in TABLE.values() for metric in part}

Reading: TypeAlias = tuple[str, float | Histogram, *tuple[str, ...]]
"""The name of a metric, and the current value and the label values of one of its series."""

Series: TypeAlias = dict[str, dict[tuple[str, ...], float | Histogram]]
"""The values of each metric, by the values of its labels."""

Source: TypeAlias = Callable[[], Iterable[Reading]]
"""Reads some metrics. Called at each scrape, in the thread of `Metrics.render`."""


class Metrics:
    """All metrics of a process."""

    def __init__(self, *sources: Source) -> None:
        self._sources = sources
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self, accept: str) -> tuple[str, bytes]:
        """Return content type and text: OpenMetrics if the `Accept` header requests it, else Prometheus's
        format."""
        if _wants_openmetrics(accept):
            return OPENMETRICS, _generate_openmetrics(self._registry)
        return TEXT, generate_latest(self._registry)

    def describe(self) -> Iterator[Family]:
        """Return nothing, so that the registry does not scrape to learn names."""
        return iter(())

    def collect(self) -> Iterator[Family]:
        """Read all sources for prometheus_client's registry."""
        for name, series in self.series().items():
            yield _family(METRICS[name], series)

    def series(self) -> Series:
        """Read all sources."""
        return series_of(chain.from_iterable(source() for source in self._sources))


def series_of(readings: Iterable[Reading]) -> Series:
    """Return the series of some readings, with their labels as they are rendered."""
    found: Series = {}
    for name, value, *labels in readings:
        found.setdefault(name, {})[tuple(map(_label, labels))] = value
    return found


def _wants_openmetrics(accept: str) -> bool:
    """Return True if an Accept header (RFC 9110 section 12.5.1) names OpenMetrics in a supported version.

    OpenMetrics is preferred whenever accepted. prometheus_client's own negotiation raises for an invalid version.
    """
    for choice in accept.lower().split(","):
        media_type, *parameters = (part.strip() for part in choice.split(";"))
        if media_type != "application/openmetrics-text":
            continue
        named = dict(parameter.partition("=")[::2] for parameter in parameters)
        if named.get("version", "1.0.0") in _OPENMETRICS_VERSIONS and not _NEVER.fullmatch(
            named.get("q", "1")
        ):
            return True
    return False


@lru_cache(maxsize=4_096)
def _label(value: str) -> str:
    return escape_text(value[:MAX_LABEL])[:MAX_LABEL]


def _family(metric: Metric, series: dict[tuple[str, ...], float | Histogram]) -> Family:
    assert all(len(labels) == len(metric.labels) for labels in series), metric.name
    if metric.kind == "histogram":
        histograms = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels, unit=metric.unit)
        for labels, histogram in series.items():
            assert isinstance(histogram, Histogram)
            histograms.add_metric(labels, _buckets(histogram), histogram.total)
        return histograms
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(metric.name, metric.help, labels=metric.labels, unit=metric.unit)
    for labels, number in series.items():
        assert not isinstance(number, Histogram)
        family.add_metric(labels, number)
    return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Return cumulative counts per bound, as in Prometheus."""
    bounds = (*(repr(float(bound)) for bound in histogram.bounds), "+Inf")  # floats in both text formats
    sums, below = [], 0
    for bound, count in zip(bounds, histogram.counts, strict=True):
        below += count
        sums.append((bound, float(below)))
    return sums
