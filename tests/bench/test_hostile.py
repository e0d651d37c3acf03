"""Clients of hostile servers: what each server sends, and the bars."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import bench.scenarios.hostile as module
from bench.__main__ import main
from bench.scenarios.hostile import KINDS, HostileConnection, Outcome, Usage, report
from zcproto.common.clock import system_clock
from zcproto.connection.client import ClientConnection
from zcproto.connection.events import (
    ClientEvent,
    EventReceived,
    GoAwayReceived,
    ResponseReceived,
    Welcomed,
)


class FakeTransport(asyncio.Transport):
    """Keeps what is written, and pauses the server after one chunk of its flood."""

    def __init__(self, connection: HostileConnection) -> None:
        super().__init__()
        self.connection = connection
        self.written = bytearray()
        self.is_paused = self.is_closed = False

    def write(self, data: Any) -> None:
        self.written += data
        if len(data) > 10_000:
            self.connection.pause_writing()

    def pause_reading(self) -> None:
        self.is_paused = True

    def close(self) -> None:
        self.is_closed = True


async def attacked(kind: str) -> tuple[list[ClientEvent], Counter[str], FakeTransport]:
    """Open a session on a hostile server; return the events of the client, and what the server counts."""
    counts = Counter[str]()
    connection = HostileConnection(kind, counts)
    transport = FakeTransport(connection)
    connection.connection_made(transport)
    client = ClientConnection()
    events = list(client.receive_data(bytes(transport.written), system_clock.wall(), 0.0))
    transport.written.clear()
    client.request("session.open", {}, wall=system_clock.wall())
    connection.data_received(client.data_to_send())
    await asyncio.sleep(0)
    connection.resume_writing()
    connection.connection_lost(None)
    events += client.receive_data(bytes(transport.written), system_clock.wall(), 0.0)
    counts["owed"] = client.queued_bytes
    return events, counts, transport


@pytest.mark.parametrize("kind", KINDS)
async def test_server_opens_a_session_and_attacks(kind: str) -> None:
    events, counts, transport = await attacked(kind)
    welcomed, opened, *rest = events
    assert isinstance(welcomed, Welcomed)
    assert isinstance(opened, ResponseReceived)
    assert (opened.value["expires_at"] < system_clock.wall()) == (kind == "sessions")
    assert counts["requests"] == counts["connections"] == 1
    names = {event.name for event in rest if isinstance(event, EventReceived)}
    expected = {
        "events": {"small"},
        "large events": {"large"},
        "notices": {"session.expiring", "session.revoked"},
    }
    assert names == expected.get(kind, set())
    assert (counts["frames"] > 0) == (kind not in ("sessions", "reconnects"))
    assert transport.is_paused == (kind == "pings")
    assert (counts["owed"] > 0) == (kind == "pings")
    assert any(isinstance(event, GoAwayReceived) for event in rest) == (kind == "reconnects")
    assert transport.is_closed == (kind == "reconnects")


@pytest.mark.parametrize(
    ("growth_mib", "cpu_s", "ended", "failing"),
    [
        (7.9, 1.9, False, set()),
        (8.1, 1.9, False, {"growth_mib"}),
        (0.0, 2.1, False, {"cpu_percent"}),
        (0.0, 0.0, True, {"ended"}),
    ],
)
def test_growth_and_processor_time_have_bars(
    growth_mib: float, cpu_s: float, ended: bool, failing: set[str]
) -> None:
    before, after = Usage(100.0, 40.0, 1.0), Usage(110.0, 40.0 + growth_mib, 1.0 + cpu_s)
    found = report({"pings, python": Outcome(before, after, ended=ended)})
    assert {row.key for row in found.columns["pings, python"] if not row.holds} == failing


def test_client_for_node_must_be_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "PACKAGE", tmp_path / "index.js")
    assert main(["scenario", "hostile"]) == 2
    assert "npm ci" in capsys.readouterr().err
