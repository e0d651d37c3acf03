"""The three places where an operation of the control API can run.

    Control         the server of the home folder, through its control socket
    HomeFiles       the files and the store of the home folder, while no server runs
    RemoteServer    a server elsewhere, by the protocol methods of operators: sessions only

`run` runs an operation, with the same name, parameters and result in each: those of zcproto/admin/operations.py.
Parameters with the value None are omitted. In a result, `sessions` is how many a change has ended; None if a server
ends them that cannot be asked how many.

Rules: a running server that cannot be asked is an error, and never bypassed: a change of its files behind its back
would be half of the operation.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from zcproto.auth import DeviceFile, UserFile
from zcproto.cli import Instance
from zcproto.cli.audit import about, recorded
from zcproto.cli.connect import (
    TrustChoice,
    call_once,
    is_typed,
    key_option,
    read_key,
    trust_options,
    user_option,
)
from zcproto.cli.control import Control, find_control
from zcproto.cli.store import CONFIGURED, end_sessions, has_no_sessions, run_in_store, with_store
from zcproto.client.options import USER_VARIABLE
from zcproto.common.clock import system_clock
from zcproto.common.home import Home
from zcproto.errors import Code
from zcproto.server.protocol_methods import LISTED, describe
from zcproto.sessions.record import SessionRecord
from zcproto.sessions.session import DEVICE_KEY
from zcproto.sessions.token import id_from_text, token_from_text
from zcproto.stores.base import MAX_LISTED, SessionStore

TIMEOUT_S = 30.0
"""For opening a session, with the time that throttled logins wait."""

REMOTE_METHODS = {"sessions": "server.sessions", "sessions/revoke": "server.revoke"}

T = TypeVar("T")


def local_backend(instance: Instance) -> Control | HomeFiles:
    """Return the running server of a home folder, or its files. Raises ControlError."""
    control = find_control(instance.home)
    if control is not None:
        return control
    instance.home.require()
    return HomeFiles(instance)


@dataclass(frozen=True)
class RemoteServer:
    """A server at an address, asked as an operator."""

    home: Home
    address: str
    operator: str
    key_file: Path | None
    trust: TrustChoice

    def run(self, operation: str, **params: Any) -> dict[str, Any]:
        """Call the method of an operation. Raises ConfigError, and the errors of `zcproto.connect`."""
        options = {"user": self.operator, "key": read_key(self.key_file), "timeout": TIMEOUT_S}
        given = {name: value for name, value in params.items() if value is not None}
        result = call_once(self.trust, self.home, self.address, REMOTE_METHODS[operation], given, **options)
        if operation == "sessions":
            return {"sessions": result, "more": len(result) >= LISTED}
        return dict(result)


@dataclass(frozen=True)
class HomeFiles:
    """The files of a home folder, each under its lock, and the sessions in the store.

    The configuration is read before anything is changed.
    """

    instance: Instance

    def run(self, operation: str, **params: Any) -> dict[str, Any]:
        operations: dict[str, Callable[..., dict[str, Any]]] = {
            "sessions": self._list_sessions,
            "sessions/revoke": self._revoke_sessions,
            "users/add": self._add_user,
            "users/disable": functools.partial(self._change_user, UserFile.disable),
            "users/enable": self._enable_user,
            "users/remove": functools.partial(self._change_user, UserFile.remove),
            "users/new-key": self._replace_key,
            "users/roles": self._set_user_roles,
            "devices/remove": self._remove_device,
            "devices/roles": self._set_device_roles,
        }
        if operation == "sessions":
            return operations[operation](**params)
        with recorded(self.instance, operation.replace("/", "."), **about(operation, params)) as result:
            result.update(operations[operation](**params))
        return result

    def _list_sessions(self, user: str | None = None) -> dict[str, Any]:
        found: Sequence[SessionRecord] = self._in_store(lambda store: store.list(user), ())
        return {"sessions": [describe(record) for record in found], "more": len(found) >= MAX_LISTED}

    def _revoke_sessions(
        self, ids: list[str] | None = None, user: str | None = None, all: bool | None = None
    ) -> dict[str, Any]:
        async def end(store: SessionStore) -> int:
            wall = system_clock.wall()
            if ids is not None:
                raw = [each for each in map(id_from_text, ids) if each is not None]
                return len(await store.end(raw, Code.TOKEN_REVOKED, wall))
            if user is not None:
                return len(await store.end_user(user, Code.TOKEN_REVOKED, wall))
            return await store.end_all(Code.TOKEN_REVOKED, wall)

        return {"revoked": self._in_store(end, 0)}

    def _in_store(self, work: Callable[[SessionStore], Awaitable[T]], without: T) -> T:
        config, home = with_store(self.instance.read_config(), CONFIGURED), self.instance.home
        return without if has_no_sessions(config, home) else run_in_store(config, home, work)

    def _add_user(self, name: str, roles: list[str], key_digest: str | None) -> dict[str, Any]:
        digest = None if key_digest is None else _digest(key_digest)
        UserFile(self.instance.home.users).add_digest(name, digest, frozenset(roles))
        return {}

    def _set_user_roles(self, name: str, roles: list[str]) -> dict[str, Any]:
        return self._change_user(UserFile.set_roles, name, frozenset(roles))

    def _enable_user(self, name: str) -> dict[str, Any]:
        UserFile(self.instance.home.users).enable(name)
        return {}

    def _replace_key(self, name: str, key_digest: str) -> dict[str, Any]:
        return self._change_user(UserFile.replace_digest, name, _digest(key_digest))

    def _change_user(self, change: Callable[..., None], name: str, *args: Any) -> dict[str, Any]:
        config = self.instance.read_config()
        change(UserFile(self.instance.home.users), name, *args)
        return {"sessions": end_sessions(config, self.instance.home, name)}

    def _remove_device(self, name: str) -> dict[str, Any]:
        config = self.instance.read_config()
        user = DeviceFile(self.instance.home.devices).remove(name).user
        return {"user": user, "sessions": end_sessions(config, self.instance.home, user, DEVICE_KEY + name)}

    def _set_device_roles(self, name: str, roles: list[str] | None) -> dict[str, Any]:
        config = self.instance.read_config()
        narrowed = None if roles is None else frozenset(roles)
        user = DeviceFile(self.instance.home.devices).set_roles(name, narrowed).user
        return {"user": user, "sessions": end_sessions(config, self.instance.home, user, DEVICE_KEY + name)}


def _digest(text: str) -> bytes:
    digest = token_from_text(text)
    assert digest is not None, "made by zcproto/cli/user.py"
    return digest


def server_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --server and its companions, below `instance_options`: `function` gets `remote: RemoteServer | None`."""

    @functools.wraps(function)
    def with_server(
        *args: Any,
        instance: Instance,
        address: str | None,
        operator: str | None,
        key_file: Path | None,
        trust: TrustChoice,
        **kwargs: Any,
    ) -> Any:
        remote = None
        if address is None:
            if is_typed("operator", "key_file", "ca", "pins"):
                raise click.UsageError("--operator, --key-file, --ca and --pin go with --server HOST:PORT.")
        elif operator is None:
            raise click.UsageError(
                f"--server goes with --operator NAME (or {USER_VARIABLE}): only operators may ask."
            )
        else:
            remote = RemoteServer(instance.home, address, operator, key_file, trust)
        return function(*args, instance=instance, remote=remote, **kwargs)

    with_options = key_option("operator")(trust_options(with_server))
    with_options = user_option("The name of the operator.", name="--operator")(with_options)
    return click.option("--server", "address", metavar="HOST:PORT", help="Ask this server as an operator.")(
        with_options
    )
