"""Record in the audit trail what a command changes itself: without a running server, or in files that need none.

Rules: the trail is opened before anything is changed, so that no change is left out of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from zcproto.cli import Instance
from zcproto.observe.log import audit_trail, get_logger

log = get_logger("zcproto.cli")


@contextmanager
def recorded(
    instance: Instance,
    what: str,
    *,
    user: str | None = None,
    device: str | None = None,
    machine: str | None = None,
    roles: Sequence[str] | None = None,
    ids: Sequence[str] | None = None,
    all: bool | None = None,
) -> Iterator[dict[str, Any]]:
    """Record an operation and its outcome. Yield a dict for the result, whose number of sessions is recorded.

    Raises ConfigError if the trail cannot be opened.
    """
    uid, pid = os.getuid(), os.getpid()
    result: dict[str, Any] = {}
    with audit_trail(instance.read_config().log):
        try:
            yield result
        except Exception as error:
            log.info(
                "command.failed",
                what=what,
                uid=uid,
                pid=pid,
                user=user,
                device=device,
                machine=machine,
                reason=error,
            )
            raise
        log.info(
            "command.done",
            what=what,
            uid=uid,
            pid=pid,
            user=result.get("user", user),
            device=device,
            machine=machine,
            roles=roles,
            ids=ids,
            all=all,
            sessions=result.get("sessions", result.get("revoked")),
        )


def about(operation: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `recorded` for an operation of the control API."""
    name = params.get("name")
    subject = {"device": name} if operation.startswith("devices/") else {"user": params.get("user", name)}
    return {**subject, **{key: params.get(key) for key in ("roles", "ids", "all")}}
