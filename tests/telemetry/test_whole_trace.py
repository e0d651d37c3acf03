"""One trace through processes: a client, a server, and a server that it calls, each with its own SDK."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.limits import TIMEOUT
from tests.server.helpers import PATIENT_CLIENT, ROOT, eventually
from tests.server.process import ServerProcess, home_with
from tests.telemetry.helpers import SAMPLED, Collector
from zcproto.auth import UserFile

CLIENT = ROOT / "clients" / "typescript" / "dist" / "test" / "support" / "traced_call.js"

CLIENT_KIND, SERVER_KIND = 3, 2  # as on the wire

CONFIG = """
[certificates]
key_types = ["ecdsa-p256"]
[telemetry]
traces = true
service_name = "{name}"
endpoint = "{endpoint}"
"""

LAST = """
from zcproto import App

app = App()


@app.method
async def price() -> int:
    return 42
"""

FIRST = """
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import zcproto
from zcproto import App, Client, Context
from zcproto.telemetry import trace_calls


@asynccontextmanager
async def lifespan(app: App) -> AsyncIterator[Client]:
    options = {{"user": "gateway", "key": {key!r}, "ca_file": {ca!r}, **{patient!r}}}
    async with zcproto.connect({address!r}, middleware=[trace_calls()], **options) as client:
        yield client


app = App(lifespan=lifespan)


@app.method
async def order(context: Context[Client]) -> int:
    return await context.state.call("price") + 1
"""


class Shop:
    """Two servers, of which the first calls the second."""

    def __init__(self, folder: Path, certs: Path, collector: Collector, stack: ExitStack) -> None:
        self.collector = collector
        homes = {}
        for name in ("first", "last"):
            (folder / name).mkdir()
            config = CONFIG.format(name=name, endpoint=collector.address)
            homes[name] = home_with(folder / name, certs, config)
        gateway = UserFile(homes["last"] / "users.toml").add("gateway")
        self.key = UserFile(homes["first"] / "users.toml").add("ada")
        self.ca = homes["first"] / "certs" / "ca.crt"
        (homes["last"] / "last.py").write_text(LAST)
        last = stack.enter_context(ServerProcess(homes["last"], certs, app="last:app"))
        ca = str(homes["last"] / "certs" / "ca.crt")
        source = FIRST.format(
            key=gateway.reveal(), ca=ca, address=f"localhost:{last.port}", patient=PATIENT_CLIENT
        )
        (homes["first"] / "first.py").write_text(source)
        self.first = stack.enter_context(ServerProcess(homes["first"], certs, app="first:app"))
        self._servers = [self.first, last]

    def spans(self) -> dict[str, list[Any]]:
        """Return the three spans of the servers, by their names, and end the servers."""
        eventually(lambda: len(self.collector.spans()) >= 3)
        for server in self._servers:
            server.signal(signal.SIGTERM)
            assert server.wait() == 0, server.log
        found: dict[str, list[Any]] = {}
        for message in self.collector.messages("/v1/traces"):
            for resource in message.resource_spans:
                (name,) = [
                    each.value.string_value
                    for each in resource.resource.attributes
                    if each.key == "service.name"
                ]
                found.setdefault(name, []).extend(
                    span for scope in resource.scope_spans for span in scope.spans
                )
        return found


@pytest.fixture
def shop(tmp_path: Path, certs: Path) -> Iterator[Shop]:
    with ExitStack() as stack:
        collector = stack.enter_context(Collector().run())
        yield Shop(tmp_path, certs, collector, stack)


def check(shop: Shop, trace_id: str, span_id: str) -> None:
    """Check that three spans continue a trace from this span, each the parent of the next."""
    spans = shop.spans()
    call, method = sorted(spans["first"], key=lambda span: span.name == "order")
    (last,) = spans["last"]
    assert [(span.name, span.kind) for span in (method, call, last)] == [
        ("order", SERVER_KIND),
        ("price", CLIENT_KIND),
        ("price", SERVER_KIND),
    ]
    parent = bytes.fromhex(span_id)
    for span in (method, call, last):
        assert span.trace_id.hex() == trace_id
        assert span.parent_span_id == parent
        parent = span.span_id


def test_call_through_two_servers_continues_the_callers_trace(shop: Shop) -> None:
    with shop.first.client("ada", shop.key.reveal()) as client:
        assert client.call("order", meta={"traceparent": SAMPLED}) == 43
    check(shop, SAMPLED[3:35], SAMPLED[36:52])


@pytest.mark.skipif(
    shutil.which("node") is None or not CLIENT.exists(),
    reason="the client for Node is not built; run npm ci in clients/typescript",
)
def test_call_from_typescript_through_two_servers_is_one_trace_of_four_spans(shop: Shop) -> None:
    address = f"localhost:{shop.first.port}"
    command = ["node", str(CLIENT), address, "ada", shop.key.reveal(), str(shop.ca), "order"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert ran.returncode == 0, ran.stderr
    span = json.loads(ran.stdout)
    assert span["result"] == 43
    check(shop, span["traceId"], span["spanId"])
