"""What is to be had by the control socket, as JSON: the status, sessions, users, devices, certificates, alerts, the
reload, the drain and the log.

What this file decides: the paths and the fields; docs/control.md describes them. Every change is in the log, with
the system's user who asked.

Rules:
- GET changes nothing, POST changes something. A field that is not known is refused, not ignored.
- An error is an object with `error`, a sentence, and `faults`, if there are several.
- No key and no token is in a request or an answer: whoever adds a user makes the key, and sends its digest.
- What is listed has a bound; `more` says that there is more.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Iterator, Mapping
from datetime import datetime
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import parse_qs

from zcproto.admin.control import ControlPeer
from zcproto.admin.parts import Parts
from zcproto.admin.status import ServerStatus
from zcproto.alerts.trial import try_sinks
from zcproto.auth import UserFile
from zcproto.auth.directory import Devices, Users
from zcproto.certs import own
from zcproto.certs.keeper import maintainer_settings, unix_ms
from zcproto.certs.keys import family
from zcproto.certs.maintainer import OwnSource
from zcproto.errors import (
    CallError,
    CertificateError,
    Code,
    ConfigError,
    FailedPrecondition,
    InvalidArgument,
)
from zcproto.http.messages import Handler, HttpRequest, HttpResponse, json_response
from zcproto.http.router import Route
from zcproto.observe.log import level, set_level
from zcproto.server.protocol_methods import LISTED, REVOKED_AT_ONCE, describe
from zcproto.server.state import log
from zcproto.sessions import EndReason
from zcproto.sessions.token import token_from_text, token_text

LISTED_NAMES: Final = 10_000
"""Users or devices in one answer."""

MAX_DRAIN_S: Final = 3600.0
_ORIGIN_SIZE: Final = 8

_STATUS: Final = {
    Code.INVALID_ARGUMENT: 400,
    Code.NOT_FOUND: 404,
    Code.FAILED_PRECONDITION: 409,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.UNAVAILABLE: 503,
}

_Answer = Callable[[HttpRequest], Coroutine[Any, Any, Any]]


T = TypeVar("T")


class HasChanges(Protocol):
    """The result of a reload."""

    def as_dict(self) -> dict[str, Any]: ...


class Operations(Protocol):
    """What a server does at an operator's request; implemented by `Server`."""

    async def reload(self) -> HasChanges: ...
    def begin_drain(self, limit: float | None = None) -> None: ...


class ControlResources:
    """The routes of one server's control socket."""

    def __init__(self, parts: Parts, operations: Operations) -> None:
        self._parts = parts
        self._operations = operations
        self._status_of = ServerStatus(parts)

    def routes(self) -> Iterator[Route]:
        for method, path, answer in (
            ("GET", "status", self._status),
            ("GET", "sessions", self._sessions),
            ("POST", "sessions/revoke", self._revoke),
            ("GET", "users", self._users),
            ("POST", "users/add", self._add_user),
            ("POST", "users/disable", self._disable_user),
            ("POST", "users/enable", self._enable_user),
            ("POST", "users/remove", self._remove_user),
            ("POST", "users/new-key", self._new_key),
            ("GET", "devices", self._devices),
            ("POST", "devices/remove", self._remove_device),
            ("GET", "certificates", self._certificates),
            ("POST", "certificates/renew", self._renew),
            ("POST", "certificates/rotate", self._rotate),
            ("POST", "certificates/cancel", self._cancel),
            ("GET", "alerts", self._alerts),
            ("POST", "alerts/test", self._test_alert),
            ("POST", "reload", self._reload),
            ("POST", "drain", self._drain),
            ("GET", "log", self._log),
            ("POST", "log", self._set_log),
        ):
            yield Route(method, f"/v1/{path}", _as_json(answer))

    # --- the server ----------------------------------------------------------------------------------

    async def _status(self, request: HttpRequest) -> Any:
        return self._status_of.figures()

    async def _reload(self, request: HttpRequest) -> Any:
        _fields(request)
        _tell(request, "reload")
        return (await self._operations.reload()).as_dict()

    async def _drain(self, request: HttpRequest) -> Any:
        given = _fields(request, timeout=(int, float))
        timeout = given.get("timeout")
        if timeout is not None and not 0 <= timeout <= MAX_DRAIN_S:
            raise InvalidArgument(f"timeout: seconds from 0 to {MAX_DRAIN_S:g}")
        _tell(request, "drain")
        limit = self._parts.config.server.drain_timeout if timeout is None else float(timeout)
        self._operations.begin_drain(limit)
        return {"connections": len(self._parts.state.connections), "timeout": limit}

    async def _log(self, request: HttpRequest) -> Any:
        return {"level": level()}

    async def _set_log(self, request: HttpRequest) -> Any:
        wanted = _text(_fields(request, level=str), "level")
        before = level()
        try:
            set_level(wanted)
        except ConfigError as error:
            raise InvalidArgument(error.faults[0]) from error
        _tell(request, "log")
        return {"level": level(), "before": before}

    # --- sessions ------------------------------------------------------------------------------------

    async def _sessions(self, request: HttpRequest) -> Any:
        try:
            users = parse_qs(request.query, keep_blank_values=True, max_num_fields=4)
        except ValueError:
            raise InvalidArgument("the query may name one user") from None
        if set(users) - {"user"} or len(users.get("user", ())) > 1:
            raise InvalidArgument("the query may name one user")
        user = users["user"][0] if users else None
        records = await self._parts.state.sessions.records(user, LISTED + 1)
        return {
            "sessions": [describe(record) for record in records[:LISTED]],
            "more": len(records) > LISTED,
        }

    async def _revoke(self, request: HttpRequest) -> Any:
        given = _fields(request, ids=list, user=str, all=bool)
        ids, user = given.get("ids"), given.get("user")
        if (ids is not None) + (user is not None) + (given.get("all") is True) != 1 or given.get(
            "all"
        ) is False:
            raise InvalidArgument("give ids, or user, or all = true")
        state = self._parts.state
        sessions = state.sessions
        if ids is not None:
            if len(ids) > REVOKED_AT_ONCE or not all(isinstance(each, str) for each in ids):
                raise InvalidArgument(f"ids: at most {REVOKED_AT_ONCE} texts")
            revoked = 0
            for session_id in dict.fromkeys(ids):
                revoked += await sessions.revoke(session_id, user=None, reason=EndReason.BY_OPERATOR)
        elif user is not None:
            revoked = await sessions.revoke_user(user, EndReason.BY_OPERATOR)
        else:
            revoked = await sessions.revoke_all(EndReason.BY_OPERATOR)
        _tell(request, "sessions.revoke", user=user, sessions=revoked)
        state.on_revoked("somebody by the control socket", revoked, False)
        return {"revoked": revoked}

    # --- users and devices ---------------------------------------------------------------------------

    async def _users(self, request: HttpRequest) -> Any:
        file = self._users_here().file
        names = file.names
        found = [(name, user) for name in names[:LISTED_NAMES] if (user := file.get(name)) is not None]
        return {
            "users": [
                {
                    "name": name,
                    "operator": user.operator,
                    "key": user.has_key,
                    "disabled": user.disabled,
                }
                for name, user in found
            ],
            "more": len(names) > LISTED_NAMES,
        }

    async def _add_user(self, request: HttpRequest) -> Any:
        given = _fields(request, name=str, operator=bool, key_digest=str)
        operator = bool(given.get("operator", False))
        digest = _digest(given) if "key_digest" in given else None

        def add(file: UserFile, name: str) -> None:
            if digest is None:
                file.add_without_key(name, operator=operator)
            else:
                file.add_digest(name, digest, operator=operator)

        await self._change_user(request, given, "users.add", add)
        return {}

    async def _disable_user(self, request: HttpRequest) -> Any:
        given = _fields(request, name=str)
        _, sessions = await self._change_user(request, given, "users.disable", UserFile.disable)
        return {"sessions": sessions}

    async def _enable_user(self, request: HttpRequest) -> Any:
        given = _fields(request, name=str)
        await self._change_user(request, given, "users.enable", UserFile.enable)
        return {}

    async def _remove_user(self, request: HttpRequest) -> Any:
        given = _fields(request, name=str)
        _, sessions = await self._change_user(request, given, "users.remove", UserFile.remove)
        return {"sessions": sessions}

    async def _new_key(self, request: HttpRequest) -> Any:
        given = _fields(request, name=str, key_digest=str)
        digest = _digest(given)

        def replace(file: UserFile, name: str) -> None:
            file.replace_digest(name, digest)

        _, sessions = await self._change_user(request, given, "users.new-key", replace)
        return {"sessions": sessions}

    async def _change_user(
        self,
        request: HttpRequest,
        given: Mapping[str, Any],
        what: str,
        change: Callable[[UserFile, str], Any],
    ) -> tuple[Any, int]:
        name = _text(given, "name")
        made, sessions = await self._users_here().change(lambda file: change(file, name), name)
        _tell(request, what, user=name, sessions=sessions)
        return made, sessions

    def _users_here(self) -> Users:
        users = self._parts.users
        if users is None:
            raise FailedPrecondition("this server's program decides by itself who its users are")
        return users

    async def _devices(self, request: HttpRequest) -> Any:
        devices = self._devices_here().known
        found = list(devices.items())[:LISTED_NAMES]
        return {
            "devices": [
                {
                    "name": name,
                    "user": device.user,
                    "public_key": token_text(device.public_key),
                    "added": _moment(device.added),
                }
                for name, device in found
            ],
            "more": len(devices) > LISTED_NAMES,
        }

    async def _remove_device(self, request: HttpRequest) -> Any:
        name = _text(_fields(request, name=str), "name")
        removed, sessions = await self._devices_here().remove(name)
        _tell(request, "devices.remove", device=name, user=removed.user, sessions=sessions)
        return {"user": removed.user, "sessions": sessions}

    def _devices_here(self) -> Devices:
        devices = self._parts.devices
        if devices is None:
            raise FailedPrecondition("this server's program decides by itself who its users are")
        return devices

    # --- certificates --------------------------------------------------------------------------------

    async def _certificates(self, request: HttpRequest) -> Any:
        announced = self._parts.certificates.next_pins
        return {
            "certificates": self._status_of.figures()["certificates"],
            "pins": [pair.pin for pair in self._parts.certificate_pairs],
            "pins_next": None
            if announced is None
            else {"pins": list(announced.pins), "from": unix_ms(announced.use_from)},
        }

    async def _renew(self, request: HttpRequest) -> Any:
        given = _fields(request, type=str)
        source = self._own_source()
        families = sorted({family(key_type) for key_type in source.settings.key_types})
        wanted = given.get("type")
        if wanted is not None and wanted not in families:
            raise InvalidArgument(f"type: certificates.key_types has {', '.join(families)} alone")
        chosen = families if wanted is None else [wanted]
        return await self._make(request, "certificates.renew", own.renew, families=chosen)

    async def _rotate(self, request: HttpRequest) -> Any:
        given = _fields(request, at_once=bool)
        at_once = bool(given.get("at_once", False))
        return await self._make(request, "certificates.rotate", own.rotate, at_once=at_once)

    async def _cancel(self, request: HttpRequest) -> Any:
        _fields(request)
        directory = self._own_source().directory
        told: list[str] = []
        aside = await self._make_certificates(lambda now: own.cancel(directory, told.append))
        _tell(request, "certificates.cancel")
        return {"cancelled": [str(path) for path in aside], "told": told}

    async def _make(
        self, request: HttpRequest, what: str, make: Callable[..., own.OwnCertificates], **options: Any
    ) -> Any:
        source = self._own_source()
        told: list[str] = []
        made = await self._make_certificates(
            lambda now: make(source.directory, source.settings, now, told.append, **options)
        )
        _tell(request, what)
        announced = made.announced
        return {
            "certificates": [
                {
                    "certificate": str(one.certificate),
                    "key_type": one.key_type,
                    "names": list(one.names),
                    "not_after": _moment(one.not_after),
                    "pin": one.pin,
                    "new_key": one.pin in made.used,
                }
                for one in made.pairs
            ],
            "next_pins": None
            if announced is None
            else {"pins": list(announced.pins), "use_from": _moment(announced.use_from)},
            "told": told,
        }

    async def _make_certificates(self, make: Callable[[datetime], T]) -> T:
        """Make certificates in a worker thread and start serving them before returning. `make` gets the time."""
        certificates = self._parts.certificates
        made = await asyncio.to_thread(make, certificates.now())
        await certificates.look()
        return made

    def _own_source(self) -> OwnSource:
        source = maintainer_settings(self._parts.config).default
        if not isinstance(source, OwnSource):
            raise FailedPrecondition('certificates.mode = "files": whoever made the certificates renews them')
        return source

    # --- alerts --------------------------------------------------------------------------------------

    async def _alerts(self, request: HttpRequest) -> Any:
        return self._parts.alerts.report()

    async def _test_alert(self, request: HttpRequest) -> Any:
        _fields(request)
        _tell(request, "alerts.test")
        alerts = self._parts.alerts
        sinks = [queue.sink for queue in alerts.queues]
        return {"sinks": await try_sinks(sinks, self._parts.clock, alerts.origin, alerts.source)}


# --- requests and answers ------------------------------------------------------------------------------------


def _as_json(answer: _Answer) -> Handler:
    @functools.wraps(answer)
    async def handle(request: HttpRequest) -> HttpResponse:
        try:
            return json_response(200, await answer(request))
        except ConfigError as error:
            return json_response(422, {"error": str(error), "faults": error.faults})
        except CertificateError as error:
            return json_response(422, {"error": str(error), "faults": [str(error)]})
        except CallError as error:
            status = _STATUS.get(error.code)
            if status is None:
                raise
            return json_response(status, {"error": error.message})

    return handle


def _fields(request: HttpRequest, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
    """The fields of the body, an object of these and no others; none is there if the body is empty.

    Raises InvalidArgument.
    """
    if not request.body:
        return {}
    try:
        given = request.json()
    except (ValueError, RecursionError):
        raise InvalidArgument("the body is no JSON") from None
    if not isinstance(given, dict):
        raise InvalidArgument("the body must be an object")
    for name, value in given.items():
        kind = kinds.get(name)
        if kind is None:
            raise InvalidArgument(f"unknown field {name[:40]!r}; there are: {', '.join(kinds) or 'none'}")
        is_bool = isinstance(value, bool)
        if not isinstance(value, kind) or (is_bool and kind is not bool):
            raise InvalidArgument(f"{name}: a value of another type is needed")
    return given


def _text(given: Mapping[str, Any], name: str) -> str:
    if name not in given:
        raise InvalidArgument(f"{name} is missing")
    text = given[name]
    assert isinstance(text, str)
    return text


def _digest(given: Mapping[str, Any]) -> bytes:
    digest = token_from_text(_text(given, "key_digest"))
    if digest is None:
        raise InvalidArgument("key_digest: 43 characters of base64url are needed, a SHA-256")
    return digest


def _tell(
    request: HttpRequest,
    what: str,
    *,
    user: str | None = None,
    device: str | None = None,
    sessions: int | None = None,
) -> None:
    peer = request.peer
    assert isinstance(peer, ControlPeer)
    log.info(
        "control.asked",
        what=what,
        uid=peer.uid,
        pid=peer.pid,
        user=user,
        device=device,
        sessions=sessions,
    )


def _moment(time: datetime) -> str:
    return f"{time:%Y-%m-%dT%H:%M:%SZ}"
