"""The page for people at `/`, and the figures that it shows, /status.json.

What this file decides: what a browser may do with the page, and which figures are for whom.

Rules:
- The page is open and holds no figure. Its script asks for them with the token that somebody types in: browsers
  send no `Authorization` when they are led to a page, so no other site can have figures fetched.
- Its policy names the hashes of its one style and its one script. Nothing else runs, nothing is loaded from
  elsewhere, no form is sent, and no text becomes markup (require-trusted-types-for).
- Figures are made when somebody asks, at most once in `FRESH_S` however many ask, and their size has a bound.
- What names users, peers or addresses is for operators: a session alone shows what metrics show.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Final

from zcproto.common.clock import Clock
from zcproto.http.messages import HTML, HttpResponse, json_response

FRESH_S: Final = 0.9
"""A little less than the second between two requests of a page, so that one that is alone gets new figures each
time."""

MOST_ALERTS: Final = 50
"""Alerts in the figures that are open, and as many that are over; the newest."""

MOST_NAMES: Final = 8
"""Names of one certificate."""

Figures = Callable[[], Mapping[str, Any]]
Readiness = Callable[[], tuple[bool, Mapping[str, Any]]]

_SHOWN: Final = (
    *("api", "version", "time", "started_at", "uptime_s", "draining", "connections", "sessions", "requests"),
    *("traffic", "handshakes", "store", "process"),
)
_OF_A_CERTIFICATE: Final = ("file", "source", "key_type", "not_after", "days_left", "seconds_left")
_OF_AN_ALERT: Final = ("kind", "severity", "began_at", "last_at", "ended_at", "count", "many")
_FOR_OPERATORS: Final = ("about", "title")


@cache
def page() -> HttpResponse:
    """The page, made of its files once."""
    folder = files("zcproto.admin") / "page"
    style, script, html = (
        (folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html")
    )
    body = html.replace("{style}", style).replace("{script}", script)
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
        " require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return HttpResponse(200, body.encode(), HTML, policy=policy)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


class StatusFigures:
    """The figures of one server as the page gets them. `figures` are all that there are."""

    def __init__(self, figures: Figures, readiness: Readiness, clock: Clock) -> None:
        self._figures = figures
        self._readiness = readiness
        self._clock = clock
        self._made_at = float("-inf")
        self._answers: dict[bool, HttpResponse] = {}

    def answer(self, operator: bool) -> HttpResponse:
        """The figures as JSON, for an operator or for anybody else with a session."""
        now = self._clock.now()
        if now - self._made_at >= FRESH_S:
            figures = self._figures()
            ready, body = self._readiness()
            self._answers = {
                rank: json_response(200, {"ready": ready, "reasons": body["reasons"], **shown(figures, rank)})
                for rank in (False, True)
            }
            self._made_at = now
        return self._answers[operator]


def shown(figures: Mapping[str, Any], operator: bool) -> dict[str, Any]:
    """Of all figures those for the page."""
    alerts = figures["alerts"]
    newest_open, more_open = _newest(alerts["open"], "began_at")
    newest_over, more_over = _newest(alerts["over"], "ended_at")
    keys = (*_OF_AN_ALERT, *_FOR_OPERATORS) if operator else _OF_AN_ALERT
    return {
        **{key: figures[key] for key in _SHOWN},
        "operator": operator,
        "certificates": [
            {
                **{key: one[key] for key in _OF_A_CERTIFICATE},
                "names": one["names"][:MOST_NAMES],
                "more_names": max(0, len(one["names"]) - MOST_NAMES),
            }
            for one in figures["certificates"]
        ],
        "alerts": {
            "open": [{key: alert[key] for key in keys} for alert in newest_open],
            "more_open": more_open,
            "over": [{key: alert[key] for key in keys} for alert in newest_over],
            "more_over": more_over,
        },
    }


def _newest(alerts: Sequence[Mapping[str, Any]], by: str) -> tuple[list[Mapping[str, Any]], int]:
    """The newest alerts, newest first, and how many there are beside them."""
    ordered = sorted(alerts, key=lambda alert: alert[by], reverse=True)
    return ordered[:MOST_ALERTS], max(0, len(ordered) - MOST_ALERTS)
