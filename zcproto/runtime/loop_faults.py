"""Faults of ours that nobody caught, told in the log instead of by asyncio, which would quote what was at hand."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from zcproto.server.state import log

# What asyncio says before it shows a callback, with its arguments.
_PHRASE = re.compile(r"[A-Za-z][A-Za-z' ]*")


def tell(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An exception handler for a loop."""
    phrase = _PHRASE.match(str(context.get("message", "")))
    log.error("server.fault", what=phrase[0].strip() if phrase else None, exc_info=context.get("exception"))
