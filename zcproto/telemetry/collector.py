"""The HTTP side of an exporter: a session of requests with limits on what a collector may answer.

Rules:
- An answer is read up to a size and for the time of a request, and dropped: exporters use its status and header.
- A redirect is a failure. It would carry the data, and headers with a secret, to another server.

Must not know: what is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final

import requests

from zcproto.common.clock import system_clock

MAX_ANSWER: Final = 65_536
"""Bytes of an answer. One that reports a partial success has a few hundred."""

_PART: Final = 8_192


class CollectorSession(requests.Session):
    """Connections to a collector."""

    def __init__(self, now: Callable[[], float] = system_clock.now) -> None:
        super().__init__()
        self._now = now

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """Send a request and read its answer. Raises RequestException."""
        response = super().send(request, **{**options, "stream": True, "allow_redirects": False})
        try:
            if HTTPStatus.MULTIPLE_CHOICES <= response.status_code < HTTPStatus.BAD_REQUEST:
                raise requests.TooManyRedirects(
                    "the collector redirects; set telemetry.endpoint to its address"
                )
            self._drop_body(response.raw, options.get("timeout"))
        except BaseException:
            response.close()
            raise
        return response

    def _drop_body(self, raw: Any, limit: float | None) -> None:
        """Read a body as it was sent, so that its connection can be used again. Nothing is decompressed."""
        until = None if limit is None else self._now() + limit
        read = getattr(raw, "read1", raw.read)  # `read` of older versions waits for a full part
        left = MAX_ANSWER
        while data := read(_PART, decode_content=False):
            left -= len(data)
            if left < 0 or (until is not None and self._now() > until):
                raise requests.RequestException("the answer of the collector is too long or takes too long")
