"""Use the client without what Windows lacks: `python -m tests.client.without_posix PORT CA FOLDER`.

`FOLDER` holds the file `key` with the key of ada. POSIX modules, calls, flags and UNIX sockets are removed before
zcproto is imported; `sys.platform` stays as it is. Doubles replace the calls of Windows: they keep the access of a
file in a set.
"""

from __future__ import annotations

import asyncio
import fcntl
import importlib.abc
import json
import os
import socket
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

MODULES: Final = {"fcntl", "grp", "pwd", "resource", "termios", "uvloop"}
CALLS: Final = (
    *("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "ST_RDONLY"),
    *(
        "chown",
        "fchmod",
        "fchown",
        "fork",
        "forkpty",
        "getegid",
        "geteuid",
        "getgid",
        "getuid",
        "lchown",
        "mkfifo",
    ),
    *(
        "register_at_fork",
        "sched_getaffinity",
        "sched_setaffinity",
        "set_blocking_",
        "statvfs",
        "sysconf",
        "uname",
    ),
)


class _Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> None:
        if name.partition(".")[0] in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def remove_posix() -> None:
    pair, unix = socket.socketpair, socket.AF_UNIX
    socket.socketpair = lambda *options: pair(unix)  # type: ignore[assignment]  # of the event loop
    for name in ("AF_UNIX", "SO_PEERCRED"):
        delattr(socket, name)
    for name in CALLS:
        if hasattr(os, name):
            delattr(os, name)
    if hasattr(os, "process_cpu_count"):  # from Python 3.13 on; that of POSIX calls sched_getaffinity
        os.process_cpu_count = os.cpu_count
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, _Missing())


def add_windows(private: set[Path]) -> None:
    """Add msvcrt, and files that are private if they are in the set."""

    def locking(descriptor: int, mode: int, size: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    sys.modules["msvcrt"] = types.ModuleType("msvcrt")
    vars(sys.modules["msvcrt"]).update(locking=locking, LK_NBLCK=2)
    from zcproto.common import windows

    def create_private(path: Path) -> int:
        private.add(Path(os.path.realpath(path.parent)))
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)

    windows.create_private = create_private
    windows.others_with = lambda path, rights: [] if path.parent in private else ["S-1-1-0"]


async def use(address: str, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    from zcproto import connect

    found: dict[str, Any] = {}
    session_file = folder / "session"
    client = connect(address, **options, session_file=session_file)

    @client.handler("double")
    async def double(number: int) -> int:
        return 2 * number

    async with client:
        found["unary"] = await client.call("greet", name="ada")
        found["stream"] = [item async for item in client.stream("count", to=3)]
        found["handler"] = await client.call("ask", number=21)
        first = client.session
        async with connect(address, **options, session_file=session_file) as other:
            assert other.session is not None
            assert first is not None
            found["lock"] = other.session.id != first.id
    async with connect(address, **options, session_file=session_file) as client:
        assert client.session is not None
        found["session file"] = client.session.id == first.id
    return found


def main(port: str, ca: str, folder: str) -> None:
    remove_posix()
    private = {Path(os.path.realpath(folder))}
    add_windows(private)
    import zcproto
    import zcproto.testing
    from zcproto import App, connect_blocking

    address = f"127.0.0.1:{port}"
    options = {"ca_file": ca, "user": "ada", "key_file": Path(folder).resolve() / "key"}
    found = asyncio.run(use(address, options, Path(folder).resolve()))
    with connect_blocking(address, **options) as client:
        found["blocking"] = client.call("greet", name="bob")
    private.clear()
    try:
        connect_blocking(address, **options)
    except zcproto.ConfigError as error:
        found["key file of others"] = str(error)

    async def in_memory() -> Any:
        app = App()
        app.method("add")(lambda: 3)
        async with zcproto.testing.connect_in_memory(app, user="ada") as client:
            return await client.call("add")

    found["testing"] = asyncio.run(in_memory())
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
