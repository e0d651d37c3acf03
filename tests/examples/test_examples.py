"""Each program of `examples` runs against its server and prints what a reader expects."""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.limits import TIMEOUT
from tests.server.helpers import KEY, ROOT, ServerThread

EXAMPLES = ROOT / "examples"
DATA = bytes(128 * 1024)

TYPED = {
    "approval": "y\nn\n",
    "chat": "hello\nis Bob there?\n",
    "gateway": "",
    "jobs": "",
    "upload": "",
}
"""What a person types into each program."""

PRINTED = {
    "approval": "delete notes.txt? [y/N]\nleft: 1\ndelete draft.txt? [y/N]\n"
    "draft.txt is kept; its deletion was not approved\n",
    "chat": "welcome ada\nada: hello\nada: is Bob there?\nada: (leaves)\n",
    "gateway": "ada asked: what is TLS?\ntraining is for trainers\n",
    "jobs": "first: 2\nleft the job; it goes on\nnext: 4\nnext: 1\nnext: 3\ntotal: 10\n",
    "upload": f"25%\n50%\n75%\n100%\nsha256 {hashlib.sha256(DATA).hexdigest()}\n",
}


def test_each_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == TYPED.keys() == PRINTED.keys()
    page = (EXAMPLES / "README.md").read_text()
    assert [name for name in PRINTED if f"[{name}.py]({name}.py)" not in page] == []


@pytest.mark.parametrize("name", PRINTED)
def test_example_prints_what_it_shows(
    name: str, tmp_path: Path, certs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    app = importlib.import_module(name).app
    (tmp_path / "ada.key").write_text(KEY)
    (tmp_path / "ada.key").chmod(0o600)
    (tmp_path / "data").write_bytes(DATA)
    arguments = ["data"] if name == "upload" else []
    authenticators = app.authenticators if name == "gateway" else None  # of the others: KEY
    with ServerThread(tmp_path / "home", certs, app, authenticators=authenticators) as server:
        done = subprocess.run(
            [sys.executable, EXAMPLES / f"{name}.py", f"localhost:{server.port}", *arguments],
            input=TYPED[name],
            cwd=tmp_path,
            env={**os.environ, "ZCPROTO_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(PRINTED[name]), done.stdout
