"""Sessions and frames at a running server: tokens, their end, their refresh, the cap, and replays."""

from __future__ import annotations

import asyncio
import base64
import re
import time
from typing import Any, Final

import msgpack

from bench.compare.client import HEADER, Connection
from bench.requirements.finding import Facts, Finding
from bench.requirements.homes import TIMEOUT, House, Served, get, https
from zcproto.errors import CallError, Code, ConnectionClosed
from zcproto.load.caller import Caller, Place
from zcproto.load.plan import Credential
from zcproto.sessions import TOKEN_SIZE
from zcproto.wire.frame import NO_TOKEN

DAY_MS: Final = 86_400_000
CLOCK_MS: Final = 10_000
"""By how much a moment may seem to be off, on a machine that is busy with others."""

CLIENT: Final = "zcproto-bench/1"
THIEF: Final = "thief/1"
SHORT_LIVES: Final = """
[sessions]
lifetime = "6s"
idle_timeout = "3s"
per_user = 2
when_full = "evict_oldest"
refresh = false
"""
"""For a server whose sessions end while one watches."""

LIFETIME_S, IDLE_S = 6.0, 3.0


async def opened(caller: Caller, who: Credential, client: str = CLIENT) -> dict[str, Any]:
    """What session.open answers. Raises CallError."""
    params = {"scheme": "api_key", "user": who.user, "key": who.key, "client": client}
    answer: dict[str, Any] = await caller.call("session.open", params)
    return answer


async def code_of(caller: Caller, method: str, params: dict[str, Any], token: bytes) -> Code | None:
    """The code that a call is refused with; None if it is answered."""
    try:
        await caller.call(method, params, token)
    except CallError as error:
        return Code(error.code)
    return None


def token_size(served: Served, house: House, count: int) -> Finding:
    """Tokens as they come, and as text by HTTPS."""

    async def collect(place: Place) -> list[bytes]:
        caller = await place.caller()
        tokens: list[bytes] = []
        while len(tokens) < count:
            who = house.users[len(tokens) % len(house.users)]
            answer = await opened(caller, who)
            tokens += [answer["token"], answer["refresh_token"]]
            await caller.call("session.close", {}, answer["token"])
        await caller.leave()
        return tokens

    async def one(place: Place) -> bytes:
        caller = await place.caller()
        token: bytes = (await opened(caller, house.users[0]))["token"]
        await caller.leave()
        return token

    facts, tokens = Facts(), served.talk(collect)
    facts.equal("sizes of tokens", {len(each) for each in tokens}, {TOKEN_SIZE})
    facts.equal("different ones", len(set(tokens)), len(tokens))
    bits = sum(int.from_bytes(each).bit_count() for each in tokens) / (len(tokens) * TOKEN_SIZE * 8)
    # Six standard deviations of a fair coin: once in 500 million runs.
    facts.note(
        "bits that are set", abs(bits - 0.5) < 3 / (len(tokens) * TOKEN_SIZE * 8) ** 0.5, f"{bits:.4f}"
    )
    live = served.talk(one)
    text = base64.urlsafe_b64encode(live).rstrip(b"=").decode()
    facts.note("43 characters of base64url", re.fullmatch(r"[A-Za-z0-9_-]{43}", text) is not None, len(text))
    taken = https(served, get("/metrics", f"Authorization: Bearer {text}"))
    facts.equal("the text is taken by HTTPS", taken.status, 200)
    padded = https(served, get("/metrics", f"Authorization: Bearer {text}="))
    facts.equal("with padding it is not", padded.status, 401)
    return facts.finding(
        f"{TOKEN_SIZE} bytes, 43 characters; {len(tokens)} of {len(tokens)} differ, {bits:.1%} of bits set",
        values={"token_bytes": TOKEN_SIZE, "bits_set_share": bits},
    )


def expiration(usual: Served, house: House, short: Served, short_house: House) -> Finding:
    """The lifetime by default, and sessions that end by their age and for want of use."""

    async def lifetime(place: Place) -> float:
        caller = await place.caller()
        answer = await opened(caller, house.users[1])
        await caller.leave()
        return float(answer["expires_at"] - time.time() * 1000)

    async def ends(place: Place) -> tuple[Code | None, Code | None, float, Code | None]:
        caller = await place.caller()
        idle, used = [(await opened(caller, who))["token"] for who in short_house.users[:2]]
        born = time.monotonic()
        at_once = await code_of(caller, "echo", {}, used)
        while time.monotonic() < born + LIFETIME_S - IDLE_S / 4:
            await asyncio.sleep(IDLE_S / 8)
            await code_of(caller, "echo", {}, used)
        unused = await code_of(caller, "echo", {}, idle)
        while (aged := await code_of(caller, "echo", {}, used)) is None:
            if time.monotonic() > born + LIFETIME_S + CLOCK_MS / 1000:
                break
            await asyncio.sleep(IDLE_S / 20)
        seconds = time.monotonic() - born
        await caller.leave()
        return at_once, unused, seconds, aged

    facts, left = Facts(), usual.talk(lifetime)
    facts.note("24 hours by default", abs(left - DAY_MS) < CLOCK_MS, f"{left / DAY_MS * 24:.3f} h")
    at_once, unused, seconds, aged = short.talk(ends)
    facts.equal("a new one is good", at_once, None)
    facts.equal(f"unused for more than {IDLE_S:g} s", unused, Code.TOKEN_EXPIRED)
    facts.equal(f"used all the time, after {LIFETIME_S:g} s", aged, Code.TOKEN_EXPIRED)
    facts.note("not before", seconds > LIFETIME_S - 0.2, f"{seconds:.2f} s")
    return facts.finding(
        f"{left / DAY_MS * 24:.1f} h; set to {LIFETIME_S:g} s it ends after {seconds:.1f} s, idle ones before",
        values={"lifetime_h": left / DAY_MS * 24, "ended_after_s": seconds},
    )


def refresh(usual: Served, house: House, short: Served, short_house: House) -> Finding:
    """Refresh tokens: separate, good once, and deadly to the session when used by another."""

    async def rotate(place: Place) -> None:
        caller = await place.caller()
        first = await opened(caller, house.users[2])
        facts.note("it is another token", first["refresh_token"] not in (None, first["token"]))
        if first["refresh_token"] is None:
            await caller.leave()
            return
        facts.equal(
            "it is no session token", await code_of(caller, "echo", {}, first["refresh_token"]),
            Code.UNAUTHENTICATED,
        )  # fmt: skip
        again = {"refresh_token": first["refresh_token"], "client": CLIENT}
        second = await caller.call("session.refresh", again, NO_TOKEN)
        facts.note("both tokens are new", len({first["token"], first["refresh_token"], second["token"],
                                               second["refresh_token"]}) == 4)  # fmt: skip
        facts.equal("the session is the same", second["id"], first["id"])
        facts.equal("the old token", await code_of(caller, "echo", {}, first["token"]), Code.TOKEN_REVOKED)
        facts.equal("the new token is good", await code_of(caller, "echo", {}, second["token"]), None)
        stolen = {"refresh_token": first["refresh_token"], "client": THIEF}
        spent = await code_of(caller, "session.refresh", stolen, NO_TOKEN)
        facts.note("the spent one is refused", spent is not None)
        facts.equal(
            "then the whole family", await code_of(caller, "echo", {}, second["token"]), Code.TOKEN_REVOKED
        )
        last = {"refresh_token": second["refresh_token"], "client": CLIENT}
        dead = await code_of(caller, "session.refresh", last, NO_TOKEN)
        facts.note("and its refresh token is dead, too", dead is not None)
        await caller.leave()

    async def without(place: Place) -> object:
        caller = await place.caller()
        answer = await opened(caller, short_house.users[0])
        await caller.leave()
        return answer["refresh_token"]

    facts = Facts()
    usual.talk(rotate)
    facts.equal("switched off, there is none", short.talk(without), None)
    return facts.finding("rotates; a second use ends the session")


def per_user(usual: Served, house: House, short: Served, short_house: House) -> Finding:
    """The cap on sessions of a user, refusing by default, evicting where configured."""

    async def fill(place: Place) -> tuple[int, dict[str, Any]]:
        caller = await place.caller()
        count = 0
        try:
            while count < 100:
                await opened(caller, house.users[3])
                count += 1
        except CallError as error:
            facts.equal("one more is refused", error.code, Code.RESOURCE_EXHAUSTED)
            return count, dict(error.details)
        finally:
            await caller.leave()
        return count, {}

    async def evict(place: Place) -> list[Code | None]:
        caller = await place.caller()
        tokens = [(await opened(caller, short_house.users[1]))["token"] for _ in range(3)]
        codes = [await code_of(caller, "echo", {}, token) for token in tokens]
        await caller.leave()
        return codes

    facts = Facts()
    count, details = usual.talk(fill)
    facts.equal("sessions by default", count, 5)
    facts.equal("it is told the limit", details, {"limit": 5})
    facts.equal("set to 2 and to evict", short.talk(evict), [Code.SESSION_REPLACED, None, None])
    return facts.finding(f"{count}, then refused; or the oldest is evicted", values={"sessions": count})


def replays(served: Served, house: House) -> Finding:
    """Frames sent twice, taken from elsewhere, and out of time."""
    facts = Facts()
    who = house.users[4]

    def fresh() -> Connection:
        return Connection(served.port, served.context(), TIMEOUT)

    def session() -> Connection:
        connection = fresh()
        connection.open_session(who.user, who.key)
        return connection

    def answer(connection: Connection, *frames: bytes) -> tuple[int, int, Any]:
        connection.send(list(frames))
        for _ in frames:
            kind, stream, _, body = connection.receive()
        return kind, stream, body

    owner = session()
    frame = owner.frame("echo", {})
    facts.note("a frame is good once", answer(owner, frame)[0] == 3)
    facts.equal("the same frame again", _fatal(owner, frame), Code.REPLAYED)
    # A frame that its server never saw: taken on the way, brought on another connection, token and all.
    owner, other = session(), fresh()
    taken = owner.frame("echo", {})
    facts.equal("a frame of another connection", _fatal(other, taken), Code.REPLAYED)
    owner.close()
    for what, off_ms in (("a minute late", -60_000), ("a minute early", 60_000)):
        owner = session()
        frame = _with_time(owner.frame("echo", {}), off_ms)
        facts.equal(f"a frame {what}", _code(answer(owner, frame)[2]), Code.STALE_TIMESTAMP)
        facts.note("the next one is good", answer(owner, owner.frame("echo", {}))[0] == 3)
        owner.close()
    owner = session()
    first, second = owner.frame("echo", {}), owner.frame("echo", {})
    facts.equal("frames in another order", _fatal(owner, second, first), Code.REPLAYED)
    return facts.finding("twice, reordered or from elsewhere: 66; out of time: 67")


def _fatal(connection: Connection, *frames: bytes) -> Code | None:
    """Send these; the code on stream 0 that the connection is ended with, after answers to some."""
    connection.send(list(frames))
    try:
        for _ in range(len(frames) + 1):
            kind, stream, _, body = connection.receive()
            if kind == 4 and stream == 0:
                return _code(body)
    except ConnectionClosed:
        return None
    finally:
        connection.close()
    return None


def _code(body: bytes) -> Code | None:

    value = msgpack.unpackb(body)
    return Code(value[0]) if isinstance(value, list) else None


def _with_time(frame: bytes, off_ms: int) -> bytes:
    """The frame with a timestamp that is off by so much."""
    fields = list(HEADER.unpack_from(frame))
    fields[5] += off_ms
    return HEADER.pack(*fields) + frame[HEADER.size :]
