"""The cells of the fault matrix: one operation of a session each, by clients that retry as the protocol permits.

A cell has a user of its own with two sessions, known to all servers. It does its operation, retries it until it is
acknowledged, and tries all its tokens on all servers all the time. What happened is written to its history.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha256
from typing import Any, ClassVar, Final, NamedTuple, TypeVar

from bench.scenarios.history import End, History, Token, Verdict, acknowledge, begin
from bench.scenarios.history import Probe as Tried
from bench.scenarios.matrix_node import RUN
from bench.scenarios.sessions import CLIENT, ENDED_CODES
from zcproto.client.credentials import DeviceKey
from zcproto.errors import CallError, Code, ConnectionClosed, ZcprotoError
from zcproto.load.caller import Caller, LoadTarget
from zcproto.load.plan import Credential
from zcproto.tls.transport import TlsTransport
from zcproto.wire.frame import NO_TOKEN

PER_USER: Final = 3
"""Sessions of one user: the cell's two, and one more."""

ATTEMPT_S: Final = 10.0
PROBE_S: Final = 20.0
"""A probe of a paused server is answered after its pause."""

PROBE_PAUSE_S: Final = 0.25
RETRY_S: Final = 20.0
"""Within which a retried operation has to succeed when the fault is over."""

RETRY_PAUSE_S: Final = 0.2
OUTCOME_S: Final = 2.0
"""Wait for the answer to a request that a server ran which is gone: it may never come."""

T = TypeVar("T")

LATER: Final = (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.STALE_TIMESTAMP)
THIEF: Final = "thief/1"


class Place(NamedTuple):
    """A server as clients see it: its name in messages, and where it listens now."""

    name: str
    target: Callable[[], LoadTarget]


class Channel(NamedTuple):
    """What a device signs of a connection."""

    salt: bytes
    leaf: bytes


class Client:
    """One connection to a server, made again when it was lost. It attaches the sessions of a device."""

    def __init__(self, place: Place, device: DeviceKey | None = None) -> None:
        self.place = place
        self._device = device
        self._caller: Caller | None = None
        self._connecting = asyncio.Lock()

    async def call(
        self,
        method: str,
        params: dict[str, Any],
        token: bytes = NO_TOKEN,
        *,
        key: str = "",
        within_s: float = ATTEMPT_S,
    ) -> Any:
        """Call a method. Raises CallError, or ConnectionClosed also if there is no answer in time."""
        try:
            async with asyncio.timeout(within_s):
                return await self._call(method, params, token, {"idempotency_key": key} if key else None)
        except TimeoutError:
            raise ConnectionClosed(f"no answer to {method} within {within_s:g} s") from None

    async def _call(
        self, method: str, params: dict[str, Any], token: bytes, meta: dict[str, Any] | None
    ) -> Any:
        stale = attached = False
        while True:
            caller = await self._connected()
            try:
                return await caller.call(method, params, token, meta)
            except CallError as error:
                if error.code is Code.STALE_TIMESTAMP and not stale:  # the server's clock was set
                    stale = True
                    if self._caller is caller:
                        self.close()
                        caller.lost("its timestamps are stale")  # for calls in flight
                elif self._device is not None and error.details.get("attach") and not attached:
                    attached = True
                    await self.attach(token)
                else:
                    raise

    async def attach(self, token: bytes) -> None:
        assert self._device is not None
        caller = await self._connected()
        params = self._device.attach_params(_channel(caller), token)
        await caller.call("session.attach", params, token)

    async def open_params(self) -> dict[str, Any]:
        """Return the params of `session.open` for the device."""
        assert self._device is not None
        return self._device.params(_channel(await self._connected()))

    async def _connected(self) -> Caller:
        async with self._connecting:
            if self._caller is None or self._caller.ended:
                self._caller = await self.place.target().caller()
            return self._caller

    def close(self) -> None:
        if self._caller is not None:
            self._caller.close()
            self._caller = None


def _channel(caller: Caller) -> Channel:
    transport = caller.transport
    assert isinstance(transport, TlsTransport)
    certificate = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
    return Channel(caller.conversation.salt, sha256(certificate).digest())


class Means(NamedTuple):
    """What a cell works with. `places` are all servers; the operation is done at `at`."""

    places: Sequence[Place]
    at: Place
    user: Credential
    operator: Credential
    device: DeviceKey | None
    write_uses: Callable[[Place], Awaitable[bool]]
    loses_writes: bool
    """Whether the store may lose what it acknowledged during the fault."""
    loses_server: bool
    """Whether a server is killed."""
    forgets: bool
    """Whether all sessions end with the server that is killed."""


class Cell:
    """One operation. Subclasses define `act`, which tries once and returns whether that settles it."""

    name: ClassVar[str]

    def __init__(self, means: Means) -> None:
        self.means = means
        self.history = History(PER_USER)
        self.secrets: dict[Token, tuple[bytes, bytes]] = {}
        """The access and the refresh token."""
        self.keys: list[str] = []
        """The idempotency keys of its requests."""
        self._clients = {place.name: Client(place, means.device) for place in means.places}
        self._probes: set[asyncio.Task[Verdict]] = set()
        self._watch: asyncio.Task[None] | None = None
        self.is_acting = self._is_settled = False
        self.last_error = "not tried"
        self.is_over = False
        """Whether the fault is over."""
        self.has_failed = False
        """Whether a step failed, so that the next ones mean nothing."""

    def client(self, place: Place | None = None) -> Client:
        return self._clients[(place or self.means.at).name]

    def places(self, first: Place) -> list[Place]:
        """Return all servers, beginning with this one."""
        return [first, *(place for place in self.means.places if place is not first)]

    @property
    def others(self) -> list[Place]:
        return self.places(self.means.at)[1:] or [self.means.at]

    # --- the steps of a cell -------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Open two sessions, and use them on all servers."""
        for _ in range(2):
            token = await self.persist(partial(self.open, self.client()))
            for place in self.means.places:
                await self.persist(partial(self.client(place).call, "echo", {}, self.secrets[token][0]))
        await self.prepare_more()
        self._watch = asyncio.create_task(self._try_all_the_time())

    async def prepare_more(self) -> None:
        """Do what else has to be done before the fault."""

    async def act(self, place: Place) -> bool:
        """Do the operation of this kind of cell once. Return whether it is settled."""
        raise NotImplementedError

    async def first_attempt(self) -> None:
        self.is_acting = True
        self._is_settled = await self._attempt(self.means.at)

    async def finish(self) -> None:
        """Retry the operation until it is settled, and follow it up."""
        self.is_over = True
        if not self._is_settled:
            await self._retry()
        if not self.means.forgets:
            await self.follow_up()

    async def _attempt(self, place: Place) -> bool:
        """Try the operation. Return whether it is settled; errors that a client may retry are not."""
        try:
            return await self.act(place)
        except ConnectionClosed as error:
            self.last_error = str(error)
        except CallError as error:
            self.last_error = f"{error.code.name}: {error}"
            if error.code in ENDED_CODES and self.means.forgets:
                return True
            if error.code not in LATER:
                self.history.faults.append(f"the operation got {self.last_error} {place.name}")
                return True
        except ZcprotoError as error:
            self.last_error = str(error)
        return False

    async def _retry(self) -> None:
        """Retry the operation, on the other servers first."""
        end = time.monotonic() + RETRY_S
        order = itertools.cycle([*self.others, self.means.at])
        while not await self._attempt(next(order)):
            if time.monotonic() > end:
                self.history.faults.append(
                    f"the operation did not succeed within {RETRY_S:g} s after the fault: {self.last_error}"
                )
                return
            await asyncio.sleep(RETRY_PAUSE_S)

    async def follow_up(self) -> None:
        """Do what only works if the operation was done right."""

    async def persist(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do something that a client may retry until it succeeds."""
        end = time.monotonic() + RETRY_S
        while True:
            try:
                return await work()
            except CallError as error:
                if error.code not in LATER or "limit" in error.details or time.monotonic() > end:
                    raise
            except ConnectionClosed:
                if time.monotonic() > end:
                    raise
            await asyncio.sleep(RETRY_PAUSE_S)

    async def settle(self, within_s: float) -> None:
        """Wait until every server refuses what has ended, or until it is too late for that."""
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            ended = [token for token in self.history.tokens if token.is_ended]
            found = await asyncio.gather(*(self._try(*pair) for pair in self._pairs(ended)))
            if all(verdict is Verdict.REFUSED for verdict in found):
                return
            await asyncio.sleep(PROBE_PAUSE_S)

    async def census(self, name: str) -> None:
        """Try all tokens on all servers, when every answer has to be right."""
        for pair in self._pairs(self.history.tokens):
            await self._try(*pair, census=name)

    async def stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        for task in self._probes:
            task.cancel()
        await asyncio.gather(*filter(None, [self._watch]), *self._probes, return_exceptions=True)

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    # --- probes --------------------------------------------------------------------------------------

    def _pairs(self, tokens: Sequence[Token]) -> list[tuple[Token, Place]]:
        return [(token, place) for token in tokens for place in self.means.places]

    async def _try_all_the_time(self) -> None:
        while True:
            for pair in self._pairs(self.history.tokens):
                task = asyncio.create_task(self._try(*pair))
                self._probes.add(task)
                task.add_done_callback(self._probes.discard)
            await asyncio.sleep(PROBE_PAUSE_S)

    async def _try(self, token: Token, place: Place, census: str = "") -> Verdict:
        sent = time.monotonic()
        end = sent + (RETRY_S if census else 0.0)
        while True:
            verdict, answer = await self._ask(token, place)
            if verdict is not Verdict.UNKNOWN or time.monotonic() >= end:
                break
            await asyncio.sleep(RETRY_PAUSE_S)
            sent = time.monotonic()
        done = time.monotonic()
        self.history.probes.append(Tried(token, place.name, sent, done, verdict, census, answer))
        return verdict

    async def _ask(self, token: Token, place: Place) -> tuple[Verdict, str]:
        try:
            await self.client(place).call("echo", {}, self.secrets[token][0], within_s=PROBE_S)
        except CallError as error:
            is_refused = error.code in (*ENDED_CODES, Code.TOKEN_EXPIRED) and not error.details.get("attach")
            return Verdict.REFUSED if is_refused else Verdict.UNKNOWN, error.code.name
        except ZcprotoError as error:
            return Verdict.UNKNOWN, str(error)
        return Verdict.ACCEPTED, ""

    # --- operations that several cells need ----------------------------------------------------------

    async def open(self, client: Client) -> Token:
        user, key = self.means.user
        params = {"scheme": "api_key", "user": user, "key": key}
        if self.means.device is not None:
            params = await client.open_params()
        sent = time.monotonic()
        opened = await client.call("session.open", {**params, "client": CLIENT})
        means = self.means
        may_be_lost = means.forgets or (means.loses_writes and self.is_acting)
        token = self.history.opened(sent, time.monotonic(), may_be_lost=may_be_lost)
        self.secrets[token] = opened["token"], opened["refresh_token"]
        return token

    async def refresh(self, client: Client, token: Token) -> Token:
        begin(token.replaced, time.monotonic())
        params = {"refresh_token": self.secrets[token][1], "client": CLIENT}
        made = await client.call("session.refresh", params)
        may_be_lost = self.means.loses_writes and self.is_acting
        new = self.history.refreshed(token, client.place.name, time.monotonic(), may_be_lost=may_be_lost)
        self.secrets[new] = made["token"], made["refresh_token"]
        return new

    async def end(
        self, client: Client, ends: Sequence[End], method: str, params: dict[str, Any], token: bytes
    ) -> None:
        """Call a method that ends sessions, and write down when it was acknowledged."""
        for end in ends:
            begin(end, time.monotonic())
        await client.call(method, params, token)
        for end in ends:
            acknowledge(end, client.place.name, time.monotonic())

    @property
    def ends(self) -> list[End]:
        return [session.end for session in self.history.sessions]

    def secret(self, number: int) -> bytes:
        """Return the first access token of a session."""
        return self.secrets[self.history.tokens[number]][0]

    async def open_operator(self, client: Client) -> bytes:
        user, key = self.means.operator
        params = {"scheme": "api_key", "user": user, "key": key, "client": CLIENT}
        opened = await client.call("session.open", params)
        token: bytes = opened["token"]
        return token


class Open(Cell):
    """Open more sessions than the limit permits, on all servers at once."""

    name = "open"

    async def act(self, place: Place) -> bool:
        outcomes = await asyncio.gather(
            *(self.open(self.client(each)) for each in (*self.places(place), place)), return_exceptions=True
        )
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if len(errors) < len(outcomes):
            return True
        limited = [error for error in errors if isinstance(error, CallError) and "limit" in error.details]
        # An opening without an answer takes a place until the server ends its session; a killed server does not.
        if len(limited) == len(errors) and self.means.loses_server:
            return True
        raise next((error for error in errors if error not in limited), errors[0])

    async def follow_up(self) -> None:
        for place in self.means.places:
            with suppress(ZcprotoError):  # over the limit
                await self.persist(partial(self.open, self.client(place)))


class Refresh(Cell):
    """Refresh a session; retry with the same refresh token; refresh once more elsewhere."""

    name = "refresh"

    async def act(self, place: Place) -> bool:
        await self.refresh(self.client(place), self.history.tokens[0])
        return True

    async def follow_up(self) -> None:
        newest = [token for token in self.history.tokens if token.session is self.history.sessions[0]][-1]
        if newest.number:
            await self.persist(partial(self.refresh, self.client(self.others[0]), newest))


class Touch(Cell):
    """Use a session and write the last use to the store."""

    name = "touch"

    async def act(self, place: Place) -> bool:
        client, session = self.client(place), self.history.sessions[0]
        wall = await client.call("time", {}, self.secret(0))
        await client.call("echo", {}, self.secret(0))
        if not await self.means.write_uses(place):
            self.last_error = "the last use was not written"
            return False
        session.may_be_lost |= self.means.loses_writes
        self.history.used(session, wall)
        return True

    async def follow_up(self) -> None:
        first = await self._shown(self.means.at)
        for place in self.means.places:
            for session_id, wall in (await self._shown(place)).items():
                if session_id == next(iter(first)):
                    self.history.shown_use(self.history.sessions[0], place.name, wall)

    async def _shown(self, place: Place) -> dict[str, int]:
        client = self.client(place)
        listed = await self.persist(partial(client.call, "session.list", {}, self.secret(1)))
        return {each["id"]: each["last_used_at"] for each in listed}


class RevokeOne(Cell):
    """Revoke one session by another one of the user, which stays."""

    name = "revoke one"
    _tried = 0

    async def prepare_more(self) -> None:
        listed = await self.persist(partial(self.client().call, "session.list", {}, self.secret(0)))
        self._id = next(each["id"] for each in listed if each["current"])

    async def act(self, place: Place) -> bool:
        self._tried += 1
        ends = [self.history.sessions[0].end]
        try:
            await self.end(self.client(place), ends, "session.revoke", {"id": self._id}, self.secret(1))
        except CallError as error:
            if error.code is not Code.NOT_FOUND or self._tried == 1:
                raise
            acknowledge(ends[0], place.name, time.monotonic())  # by an earlier attempt
        return True


class RevokeFamily(Cell):
    """Use a spent refresh token as a thief does, which ends the session with all its tokens."""

    name = "revoke family"

    async def prepare_more(self) -> None:
        await self.persist(partial(self.refresh, self.client(), self.history.tokens[0]))

    async def act(self, place: Place) -> bool:
        end = self.history.sessions[0].end
        begin(end, time.monotonic())
        params = {"refresh_token": self.secrets[self.history.tokens[0]][1], "client": THIEF}
        try:
            await self.client(place).call("session.refresh", params)
        except CallError as error:
            if error.code not in ENDED_CODES:
                raise
            acknowledge(end, place.name, time.monotonic())
        else:
            self.history.faults.append(f"a spent refresh token got a pair {place.name}")
        return True


class RevokeUser(Cell):
    """Revoke all sessions of the user, as an operator."""

    name = "revoke user"
    _token: bytes = NO_TOKEN

    async def prepare_more(self) -> None:
        self._token = await self.persist(partial(self.open_operator, self.client()))
        for place in self.others:
            await self.persist(partial(self.client(place).call, "echo", {}, self._token))

    async def act(self, place: Place) -> bool:
        await self.end(self.client(place), self.ends, "server.revoke", self._params(), self._token)
        return True

    def _params(self) -> dict[str, Any]:
        return {"user": self.means.user.user}


class RevokeAll(RevokeUser):
    """Revoke all sessions of all users, also the operator's own."""

    name = "revoke all"

    async def act(self, place: Place) -> bool:
        try:
            return await super().act(place)
        except CallError as error:
            if error.code not in ENDED_CODES:
                raise
            self.last_error = "the operator's session has ended"
        self._token = await self.open_operator(self.client(place))
        return await super().act(place)

    def _params(self) -> dict[str, Any]:
        return {"all": True}


class Attach(Cell):
    """Attach a session of a device to another connection; then revoke it elsewhere."""

    name = "attach"

    async def prepare_more(self) -> None:
        for place in self.means.places:
            self.client(place).close()  # the probes attach it again
        self._operator = await self.persist(partial(self.open_operator, self.client()))

    async def act(self, place: Place) -> bool:
        client = Client(place, self.means.device)
        try:
            await client.attach(self.secret(0))
            await client.call("echo", {}, self.secret(0))
        finally:
            client.close()
        return True

    async def follow_up(self) -> None:
        client, params = self.client(self.others[0]), {"user": self.means.user.user}
        await self.persist(partial(self.end, client, self.ends, "server.revoke", params, self._operator))


class Run(Cell):
    """Send a request with an idempotency key, on all servers at once, and again."""

    name = "idempotent run"

    async def prepare_more(self) -> None:
        self.keys.append(f"run-{self.means.user.user}")

    async def act(self, place: Place) -> bool:
        outcomes = await asyncio.gather(*map(self._run, self.places(place)), return_exceptions=True)
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if not errors:
            return True
        unknown = [
            error
            for error in errors
            if (isinstance(error, CallError) and error.code is Code.UNKNOWN)
            or isinstance(error, ConnectionClosed)
        ]
        if self.is_over and self.means.loses_server and len(unknown) == len(errors):
            return True  # the server that ran it is gone: the outcome is not known, and it does not run again
        raise errors[0]

    async def _run(self, place: Place) -> None:
        (key,), within_s = self.keys, OUTCOME_S if self.is_over else ATTEMPT_S
        answer = await self.client(place).call(RUN, {"key": key}, self.secret(0), key=key, within_s=within_s)
        self.history.answered(key, answer, may_repeat=self.means.loses_writes or self.means.forgets)


OPERATIONS: Final[tuple[type[Cell], ...]] = (
    Open,
    Refresh,
    Touch,
    RevokeOne,
    RevokeFamily,
    RevokeUser,
    RevokeAll,
    Attach,
    Run,
)
