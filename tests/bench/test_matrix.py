"""The fault matrix: which cells there are, its report, and a few of its cells with real servers."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from bench.scenarios import matrix as module
from bench.scenarios.matrix import CELLS, CellResult, report, rounds, run_matrix
from bench.scenarios.matrix_cells import OPERATIONS
from bench.scenarios.matrix_faults import FAULTS
from bench.scenarios.matrix_site import CLUSTER, DEPLOYMENTS, MEMORY, SENTINEL, SQLITE, STORES, VALKEY
from bench.valkey import VALKEY as PROGRAM
from tests.stores.valkey.server_process import needs


@pytest.fixture(autouse=True)
def usual_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let outages exceed the timeout of the store."""
    monkeypatch.delenv("ZCPROTO_STORE__TIMEOUT")


GOOD = CellResult(VALKEY, "store killed", "before", "refresh", ())
BAD = CellResult(VALKEY, "store killed", "after", "open", ("it was lost",))


def cells(*only: str) -> list[str]:
    return [made.name(operation) for made in rounds(only) for operation in made.operations]


def test_there_are_at_least_as_many_cells_as_promised_and_none_twice() -> None:
    names = cells()
    assert len(names) >= CELLS
    assert Counter(names).most_common(1)[0][1] == 1


def test_every_store_meets_every_fault_that_it_can_have_with_every_operation() -> None:
    stores = {kind: {name.split(" / ")[1] for name in cells(f"{kind} /")} for kind in STORES}
    of_server = {"clock +1 h", "clock -1 h", "server killed", "server paused"}
    of_store = {"store stopped", "store slow", "store full", "store read-only"}
    of_network = {"cut off, to the store", "cut off, from the store"}
    failovers = {"planned failover", "unplanned failover", "failover that loses writes"}
    assert stores == {
        MEMORY: of_server,
        SQLITE: of_server | of_store,
        VALKEY: of_server | of_store | of_network | {"store killed"},
        SENTINEL: {fault.name for fault in FAULTS},
        CLUSTER: {fault.name for fault in FAULTS},
    }
    assert of_server | of_store | of_network | failovers | {"store killed"} == stores[CLUSTER]
    each = Counter(name.rpartition(" / ")[2] for name in cells())
    assert set(each.values()) == {len(cells()) // len(OPERATIONS)}


def test_cells_are_selected_by_parts_of_their_names() -> None:
    assert cells("Valkey /, killed, in flight, refresh", "memory, clock +1 h, after, open") == [
        "memory / clock +1 h / after / open",
        "Valkey / store killed / in flight / refresh",
        "Valkey / server killed / in flight / refresh",
    ]
    assert cells("nothing") == []


def test_report_counts_cells_by_store_and_fault() -> None:
    made = report([GOOD], is_whole=False)
    assert made.reasons() == []
    assert made.row("store killed", VALKEY).value == 1
    assert made.as_json()["cells"][0]["operation"] == "refresh"


def test_broken_cell_fails_and_is_named() -> None:
    made = report([GOOD, BAD], is_whole=False)
    assert "Valkey / store killed / after / open: it was lost" in made.reasons()
    assert not made.row("store killed", VALKEY).holds
    assert not made.row("held", "in all").holds


def test_whole_run_needs_its_number_of_cells() -> None:
    assert report([GOOD] * CELLS, is_whole=True).reasons() == []
    assert report([GOOD] * (CELLS - 1), is_whole=True).reasons()


def broken(found: list[CellResult]) -> list[str]:
    return [f"{cell.name}: {sentence}" for cell in found for sentence in cell.broken]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "only",
    [
        "SQLite, store full, before, revoke one",
        f"{VALKEY} /, store killed, unacknowledged, refresh",
        pytest.param(f"{SENTINEL}, unplanned failover, before, re", marks=pytest.mark.slow),
        pytest.param(f"{CLUSTER}, failover that loses writes, after, re", marks=pytest.mark.slow),
    ],
)
def test_cells_hold_with_real_servers(only: str, tmp_path: Path) -> None:
    if any(kind in only for kind in DEPLOYMENTS):
        needs(PROGRAM)
    found = asyncio.run(run_matrix([only], 1, 2, tmp_path))
    assert len(found) == len(cells(only))
    assert broken(found) == []


@pytest.mark.timeout(240)
def test_server_that_loses_its_revocations_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restart = module.Site.restart

    async def forget(site: module.Site) -> None:
        for node in site.nodes:
            await node.kill()
        saved = tmp_path / "saved"
        for file in saved.iterdir():
            (site.here.home / file.name).write_bytes(file.read_bytes())
        await restart(site)

    act = module.Running._act

    async def save_and_act(running: module.Running) -> None:
        saved = tmp_path / "saved"
        saved.mkdir()
        for file in running._site.here.home.glob("sessions.db*"):
            (saved / file.name).write_bytes(file.read_bytes())
        await act(running)

    monkeypatch.setattr(module.Site, "restart", forget)
    monkeypatch.setattr(module.Running, "_act", save_and_act)
    found = asyncio.run(run_matrix(["SQLite, clock +1 h, after, revoke one"], 1, 1, tmp_path))
    assert any("was accepted here" in sentence for sentence in broken(found)), broken(found)
