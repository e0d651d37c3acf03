"""Machine tokens: the access of scrapers to figures, without a user and a session.

Decides: whether a token may read a resource, when its last use is stored, and when its end is an alert.

Rules:
- The file is looked at for each request (one stat), so that a revocation applies to the next one, in every worker
  and on open connections.
- Tokens that are not known are throttled by address like failed logins; every one gets the same answer. A known
  token is never throttled: strangers behind the same address could keep a scraper out. One that has expired, or
  lacks the scope, is logged with its name and not counted.
- The last use is stored once an hour. A file that cannot be written stops no request.
- A token in use raises an alert before it ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from math import ceil
from typing import Final

from zcproto.alerts import AlertKind, Severity
from zcproto.alerts.service import ServerAlerts
from zcproto.auth import Login
from zcproto.auth.directory import Directory
from zcproto.auth.tokens import CLOCK_STEP, MachineToken, TokenFile, full_hour, is_later
from zcproto.common.clock import MS_PER_SECOND, Clock
from zcproto.common.deadlines import sleep_together
from zcproto.common.home import Home
from zcproto.common.text import counted
from zcproto.errors import ConfigError, ResourceExhausted
from zcproto.http.messages import HttpRequest, HttpResponse, text_response
from zcproto.server.state import log

UPKEEP_INTERVAL: Final = 1.0
"""Seconds between two looks for uses to be stored and for ends to be reported."""

IN_USE: Final = timedelta(days=7)
"""A token is in use for so long after its last use."""

WARNS_BEFORE: Final = timedelta(days=14)
"""Time before its end from which a token in use is an alert; at most a quarter of its life."""

REALM: Final = 'Bearer realm="zcproto"'
NO_MACHINE_TOKEN: Final = text_response(
    401,
    "this needs a token of zcproto token create: Authorization: Bearer TOKEN",
    headers=(("WWW-Authenticate", REALM),),
)
BAD_MACHINE_TOKEN: Final = text_response(
    401,
    "this token is not valid here: create another one with zcproto token create",
    headers=(("WWW-Authenticate", f'{REALM}, error="invalid_token"'),),
)


class MachineTokens:
    """The machine tokens of one server.

    `now` is the time by which tokens end. `reports` is whether this process raises the alerts about them.
    """

    def __init__(
        self,
        directory: Directory[MachineToken],
        login: Login,
        alerts: ServerAlerts,
        clock: Clock,
        now: Callable[[], datetime],
        *,
        reports: bool,
        sleep: Callable[[float], Awaitable[None]] = sleep_together,
    ) -> None:
        self.directory = directory
        self._login = login
        self._alerts = alerts
        self._clock = clock
        self._now = now
        self._reports = reports
        self._sleep = sleep
        self._uses: dict[str, tuple[bytes, datetime]] = {}
        self._noted: tuple[datetime | None, set[bytes]] = None, set()
        self._reported: dict[str, Severity] = {}

    async def refusal(self, token: bytes | None, request: HttpRequest, scope: str) -> HttpResponse | None:
        """Return None if a token may read what has this scope, else the response. No token counts as invalid."""
        address = request.peer.address
        found = None if token is None else await self.find(token)
        if found is not None:
            return self.check(*found, address, scope)
        try:
            await self._login.admit_unnamed(address, self._clock.now())
        except ResourceExhausted as error:
            seconds = max(1, ceil(error.details["retry_after_ms"] / MS_PER_SECOND))
            return text_response(429, error.message, headers=(("Retry-After", str(seconds)),))
        await self._login.refuse_unnamed(address, self._clock.now())
        log.info("http.token_refused", peer=address)
        return BAD_MACHINE_TOKEN

    async def find(self, token: bytes) -> tuple[str, MachineToken] | None:
        """Return the name and the entry of a token, as of now, even if it has expired."""
        await self.directory.refresh()
        file = self.directory.file
        assert isinstance(file, TokenFile)
        return file.by_token(token)

    def check(self, name: str, token: MachineToken, address: str, scope: str) -> HttpResponse | None:
        """Return None if a known token may be used for a scope now, and note the use; else the response."""
        now = self._now()
        if now >= token.expires:
            log.info("http.token_refused", peer=address, machine=name, reason="it has expired")
            return BAD_MACHINE_TOKEN
        if scope not in token.scopes:
            log.info("http.token_refused", peer=address, machine=name, reason=f"it lacks the scope {scope}")
            return text_response(
                403,
                f"this token lacks the scope {scope}",
                headers=(("WWW-Authenticate", f'{REALM}, error="insufficient_scope", scope="{scope}"'),),
            )
        self._note_use(name, token, full_hour(now))
        return None

    def _note_use(self, name: str, token: MachineToken, hour: datetime) -> None:
        """Note the first use of a token in an hour."""
        noted_in, noted = self._noted
        if noted_in != hour:
            noted = set()
            self._noted = hour, noted
        if token.digest not in noted and is_later(hour, token.last_used):
            noted.add(token.digest)
            self._uses[name] = token.digest, hour

    # --- upkeep ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Store the last uses, and report tokens that end soon, until cancelled."""
        while True:
            await self._sleep(UPKEEP_INTERVAL)
            await self.store_uses()
            await self.directory.refresh()
            if self._reports:
                self.report_ends()

    async def store_uses(self) -> None:
        """Store the uses since the last call. After a failure they are forgotten, until the next hour."""
        uses, self._uses = self._uses, {}
        path = self.directory.file.path
        if not uses or path.is_symlink():  # the file of a Secret: writing would replace the link by a copy
            return
        file = TokenFile(path)  # of its own: that of the directory may be read meanwhile
        try:
            await asyncio.to_thread(file.mark_used, uses)
        except ConfigError as error:
            log.warning("tokens.uses_not_stored", faults=error.faults)

    def report_ends(self) -> None:
        """Raise an alert for each token in use that ends soon or has ended, and resolve those of others."""
        now = self._now()
        entries = self.directory.file.entries
        due = {name: _severity(token, now) for name, token in entries.items()}
        for name in [name for name in self._reported if due.get(name) is None]:
            del self._reported[name]
            self._alerts.resolve(AlertKind.MACHINE_EXPIRY, f"the token {name} does not end soon", about=name)
        for name, severity in due.items():
            if severity is None or self._reported.get(name) is severity:
                continue
            self._reported[name] = severity
            self._alerts.raise_(
                AlertKind.MACHINE_EXPIRY,
                _title(name, entries[name].expires - now),
                about=name,
                severity=severity,
                changed=True,
                details={"seconds_left": round((entries[name].expires - now).total_seconds())},
            )


def build_tokens(
    home: Home,
    login: Login,
    alerts: ServerAlerts,
    clock: Clock,
    now: Callable[[], datetime],
    *,
    reports: bool,
    on_read: Callable[[Sequence[str]], None] = lambda faults: None,
) -> MachineTokens:
    """Build the tokens in a home folder. `on_read` is that of `Directory`. Raises ConfigError."""

    async def ends_no_session(name: str, token: MachineToken) -> None:
        pass

    directory = Directory(
        TokenFile(home.tokens),
        on_gone=ends_no_session,
        on_gone_elsewhere=None if reports else ends_no_session,  # the changes are logged once
        on_read=on_read,
    )
    return MachineTokens(directory, login, alerts, clock, now, reports=reports)


def _severity(token: MachineToken, now: datetime) -> Severity | None:
    """Return the severity of the alert about the end of a token; None without an alert."""
    left = token.expires - now
    if token.last_used is None or token.last_used - now > CLOCK_STEP:
        return None
    if min(now, token.expires) - token.last_used > IN_USE or left <= -IN_USE:
        return None
    if left <= timedelta(0):
        return Severity.ERROR
    return Severity.WARNING if left <= min(WARNS_BEFORE, (token.expires - token.added) / 4) else None


def _title(name: str, left: timedelta) -> str:
    if left <= timedelta(0):
        return f"the token {name}, which is in use, has expired"
    hours = max(1, round(left.total_seconds() / 3600))
    when = counted(hours, "hour") if hours < 48 else counted(round(hours / 24), "day")
    return f"the token {name}, which is in use, expires in {when}"
