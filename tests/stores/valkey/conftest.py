"""Fixtures of the Valkey store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.stores.valkey.helpers import ClusterOf
from tests.stores.valkey.server_process import PROGRAMS, running, wait_for


@pytest.fixture(scope="module", params=PROGRAMS)
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterOf]:
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("cluster")
        nodes = [
            stack.enter_context(
                running(
                    request.param,
                    folder / str(number),
                    *("--cluster-enabled", "yes", "--cluster-require-full-coverage", "no"),
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
