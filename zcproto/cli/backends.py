"""The three places where a command of an operator can run.

    RunningServer   the server of the home folder, by its control socket
    HomeFiles       the files and the store of the home folder, while no server runs
    RemoteServer    a server elsewhere, by the protocol methods of operators: sessions only

What this file decides: what each operation is in each place. Parameters are checked where they are used:
zcproto/admin/operations.py, zcproto/server/protocol_methods.py, zcproto/auth/users.py.

Rules: a running server that cannot be asked is an error, and never bypassed: a change of its files behind its back
would be half of the operation.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import urlencode

import click

from zcproto.auth import DeviceFile, UserFile
from zcproto.cli.connect import key_option, make_client, read_key, run, trust_options
from zcproto.cli.control import Control, find_control
from zcproto.cli.session_store import CONFIGURED, end_sessions, has_no_sessions, opened_store, with_store
from zcproto.common.clock import system_clock
from zcproto.common.home import Home
from zcproto.errors import Code
from zcproto.server.protocol_methods import LISTED, describe
from zcproto.sessions.session import DEVICE_KEY
from zcproto.sessions.token import id_from_text, token_text
from zcproto.stores.base import MAX_LISTED, SessionStore

if TYPE_CHECKING:
    from zcproto.config import Config

TIMEOUT_S = 30.0

T = TypeVar("T")


class SessionBackend(Protocol):
    """Where sessions can be listed and ended. `max_listed` is the length of a list that may be incomplete."""

    @property
    def max_listed(self) -> int: ...
    def list_sessions(self, user: str | None) -> list[dict[str, Any]]: ...
    def revoke_sessions(self, ids: Sequence[str], user: str | None) -> int:
        """End the sessions with these ids, else those of the user, else all. Return how many ended."""


class Backend(SessionBackend, Protocol):
    """Where users and devices can be changed.

    Methods that return `int | None` return the sessions that ended, or None if a running server ends them that
    cannot be asked how many.
    """

    def add_user(self, name: str, operator: bool, key_digest: bytes | None) -> None: ...
    def disable_user(self, name: str) -> int | None: ...
    def enable_user(self, name: str) -> None: ...
    def remove_user(self, name: str) -> int | None: ...
    def replace_key(self, name: str, key_digest: bytes) -> int | None: ...
    def remove_device(self, name: str) -> tuple[str, int | None]:
        """Return the user of the device, and the sessions that ended."""


def local_backend(home: Home, read_config: Callable[[], Config]) -> Backend:
    """Return the running server of a home folder, or its files. Raises ControlError.

    `read_config` is called only where the files are used, before anything is changed.
    """
    control = find_control(home)
    return HomeFiles(home, read_config) if control is None else RunningServer(control)


@dataclass(frozen=True)
class RunningServer:
    """A running server. See zcproto/admin/operations.py."""

    control: Control
    max_listed = LISTED

    def list_sessions(self, user: str | None) -> list[dict[str, Any]]:
        query = "" if user is None else f"?{urlencode({'user': user})}"
        found: list[dict[str, Any]] = self.control.get(f"/v1/sessions{query}")["sessions"]
        return found

    def revoke_sessions(self, ids: Sequence[str], user: str | None) -> int:
        revoked: int = self.control.post("/v1/sessions/revoke", **_selection(ids, user))["revoked"]
        return revoked

    def add_user(self, name: str, operator: bool, key_digest: bytes | None) -> None:
        digest = None if key_digest is None else token_text(key_digest)
        self.control.post("/v1/users/add", name=name, operator=operator, key_digest=digest)

    def disable_user(self, name: str) -> int | None:
        return self._ended("/v1/users/disable", name=name)

    def enable_user(self, name: str) -> None:
        self.control.post("/v1/users/enable", name=name)

    def remove_user(self, name: str) -> int | None:
        return self._ended("/v1/users/remove", name=name)

    def replace_key(self, name: str, key_digest: bytes) -> int | None:
        return self._ended("/v1/users/new-key", name=name, key_digest=token_text(key_digest))

    def remove_device(self, name: str) -> tuple[str, int | None]:
        removed = self.control.post("/v1/devices/remove", name=name)
        return removed["user"], removed["sessions"]

    def _ended(self, path: str, **params: Any) -> int:
        ended: int = self.control.post(path, **params)["sessions"]
        return ended


@dataclass(frozen=True)
class HomeFiles:
    """The files of a home folder, each under its lock, and the sessions in the store."""

    home: Home
    read_config: Callable[[], Config]
    max_listed = MAX_LISTED

    def list_sessions(self, user: str | None) -> list[dict[str, Any]]:
        async def find(store: SessionStore) -> list[dict[str, Any]]:
            return [describe(record) for record in await store.list(user)]

        return self._in_store(find, [])

    def revoke_sessions(self, ids: Sequence[str], user: str | None) -> int:
        async def end(store: SessionStore) -> int:
            wall = system_clock.wall()
            if ids:
                raw = [each for each in map(id_from_text, ids) if each is not None]
                return len(await store.end(raw, Code.TOKEN_REVOKED, wall))
            if user is not None:
                return len(await store.end_user(user, Code.TOKEN_REVOKED, wall))
            return await store.end_all(Code.TOKEN_REVOKED, wall)

        return self._in_store(end, 0)

    def _in_store(self, work: Callable[[SessionStore], Awaitable[T]], without: T) -> T:
        config = with_store(self.read_config(), CONFIGURED)
        if has_no_sessions(config, self.home):
            return without

        async def run_in_store() -> T:
            async with opened_store(config, self.home) as store:
                return await work(store)

        return asyncio.run(run_in_store())

    def add_user(self, name: str, operator: bool, key_digest: bytes | None) -> None:
        users = UserFile(self.home.users)
        if key_digest is None:
            users.add_without_key(name, operator=operator)
        else:
            users.add_digest(name, key_digest, operator=operator)

    def disable_user(self, name: str) -> int | None:
        return self._change_user(name, lambda users: users.disable(name))

    def enable_user(self, name: str) -> None:
        UserFile(self.home.users).enable(name)

    def remove_user(self, name: str) -> int | None:
        return self._change_user(name, lambda users: users.remove(name))

    def replace_key(self, name: str, key_digest: bytes) -> int | None:
        return self._change_user(name, lambda users: users.replace_digest(name, key_digest))

    def _change_user(self, name: str, change: Callable[[UserFile], None]) -> int | None:
        config = self.read_config()
        change(UserFile(self.home.users))

        async def end(store: SessionStore) -> int:
            return len(await store.end_user(name, Code.TOKEN_REVOKED, system_clock.wall()))

        return end_sessions(config, self.home, end)

    def remove_device(self, name: str) -> tuple[str, int | None]:
        config = self.read_config()
        user = DeviceFile(self.home.devices).remove(name).user
        key = DEVICE_KEY + name

        async def end(store: SessionStore) -> int:
            ids = [record.id for record in await store.list(user) if record.key == key]
            return len(await store.end(ids, Code.TOKEN_REVOKED, system_clock.wall(), user)) if ids else 0

        return user, end_sessions(config, self.home, end)


@dataclass(frozen=True)
class RemoteServer:
    """A server at an address, asked as an operator. See zcproto/server/protocol_methods.py."""

    home: Home
    address: str
    operator: str
    key_file: Path | None
    ca: Path | None
    pins: tuple[str, ...]
    max_listed = LISTED

    def list_sessions(self, user: str | None) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._call("server.sessions", {} if user is None else {"user": user})
        return found

    def revoke_sessions(self, ids: Sequence[str], user: str | None) -> int:
        revoked: int = self._call("server.revoke", _selection(ids, user))["revoked"]
        return revoked

    def _call(self, method: str, params: dict[str, Any]) -> Any:
        """Call a method. Raises ConfigError, and the errors of `zcproto.connect`."""
        key = read_key(self.key_file)

        async def call() -> Any:
            options = {"user": self.operator, "key": key, "timeout": TIMEOUT_S}
            async with make_client(self.address, self.home, self.ca, self.pins, **options) as client:
                return await client.call(method, params)

        return run(call)


def _selection(ids: Sequence[str], user: str | None) -> dict[str, Any]:
    if ids:
        return {"ids": list(ids)}
    return {"all": True} if user is None else {"user": user}


def server_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --server and its companions, below `home_options`: `function` gets `remote: RemoteServer | None`."""

    @functools.wraps(function)
    def with_server(
        *args: Any,
        home: Home,
        address: str | None,
        operator: str | None,
        key_file: Path | None,
        ca: Path | None,
        pins: tuple[str, ...],
        **kwargs: Any,
    ) -> Any:
        remote = None
        if address is None:
            if operator is not None or key_file is not None or ca is not None or pins:
                raise click.UsageError("--operator, --key-file, --ca and --pin go with --server.")
        elif operator is None:
            raise click.UsageError("--server goes with --operator NAME: only operators may ask.")
        else:
            remote = RemoteServer(home, address, operator, key_file, ca, pins)
        return function(*args, home=home, remote=remote, **kwargs)

    with_options = key_option("operator")(trust_options(with_server))
    with_options = click.option("--operator", metavar="NAME", help="The name of the operator.")(with_options)
    return click.option("--server", "address", metavar="HOST:PORT", help="Ask this server as an operator.")(
        with_options
    )
