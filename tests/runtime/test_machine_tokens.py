"""Machine tokens at a server of several processes."""

from __future__ import annotations

import contextlib
import http.client
from pathlib import Path

import pytest

from tests.limits import TIMEOUT
from tests.server.helpers import client_context, eventually
from tests.server.process import ServerProcess
from zcproto.cli import main

CONFIG = """
[certificates]
key_types = ["ecdsa-p256"]

[http]
metrics = "token"
"""
CONNECTIONS = 12


def test_token_is_valid_and_revoked_at_once_in_every_worker(
    home: Path, certs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = client_context(home / "certs" / "ca.crt", ())
    with ServerProcess(home, certs, "--workers", "2") as server, contextlib.ExitStack() as stack:
        capsys.readouterr()
        assert main(["token", "create", "prometheus", "--scope", "metrics", "--home", str(home)]) == 0
        headers = {"Authorization": f"Bearer {capsys.readouterr().out.strip()}"}
        connections = [
            stack.enter_context(
                contextlib.closing(
                    http.client.HTTPSConnection("localhost", server.port, timeout=TIMEOUT, context=context)
                )
            )
            for _ in range(CONNECTIONS)
        ]

        def statuses() -> set[int]:
            found = set()
            for connection in connections:
                connection.request("GET", "/metrics", headers=headers)
                answer = connection.getresponse()
                answer.read()
                found.add(answer.status)
            return found

        assert statuses() == {200}
        eventually(lambda: server.log.count("tokens.changed") == 1)
        assert main(["token", "revoke", "prometheus", "--home", str(home)]) == 0
        assert statuses() <= {401, 429}
        eventually(lambda: server.log.count("tokens.changed") == 2)
        changes = server.events("tokens.changed")
        assert [(line["worker"], line.get("added"), line.get("removed")) for line in changes] == [
            ("coordinator", ["prometheus"], None),
            ("coordinator", None, ["prometheus"]),
        ]
        assert headers["Authorization"].split()[1] not in server.log
