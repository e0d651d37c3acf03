"""Failures of processes, as messages to the supervisor."""

from __future__ import annotations

from typing import Any, Final

from zcproto.errors import CertificateError, ConfigError, LifespanError, ZcprotoError

MAX_FAULTS: Final = 20
MAX_FAULT: Final = 500
"""Characters of a fault of the configuration: with six bytes for each, all of them fit into a message."""


class ChildFailed(ZcprotoError):
    """A process of the server failed by an error of its own that has no message for the operator, or was ended."""


_ERRORS: Final = {"certificate": CertificateError, "lifespan": LifespanError, "process": ChildFailed}
"""Errors with one sentence for the operator, by the `kind` of the message `failed`."""


def failure_of(error: BaseException) -> dict[str, Any]:
    """Return the values of the message `failed`, of which `failure_from` makes the error again."""
    if isinstance(error, ConfigError):
        return {"kind": "config", "text": [fault[:MAX_FAULT] for fault in error.faults[:MAX_FAULTS]]}
    for kind, error_type in _ERRORS.items():
        if isinstance(error, error_type):
            return {"kind": kind, "text": [str(error)[:4000]]}
    return {"kind": "other", "text": [type(error).__name__]}


def failure_from(process: str, values: dict[str, Any]) -> ZcprotoError:
    """Return the error that a process has reported."""
    kind, text = values.get("kind"), values.get("text")
    lines = [str(each) for each in text] if isinstance(text, list) and text else ["(no text)"]
    if kind == "config":
        return ConfigError(lines)
    if kind in _ERRORS:
        return _ERRORS[kind](lines[0])
    return ChildFailed(
        f"the process {process} raised {lines[0]}; the log has the traceback under server.fault"
    )
