"""The HTTPS side of a running server: HSTS on everything, and what its metrics count."""

from __future__ import annotations

import base64
import re
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from bench.requirements.finding import Facts, Finding
from bench.requirements.homes import House, Response, Served, get, https
from bench.requirements.session_checks import code_of, opened
from zcproto.errors import ZcprotoError
from zcproto.load.caller import Place

MAX_AGE: Final = 31_536_000
HSTS: Final = "strict-transport-security"

REQUESTS: Final = {
    "a page": get("/"),
    "health": get("/healthz"),
    "HEAD": get("/healthz", method="HEAD"),
    "readiness": get("/readyz"),
    "discovery": get("/.well-known/zcp"),
    "nothing there": get("/nothing"),
    "no token": get("/metrics"),
    "a wrong token": get("/metrics", "Authorization: Bearer " + "A" * 43),
    "a wrong method": get("/healthz", method="DELETE"),
    "an unknown method": get("/healthz", method="BREW"),
    "no Host": b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n",
    "a bad header": get("/healthz", "bad header"),
    "no HTTP": b"\x00\x01\x02\x03\r\n\r\n",
    "another version": b"GET /healthz HTTP/3.7\r\nHost: localhost\r\n\r\n",
    "a header too large": get("/healthz", "X-Large: " + "a" * 100_000),
    "a path too long": get("/" + "a" * 100_000),
}
"""Requests that get every kind of response, by what they are."""


def hsts(served: Served) -> Finding:
    """Strict-Transport-Security, exactly once, in every response (RFC 6797 section 7.1)."""
    facts, statuses = Facts(), set()
    for what, request in REQUESTS.items():
        try:
            response = https(served, request)
        except (ZcprotoError, OSError) as error:
            facts.note(f"{what}: there is a response", False, error)
            continue
        statuses.add(response.status)
        values = response.all(HSTS)
        right = len(values) == 1 and max_age(values[0]) == MAX_AGE
        facts.note(f"{what} ({response.status})", right, values)
    errors = sorted(each for each in statuses if each >= 400)
    facts.note("errors of several kinds are among them", len(errors) >= 4, errors)
    return facts.finding(
        f"max-age={MAX_AGE} in {len(REQUESTS)} of {len(REQUESTS)} responses: 200, {', '.join(map(str, errors))}",
        values={"max_age_s": MAX_AGE, "responses": len(REQUESTS)},
    )


def max_age(value: str) -> int | None:
    """The directive's seconds; None if there is none."""
    found = re.search(r"(?:^|;)\s*max-age=\"?(\d+)\"?\s*(?:;|$)", value, re.IGNORECASE)
    return None if found is None else int(found[1])


def metrics(served: Served, house: House) -> Finding:
    """Whether handshakes and checks of tokens are counted: read, used, read again."""

    async def session(place: Place) -> str:
        caller = await place.caller()
        token: bytes = (await opened(caller, house.users[5]))["token"]
        await caller.leave()
        return base64.urlsafe_b64encode(token).rstrip(b"=").decode()

    async def use(place: Place) -> None:
        caller = await place.caller()
        for _ in range(3):
            await code_of(caller, "echo", {}, bytes(31) + b"\1")
        token = (await opened(caller, house.users[5]))["token"]
        await caller.call("echo", {}, token)
        await caller.call("session.close", {}, token)
        await caller.leave()

    text = served.talk(session)

    def read() -> dict[str, float]:
        response = https(served, get("/metrics", f"Authorization: Bearer {text}", "Accept: text/plain"))
        facts.equal("status of /metrics", response.status, 200)
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(_text_of(response)):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return sums

    facts = Facts()
    before = read()
    served.talk(use)
    after = read()
    wanted = {
        "zcproto_tls_handshakes_completed_total": 1.0,
        "zcproto_tokens_refused_total": 3.0,
        "zcproto_sessions_opened_total": 1.0,
        "zcproto_logins_total": 1.0,
    }
    for name, least in wanted.items():
        grown = after.get(name, 0.0) - before.get(name, 0.0)
        facts.note(f"{name} grows", grown >= least, f"by {grown:g}")
    for name in ("zcproto_tls_failures_total", "zcproto_requests_total"):
        facts.note(f"{name} is there", name in after)
    return facts.finding(f"{len(after)} series; handshakes, logins and token checks are counted",
                         values={"series": len(after)})  # fmt: skip


def _text_of(response: Response) -> str:
    """The body, whole, however its length was told."""
    body = response.body
    if "chunked" in response.all("transfer-encoding"):
        whole = b""
        while body:
            size, _, body = body.partition(b"\r\n")
            length = int(size.split(b";")[0], 16)
            whole, body = whole + body[:length], body[length + 2 :]
        body = whole
    return body.decode()
