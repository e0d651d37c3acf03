"""Admin operations of a running server, each defined once: its path in the control API, its parameters, its result.

    zcproto user disable ada -> POST /v1/users/disable {"name": "ada"} -> Signature.bind -> disable_user("ada")

Decides: the operations. docs/control.md describes them. The commands of zcproto/cli run the same
operations without a server on the files of a home folder, and at a remote server by its protocol methods.

Rules:
- GET reads, POST changes. An unknown parameter is refused, not ignored.
- Each change is logged with the operating system's user who requested it.
- An error is an object with `error`, a sentence, and `faults` if there are several.
- No key and no token is in a request or a result: a client that adds a user makes the key and sends its digest.
- A list is bounded; `more` is true if it is not complete.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import parse_qsl

from zcproto.admin.control import ControlPeer
from zcproto.admin.parts import Parts
from zcproto.admin.snapshot import certificate_report, read_readiness, read_status
from zcproto.admin.users import NO_FILES, ServerUsers
from zcproto.alerts.service import try_sinks
from zcproto.auth import DeviceFile, RegisteredDevice, UserFile
from zcproto.auth.directory import Directory
from zcproto.certs import managed, rollover
from zcproto.certs.keys import family
from zcproto.certs.managed import ManagedCertificates
from zcproto.certs.manager import unix_ms
from zcproto.certs.settings import ManagedSite, managed_site
from zcproto.common.parameters import Signature
from zcproto.common.roles import Roles, roles_from
from zcproto.common.text import escape_text
from zcproto.errors import (
    CallError,
    CertificateError,
    Code,
    ConfigError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
)
from zcproto.http.messages import Handler, HttpRequest, HttpResponse, Route, json_response
from zcproto.observe.log import level as current_level
from zcproto.server.protocol_methods import LISTED, describe, revoke_sessions
from zcproto.server.state import log
from zcproto.sessions.token import token_from_text
from zcproto.wire.message import MessageError

LISTED_NAMES: Final = 10_000
"""Users or devices in one list."""

MAX_REASON: Final = 1_000
"""Characters of the reason for which an operator refuses a call."""

OPERATOR: Final = "a user of the control socket"

MAX_DRAIN_S: Final = 3600.0

_STATUS: Final = {
    Code.INVALID_ARGUMENT: 400,
    Code.NOT_FOUND: 404,
    Code.FAILED_PRECONDITION: 409,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.UNAVAILABLE: 503,
}

_LOGGED_FIRST: Final = frozenset({"reload", "drain", "upgrade", "alerts/test"})
"""Operations that are logged before they run: they may fail, end the server or take minutes."""

_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})

T = TypeVar("T")

Run = Callable[..., Coroutine[Any, Any, Any]]


class HasChanges(Protocol):
    """The result of a reload."""

    def as_dict(self) -> dict[str, Any]: ...


class Operations:
    """The operations of one running server. The parameters of a method are those of its operation."""

    def __init__(
        self,
        parts: Parts,
        reload: Callable[[], Awaitable[HasChanges]],
        preview_reload: Callable[[], Awaitable[HasChanges]],
        begin_drain: Callable[[float], None],
        set_level: Callable[[str], None],
        begin_upgrade: Callable[[], None],
        upgrade_failure: Callable[[], str],
    ) -> None:
        self._parts = parts
        self._users = ServerUsers(parts)
        self._reload, self._preview_reload = reload, preview_reload
        self._begin_drain = begin_drain
        self._set_level = set_level
        self._begin_upgrade = begin_upgrade
        self._upgrade_failure = upgrade_failure

    def routes(self) -> Iterator[Route]:
        """Yield the routes of the control API."""
        for method, path, run in (
            ("GET", "status", self.status),
            ("GET", "readiness", self.readiness),
            ("GET", "sessions", self.list_sessions),
            ("POST", "sessions/revoke", self.revoke_sessions),
            ("GET", "users", self.list_users),
            ("POST", "users/add", self.add_user),
            ("POST", "users/disable", self.disable_user),
            ("POST", "users/enable", self.enable_user),
            ("POST", "users/remove", self.remove_user),
            ("POST", "users/new-key", self.replace_key),
            ("POST", "users/roles", self.set_user_roles),
            ("GET", "devices", self.list_devices),
            ("POST", "devices/remove", self.remove_device),
            ("POST", "devices/roles", self.set_device_roles),
            ("GET", "certificates", self.list_certificates),
            ("POST", "certificates/renew", self.renew_certificates),
            ("POST", "certificates/rotate", self.rotate_keys),
            ("POST", "certificates/cancel", self.cancel_rotation),
            ("GET", "alerts", self.list_alerts),
            ("POST", "alerts/test", self.test_alerts),
            ("POST", "topics/publish", self.publish_event),
            ("GET", "calls", self.list_calls),
            ("POST", "calls/answer", self.answer_call),
            ("POST", "calls/refuse", self.refuse_call),
            ("GET", "reload", self.preview_reload),
            ("POST", "reload", self.reload),
            ("POST", "drain", self.drain),
            ("GET", "upgrade", self.upgrade_state),
            ("POST", "upgrade", self.upgrade),
            ("GET", "log", self.log_level),
            ("POST", "log", self.set_log_level),
        ):
            yield Route(method, f"/v1/{path}", _handler(method, path, run))

    # --- the server ----------------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        return await read_status(self._parts)

    async def readiness(self) -> dict[str, Any]:
        return dict(await read_readiness(self._parts))

    async def reload(self) -> dict[str, Any]:
        return (await self._reload()).as_dict()

    async def preview_reload(self) -> dict[str, Any]:
        """Return what a reload would do."""
        return (await self._preview_reload()).as_dict()

    async def drain(self, timeout: float | None = None) -> dict[str, Any]:  # noqa: ASYNC109 - a parameter of the API
        if timeout is not None and not 0 <= timeout <= MAX_DRAIN_S:
            raise InvalidArgument(f"timeout must be from 0 to {MAX_DRAIN_S:g} seconds")
        limit = self._parts.config.server.drain_timeout if timeout is None else timeout
        try:
            status = await read_status(self._parts)
        finally:  # also if the figures cannot be collected, or the operator has gone
            self._begin_drain(limit)
        return {"connections": status["connections"]["zcp"], "timeout": limit}

    async def upgrade(self) -> dict[str, Any]:
        self._begin_upgrade()
        return await self.upgrade_state()

    async def upgrade_state(self) -> dict[str, Any]:
        """Return the process that is replaced, or has replaced it, and why it has not."""
        timeout = self._parts.config.server.upgrade_timeout
        return {"supervisor": os.getppid(), "timeout": timeout, "failure": self._upgrade_failure()}

    async def log_level(self) -> dict[str, Any]:
        return {"level": current_level()}

    async def set_log_level(self, level: str) -> dict[str, Any]:
        before = current_level()
        try:
            self._set_level(level)
        except ConfigError as error:
            raise InvalidArgument(error.faults[0]) from error
        return {"level": current_level(), "before": before}

    # --- sessions ------------------------------------------------------------------------------------

    async def list_sessions(self, user: str | None = None) -> dict[str, Any]:
        records = await self._parts.state.sessions.records(user, LISTED + 1)
        return _bounded("sessions", map(describe, records), LISTED)

    async def revoke_sessions(
        self, ids: list[str] | None = None, user: str | None = None, all: bool = False
    ) -> dict[str, Any]:
        return {"revoked": await revoke_sessions(self._parts.state, OPERATOR, ids, user, all)}

    # --- users and devices ---------------------------------------------------------------------------

    async def list_users(self) -> dict[str, Any]:
        entries = self._users.directory.file.entries
        return _bounded("users", (user.as_dict(name) for name, user in entries.items()), LISTED_NAMES)

    async def add_user(
        self, name: str, roles: list[str] | None = None, key_digest: str | None = None
    ) -> dict[str, Any]:
        digest = None if key_digest is None else _digest(key_digest)
        await self._change_user(UserFile.add_digest, name, digest, _roles(roles or []))
        return {}

    async def set_user_roles(self, name: str, roles: list[str]) -> dict[str, Any]:
        return await self._change_user(UserFile.set_roles, name, _roles(roles))

    async def disable_user(self, name: str) -> dict[str, Any]:
        return await self._change_user(UserFile.disable, name)

    async def enable_user(self, name: str) -> dict[str, Any]:
        await self._change_user(UserFile.enable, name)
        return {}

    async def remove_user(self, name: str) -> dict[str, Any]:
        return await self._change_user(UserFile.remove, name)

    async def replace_key(self, name: str, key_digest: str) -> dict[str, Any]:
        return await self._change_user(UserFile.replace_digest, name, _digest(key_digest))

    async def _change_user(self, change: Callable[..., Any], name: str, *args: Any) -> dict[str, Any]:
        _, sessions = await self._users.change(change, name, *args)
        return {"sessions": sessions}

    async def list_devices(self) -> dict[str, Any]:
        entries = self._devices.file.entries
        return _bounded("devices", (device.as_dict(name) for name, device in entries.items()), LISTED_NAMES)

    async def remove_device(self, name: str) -> dict[str, Any]:
        file = DeviceFile(self._parts.home.devices)
        removed, sessions = await self._devices.change(partial(file.remove, name), name)
        return {"user": removed.user, "sessions": sessions}

    async def set_device_roles(self, name: str, roles: list[str] | None = None) -> dict[str, Any]:
        file = DeviceFile(self._parts.home.devices)
        narrowed = None if roles is None else _roles(roles)
        before, sessions = await self._devices.change(partial(file.set_roles, name, narrowed), name)
        return {"user": before.user, "sessions": sessions}

    @property
    def _devices(self) -> Directory[RegisteredDevice]:
        if self._parts.devices is None:
            raise FailedPrecondition(NO_FILES)
        return self._parts.devices

    # --- certificates --------------------------------------------------------------------------------

    async def list_certificates(self) -> dict[str, Any]:
        certificates = self._parts.certificates
        announced = certificates.next_pins
        return {
            "certificates": certificate_report(certificates.status()),
            "pins": [pair.pin for pair in self._parts.certificate_pairs],
            "pins_next": None
            if announced is None
            else {"pins": list(announced.pins), "from": unix_ms(announced.use_from)},
        }

    async def renew_certificates(self, type: str | None = None) -> dict[str, Any]:
        families = sorted({family(key_type) for key_type in self._managed_site.settings.key_types})
        if type is not None and type not in families:
            raise InvalidArgument(f"type must be one of certificates.key_types: {', '.join(families)}")
        chosen = families if type is None else [type]
        if self._parts.config.certificates.mode == "acme":
            return await self._order(chosen)
        return await self._issue(managed.renew, families=chosen)

    async def _order(self, families: Sequence[str]) -> dict[str, Any]:
        """Order certificates from the public CA. Raises CertificateError."""
        certificates = self._parts.certificates
        before = {pair.pin for pair in self._parts.certificate_pairs}
        await certificates.order(families)
        pairs = self._parts.certificate_pairs
        new_pins = tuple(pair.pin for pair in pairs if pair.pin not in before)
        served = ManagedCertificates(pairs, certificates.next_pins, new_pins, (), certificates.now())
        return {**served.report(), "told": []}

    async def rotate_keys(self, at_once: bool = False) -> dict[str, Any]:
        return await self._issue(managed.rotate, at_once=at_once)

    async def cancel_rotation(self) -> dict[str, Any]:
        directory = self._managed_site.directory
        progress: list[str] = []
        aside = await self._serve_new(lambda now: rollover.cancel(directory, progress.append))
        return {"cancelled": [str(path) for path in aside], "told": progress}

    async def _issue(
        self, issue: Callable[..., managed.ManagedCertificates], **options: Any
    ) -> dict[str, Any]:
        source = self._managed_site
        progress: list[str] = []
        issued = await self._serve_new(
            lambda now: issue(source.directory, source.settings, now, progress.append, **options)
        )
        return {**issued.report(), "told": progress}

    async def _serve_new(self, make: Callable[[datetime], T]) -> T:
        """Make certificates in a worker thread and start serving them before returning. `make` gets the time."""
        certificates = self._parts.certificates
        made = await asyncio.to_thread(make, certificates.now())
        await certificates.check()
        return made

    @property
    def _managed_site(self) -> ManagedSite:
        site = managed_site(self._parts.config)
        if site is None:
            raise FailedPrecondition('certificates.mode = "files": renew them with the tool that made them')
        return site

    # --- alerts --------------------------------------------------------------------------------------

    async def list_alerts(self) -> dict[str, Any]:
        return self._parts.alerts.report()

    async def test_alerts(self) -> dict[str, Any]:
        alerts = self._parts.alerts
        sinks = [queue.sink for queue in alerts.queues]
        return {"sinks": await try_sinks(sinks, self._parts.clock, self._parts.state.entropy, alerts.source)}

    # --- topics ----------------------------------------------------------------------------------------

    async def publish_event(self, topic: str, event: Any = None) -> dict[str, Any]:
        method = self._parts.state.methods.get(topic)
        found = None if method is None else method.topic
        if found is None:
            topics = sorted(
                name for name, each in self._parts.state.methods.items() if each.topic is not None
            )
            offered = f"the topics are {', '.join(topics)}" if topics else "this application has none"
            raise NotFound(f"unknown topic {escape_text(topic, 60)!r}; {offered}")
        if self._parts.fleet is not None and found.scope != "server":
            raise FailedPrecondition(
                f"the topic {topic} belongs to each worker; publish in a method, or make it with scope='server'"
            )
        try:
            found.publish(event)
        except (TypeError, MessageError) as error:
            raise InvalidArgument(str(error)) from None
        return {"topic": topic, "scope": found.scope}

    # --- pending calls ---------------------------------------------------------------------------------

    async def list_calls(self, user: str | None = None) -> dict[str, Any]:
        calls, is_complete = await self._parts.state.list_calls(user)
        return {"calls": calls, "more": not is_complete}

    async def answer_call(self, id: str, result: Any = None) -> dict[str, Any]:
        try:
            return await self._parts.state.decide_call(id, result, None, OPERATOR)
        except MessageError as error:  # too deep for another process
            raise InvalidArgument(str(error)) from None

    async def refuse_call(self, id: str, reason: str = "refused by an operator") -> dict[str, Any]:
        error = PermissionDenied(escape_text(reason, MAX_REASON))
        return await self._parts.state.decide_call(id, None, error, OPERATOR)


def _bounded(name: str, rows: Iterable[dict[str, Any]], limit: int) -> dict[str, Any]:
    listed = list(islice(rows, limit + 1))
    return {name: listed[:limit], "more": len(listed) > limit}


def _digest(text: str) -> bytes:
    digest = token_from_text(text)
    if digest is None:
        raise InvalidArgument("key_digest must be a SHA-256 as 43 characters of base64url")
    return digest


def _roles(names: list[str]) -> Roles:
    try:
        return roles_from(names)
    except ValueError as error:
        raise InvalidArgument(str(error)) from None


def _handler(method: str, path: str, run: Run) -> Handler:
    """Return a handler that checks the parameters, runs the operation and logs it if it changes something."""
    signature = Signature(run)

    async def handle(request: HttpRequest) -> HttpResponse:
        arguments: Mapping[str, Any] = _NOTHING
        changes = method != "GET"
        try:
            arguments = signature.bind(_body(request) if changes else _query(request))
            if changes and path in _LOGGED_FIRST:
                _log_change(request, path, arguments)
            result = await run(**arguments)
        except (ConfigError, CertificateError) as error:
            status, sentence = 422, str(error)
            answer = {"faults": error.faults if isinstance(error, ConfigError) else [sentence]}
        except CallError as error:
            if error.code not in _STATUS:
                raise
            status, sentence, answer = _STATUS[error.code], error.message, {}
        else:
            if changes and path not in _LOGGED_FIRST:
                _log_change(request, path, arguments, result)
            return json_response(200, result)
        if changes:
            _log_failure(request, path, arguments, sentence)
        return json_response(status, {"error": sentence, **answer})

    return handle


def _query(request: HttpRequest) -> dict[str, Any]:
    try:
        pairs = parse_qsl(request.query, keep_blank_values=True, max_num_fields=4)
    except ValueError:
        raise InvalidArgument("the query has too many parameters") from None
    params = dict(pairs)
    if len(params) < len(pairs):
        raise InvalidArgument("a parameter of the query is repeated")
    return params


def _body(request: HttpRequest) -> dict[str, Any]:
    if not request.body:
        return {}
    try:
        params = request.json()
    except (ValueError, RecursionError):
        raise InvalidArgument("the body must be JSON") from None
    if not isinstance(params, dict):
        raise InvalidArgument("the body must be an object")
    return params


def _log_change(
    request: HttpRequest, path: str, arguments: Mapping[str, Any], result: Mapping[str, Any] = _NOTHING
) -> None:
    peer = request.peer
    assert isinstance(peer, ControlPeer)
    name = arguments.get("name")
    is_device = path.startswith("devices/")
    log.info(
        "control.asked",
        what=path.replace("/", "."),
        uid=peer.uid,
        pid=peer.pid,
        user=result["user"] if is_device else arguments.get("user", name),
        device=name if is_device else None,
        roles=arguments.get("roles"),
        ids=arguments.get("ids"),
        call=arguments.get("id"),
        all=arguments.get("all"),
        sessions=result.get("sessions", result.get("revoked")),
    )


def _log_failure(request: HttpRequest, path: str, arguments: Mapping[str, Any], reason: str) -> None:
    peer = request.peer
    assert isinstance(peer, ControlPeer)
    name = arguments.get("name")
    is_device = path.startswith("devices/")
    log.info(
        "control.failed",
        what=path.replace("/", "."),
        uid=peer.uid,
        pid=peer.pid,
        user=None if is_device else arguments.get("user", name),
        device=name if is_device else None,
        reason=reason,
    )
