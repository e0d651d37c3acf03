"""The client runs without what Windows lacks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from tests.server.helpers import KEY, ROOT, ServerThread
from zcproto import App, Context


def test_client_runs_without_posix(tmp_path: Path, certs: Path) -> None:
    app = App()

    @app.method("greet")
    def greet(name: str) -> str:
        return f"hello {name}"

    @app.method("count")
    async def count(to: int) -> AsyncIterator[int]:
        for number in range(to):
            yield number

    @app.method("ask")
    async def ask(context: Context, number: int) -> int:
        answer: int = await context.client.call("double", number=number)
        return answer

    folder = tmp_path / "client"
    folder.mkdir(0o700)
    (folder / "key").write_text(KEY)
    with ServerThread(tmp_path / "home", certs, app) as server:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.client.without_posix",
                str(server.port),
                str(server.ca_file),
                str(folder),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "others can read this key; run: icacls" in found.pop("key file of others")
    assert found == {
        "unary": "hello ada",
        "stream": [0, 1, 2],
        "handler": 42,
        "lock": True,
        "session file": True,
        "blocking": "hello bob",
        "testing": 3,
    }
