"""Fixtures of the Valkey store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.limits import TIMEOUT
from tests.stores.valkey.helpers import CLUSTER, KINDS, ClusterOf
from tests.stores.valkey.server_process import (
    VALKEY_FIRST,
    ServerProcess,
    is_installed,
    needs,
    running,
    wait_for,
)
from zcproto.stores.valkey import servers, store
from zcproto.stores.valkey.store import ValkeyStore

ServerOf = Callable[[str], ServerProcess]


@pytest.fixture(autouse=True)
def no_time_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no time limit of a store end before that of the test, unless the test sets another."""
    monkeypatch.setitem(ValkeyStore.__init__.__kwdefaults__, "timeout", TIMEOUT)
    monkeypatch.setattr(servers, "OPEN_TIMEOUT_S", TIMEOUT)
    monkeypatch.setattr(store, "LIFE_MS", int(TIMEOUT * 1000))


@pytest.fixture(scope="package")
def server_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerOf]:
    """Return a function that returns the server of one of KINDS, emptied. All start at once, to save time."""
    with ExitStack() as stack:
        started = {}
        for kind in KINDS:
            program, _, cluster = kind.partition(", ")
            if is_installed(program):
                plain = ("--rdbcompression", "no")  # so that DUMP shows the content
                options = (*plain, CLUSTER, "yes") if cluster else plain
                server = stack.enter_context(running(program, tmp_path_factory.mktemp("server"), *options))
                if cluster:
                    server.command("CLUSTER", "ADDSLOTSRANGE", 0, 16_383)
                started[kind] = server

        def empty_server(kind: str) -> ServerProcess:
            needs(kind.partition(", ")[0])
            if CLUSTER in started[kind].options:
                wait_for(lambda: b"cluster_state:ok" in started[kind].command("CLUSTER", "INFO"))
            assert started[kind].command("FLUSHALL") == b"OK"
            return started[kind]

        yield empty_server


@pytest.fixture(params=KINDS[:3])
def server(request: pytest.FixtureRequest, server_of: ServerOf) -> ServerProcess:
    """Return a server without data."""
    return server_of(request.param)


@pytest.fixture(scope="module", params=VALKEY_FIRST)
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterOf]:
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("cluster")
        nodes = [
            stack.enter_context(
                running(
                    request.param,
                    folder / str(number),
                    *("--cluster-enabled", "yes", "--cluster-require-full-coverage", "no"),
                    *("--cluster-node-timeout", str(int(TIMEOUT * 1000))),
                )
            )
            for number in range(4)
        ]
        for number, node in enumerate(nodes):
            node.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < 3:
                first, last = 5462 * number, min(5462 * number + 5461, 16_383)
                node.command("CLUSTER", "ADDSLOTSRANGE", first, last)
        for node in nodes[1:]:
            nodes[0].command("CLUSTER", "MEET", "127.0.0.1", node.port)
        for node in nodes:
            wait_for(
                lambda node=node: (
                    len(node.command("CLUSTER", "SLOTS")) == 3
                    and len(node.command("CLUSTER", "NODES").splitlines()) == 4
                    and b"cluster_state:ok" in node.command("CLUSTER", "INFO")
                )
            )
        yield ClusterOf(nodes)
