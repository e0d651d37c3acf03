"""Servers that send to a collector: the configuration, what arrives, and a collector that is down."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from opentelemetry import trace
from opentelemetry.sdk._logs import LoggerProvider, ReadWriteLogRecord

from tests.limits import TIMEOUT
from tests.server.helpers import KEY, PATIENT_CLIENT, configuration, identify
from tests.server.process import ServerProcess, home_with
from tests.telemetry.helpers import Collector, patient_config
from zcproto.admin.metrics import server_metrics
from zcproto.app.app import App
from zcproto.app.authentication import CallableAuthenticator
from zcproto.auth import UserFile
from zcproto.client.blocking import connect_blocking
from zcproto.client.client import Client, connect
from zcproto.common.clock import system_clock, system_entropy
from zcproto.config import LogConfig, TelemetryConfig
from zcproto.errors import ConfigError, InternalError
from zcproto.observe.log import configure_logging, flush_log
from zcproto.observe.metrics import METRICS
from zcproto.runtime.build import build_telemetry
from zcproto.runtime.server import Server
from zcproto.telemetry import export, trace_calls
from zcproto.telemetry.export import (
    BatchedLogs,
    Batches,
    LogRecords,
    Telemetry,
    check_environment,
    headers_of,
    name_and_unit,
)

HEADERS = "Authorization: Bearer c2VjcmV0LW9mLXRoZS1jb2xsZWN0b3I\n\nX-Scope: tests\n"


SECRET = "hunter" * 4


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector().run() as collector:
        yield collector


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the global provider, the loggers and the variables of the SDK as they are."""
    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(export.trace, "set_tracer_provider", lambda provider: None)
    monkeypatch.setattr(logging.getLogger("opentelemetry"), "handlers", [logging.NullHandler()])


def make_app() -> App[Any]:
    app: App[Any] = App()

    @app.method
    async def hello(name: str = "") -> str:
        await asyncio.sleep(0)
        return f"hello {name}"

    @app.method
    def fail() -> None:
        raise ValueError(f"password={SECRET}")

    return app


def server_of(home: Path, certs: Path, collector: Collector, **settings: Any) -> Server:
    """Return a server that sends what it has when it ends."""
    home.mkdir(mode=0o700, exist_ok=True)
    shutil.copytree(certs, home / "certs")
    usual = {"telemetry__traces": True, "telemetry__endpoint": collector.address}
    return Server(
        make_app(),
        configuration(home, **{**usual, **settings}),
        home=home,
        authenticators=[CallableAuthenticator("api_key", identify)],
        control=False,
    )


def client_of(server: Server, **options: Any) -> Client:
    """Return a client of a server that has started."""
    credentials: dict[str, Any] = {"user": "ada", "key": KEY, "ca_file": server.ca_file}
    return connect(f"127.0.0.1:{server.port}", **{**PATIENT_CLIENT, **credentials, **options})


async def test_spans_arrive_at_the_collector_when_the_server_ends(
    tmp_path: Path, certs: Path, collector: Collector
) -> None:
    headers = tmp_path / "headers"
    headers.write_text(HEADERS)
    headers.chmod(0o600)
    settings = {
        "telemetry__headers_file": str(headers),
        "telemetry__service_name": "greeter",
    }
    server = server_of(tmp_path / "home", certs, collector, **settings)
    async with server, client_of(server, middleware=[trace_calls()]) as client:
        assert await client.call("hello", name="world") == "hello world"
        assert not collector.requests
    (path, sent_headers, message) = collector.requests[0]
    assert path == "/v1/traces"
    assert sent_headers["authorization"].startswith("Bearer ")
    assert sent_headers["x-scope"] == "tests"
    resource = {each.key: each.value.string_value for each in message.resource_spans[0].resource.attributes}
    assert resource["service.name"] == "greeter"
    assert len(resource["service.instance.id"]) == 32
    (span,) = collector.spans()
    assert span.name == "hello"
    found = {each.key: each.value.string_value for each in span.attributes}
    assert found["rpc.status_code"] == "OK"
    assert found["client.address"] == "127.0.0.1"


async def test_server_without_a_ratio_of_traces_sends_none(
    tmp_path: Path, certs: Path, collector: Collector
) -> None:
    server = server_of(tmp_path / "home", certs, collector, telemetry__sample_ratio=0.0)
    async with server, client_of(server) as client:
        for _ in range(3):
            await client.call("hello")
    assert not collector.requests


async def test_collector_that_is_down_costs_no_call_and_the_end_has_a_limit(
    tmp_path: Path, certs: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector.gate.clear()  # it accepts, and never answers
    for name, value in {"QUEUE": 64, "DELAY_S": 0.1, "FLUSH_S": 0.0}.items():
        monkeypatch.setattr(export, name, value)
    server = server_of(tmp_path / "home", certs, collector)
    async with server, client_of(server) as client:
        await client.call("hello")
        await asyncio.to_thread(collector.wait_for, "/v1/traces")
        for _ in range(100):
            await client.call("hello")
    assert len(collector.requests) == 1


async def test_refused_batch_is_counted(collector: Collector) -> None:
    collector.status = 400
    telemetry = Telemetry(patient_config(collector.address), system_clock, system_entropy)
    assert telemetry.tracer_provider is not None
    telemetry.tracer_provider.get_tracer("test").start_span("one").end()
    await telemetry.stop()
    assert {(signal, result): count for signal, result, count in telemetry.counts()} == {
        ("traces", "sent"): 0,
        ("traces", "failed"): 1,
        ("traces", "dropped"): 0,
    }


async def test_metrics_are_sent_at_the_end_and_with_what_the_page_has(
    tmp_path: Path, certs: Path, collector: Collector
) -> None:
    settings = {"telemetry__traces": False, "telemetry__metrics": True}
    server = server_of(tmp_path / "home", certs, collector, **settings)
    async with server:
        async with client_of(server) as client:
            for _ in range(3):
                await client.call("hello")
        page = server_metrics(server.parts).series()
    metrics = collector.metrics()
    points = metrics["zcproto_method_calls"].sum.data_points
    assert {point.attributes[0].value.string_value: point.as_int for point in points}["hello"] == 3
    assert metrics["zcproto_method_calls"].sum.is_monotonic
    known = {name_and_unit(METRICS[name])[0] for name in page}
    assert set(metrics) == known
    waits = metrics["zcproto_method_wait"].histogram.data_points
    assert sum(point.count for point in waits) >= 3


async def test_metrics_are_sent_at_their_interval(tmp_path: Path, certs: Path, collector: Collector) -> None:
    settings = {"telemetry__traces": False, "telemetry__metrics": True, "telemetry__metrics_interval": "1s"}
    async with server_of(tmp_path / "home", certs, collector, **settings):
        await asyncio.to_thread(collector.wait_for, "/v1/metrics", 1)


async def test_page_counts_what_was_sent_and_dropped(
    tmp_path: Path, certs: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "DELAY_S", 0.1)
    server = server_of(tmp_path / "home", certs, collector)
    async with server:
        async with client_of(server) as client:
            await client.call("hello")
            await asyncio.to_thread(collector.wait_for, "/v1/traces")
        items = server_metrics(server.parts).series()["zcproto_telemetry_items_total"]
    assert set(items) == {("traces", result) for result in ("sent", "failed", "dropped")}


async def test_lines_of_the_log_are_sent_with_their_trace(
    tmp_path: Path, certs: Path, collector: Collector, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"telemetry__logs": True, "log__format": "json", "log__level": "info"}
    server = server_of(tmp_path / "home", certs, collector, **settings)
    configure_logging(LogConfig(format="json", level="info"))
    async with server, client_of(server) as client:
        with pytest.raises(InternalError):
            await client.call("fail")
    flush_log()
    (span,) = [span for span in collector.spans() if span.name == "fail"]
    (record,) = [record for record in collector.records() if record.event_name == "request.failed"]
    assert (record.trace_id, record.span_id) == (span.trace_id, span.span_id)
    assert (record.severity_text, record.body.string_value) == ("error", "request.failed")
    found = {each.key: each.value for each in record.attributes}
    assert found["what"].string_value == "fail"
    assert SECRET not in str(record)
    assert "(hidden)" in str(record)
    (line,) = [json.loads(line) for line in capsys.readouterr().err.splitlines() if "request.failed" in line]
    assert line["trace_id"] == span.trace_id.hex()
    assert set(line) - {"timestamp", "level", "event", "trace_id", "span_id"} == set(found)
    opened = [record for record in collector.records() if record.event_name == "session.opened"]
    assert len(opened) == 1
    assert opened[0].trace_id == b""


def test_line_without_a_trace_is_a_record_without_one() -> None:
    """Whatever span is current."""
    records: list[ReadWriteLogRecord] = []
    provider = LoggerProvider(shutdown_on_exit=False)
    processor = BatchedLogs(cast("Batches[ReadWriteLogRecord]", SimpleNamespace(put=records.append)))
    provider.add_log_record_processor(processor)
    context = trace.SpanContext(0x1234, 0x5678, is_remote=False, trace_flags=trace.TraceFlags(1))
    with trace.use_span(trace.NonRecordingSpan(context)):
        LogRecords(provider)("info", 0, {"event": "session.opened"})
        LogRecords(provider)("info", 0, {"event": "session.opened", "trace_id": "ab", "span_id": "c"})
    found = [each.log_record for each in records]
    assert [(each.trace_id, each.span_id) for each in found] == [(0, 0), (0xAB, 0xC)]
    assert [int(each.trace_flags or 0) for each in found] == [0, 1]


def test_each_worker_sends_what_it_has_when_it_ends(
    tmp_path: Path, certs: Path, collector: Collector
) -> None:
    """The SDK starts after the fork, and the drain of each process waits for it."""
    config = f"""
        [certificates]
        key_types = ["ecdsa-p256"]
        [telemetry]
        traces = true
        metrics = true
        endpoint = "{collector.address}"
        """
    home = home_with(tmp_path, certs, config)
    options: dict[str, Any] = {
        "user": "ada",
        "key": UserFile(home / "users.toml").add("ada"),
        "ca_file": home / "certs" / "ca.crt",
        "home": tmp_path / "client",
        **PATIENT_CLIENT,
    }
    with ServerProcess(home, certs, "--workers", "2") as server:
        for number in range(4):
            # This client tries again while a worker waits for the coordinator.
            with connect_blocking(f"localhost:{server.port}", **options) as client:
                client.call("echo", number=number)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    assert len(collector.spans()) == 4
    assert "workers.threads" not in server.log
    processes = {
        next(
            each.value.string_value
            for each in resource.resource.attributes
            if each.key == "service.instance.id"
        )
        for message in collector.messages("/v1/metrics")
        for resource in message.resource_metrics
    }
    assert len(processes) == 3  # with the coordinator


# --- the configuration -----------------------------------------------------------------------------------------


def built(**settings: Any) -> Telemetry | None:
    return build_telemetry(TelemetryConfig(**settings), system_clock, system_entropy)


def test_nothing_is_built_unless_something_is_sent() -> None:
    assert built() is None


def test_variable_of_the_sdk_switches_everything_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "True")
    assert built(traces=True) is None


def test_missing_extra_is_reported_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*sys.modules]:
        if name.startswith(("opentelemetry", "zcproto.telemetry.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match=r'in a clone of zcproto: pip install "\.\[otel\]"'):
        built(traces=True)
    import zcproto.telemetry

    with pytest.raises(ModuleNotFoundError, match=r"\.\[otel\]"):
        zcproto.telemetry.trace_calls  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        zcproto.telemetry.nothing  # noqa: B018


def test_package_works_without_the_extra() -> None:
    program = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "import zcproto, zcproto.runtime.server, zcproto.client, zcproto.cli, zcproto.telemetry\n"
        "zcproto.Server, zcproto.connect"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=TIMEOUT)


async def test_keys_that_are_not_set_leave_the_choice_to_the_variables(
    monkeypatch: pytest.MonkeyPatch, collector: Collector
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.address)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-from=variable")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "named")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_on")
    telemetry = built(traces=True)
    assert telemetry is not None
    assert telemetry.ratio is None
    assert telemetry.tracer_provider is not None
    assert telemetry.tracer_provider.resource.attributes["service.name"] == "named"
    telemetry.tracer_provider.get_tracer("test").start_span("one").end()
    await telemetry.stop()
    assert collector.requests[0][1]["x-from"] == "variable"
    chosen = built(traces=True, sample_ratio=0.25, service_name="", endpoint=collector.address)
    assert chosen is not None
    assert chosen.ratio == 0.25
    await chosen.stop()


def test_other_protocol_in_a_variable_is_refused() -> None:
    check_environment({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_SERVICE_NAME": "grpc"})
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_TRACES_PROTOCOL: the server sends by"):
        check_environment({"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"})


@pytest.mark.parametrize(
    ("text", "mode", "fault"),
    [
        ("no colon", 0o600, "line 1 must be"),
        ("A: b\nC: \x00", 0o600, "line 2 must be"),
        ("\n".join(f"N{number}: x" for number in range(33)), 0o600, "line 33 must be"),
        ("A: b", 0o644, "chmod 600"),
        ("A: " + "b" * 20_000, 0o600, "is larger than"),
    ],
)
def test_unusable_file_of_headers_is_refused(tmp_path: Path, text: str, mode: int, fault: str) -> None:
    path = tmp_path / "headers"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=fault) as raised:
        headers_of(path)
    assert "telemetry.headers_file" in str(raised.value)


def test_missing_file_of_headers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"telemetry\.headers_file: .*cannot be read"):
        headers_of(tmp_path / "missing")


def test_messages_of_the_sdk_are_masked_in_the_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("opentelemetry")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", False)
    configure_logging(LogConfig(format="json"))
    export._show_messages_of_sdk()
    logger.getChild("exporter").error("cannot send with token: %s", "secret" * 8)
    flush_log()
    line = capsys.readouterr().err
    assert "telemetry.sdk" in line
    assert "secretsecret" not in line
