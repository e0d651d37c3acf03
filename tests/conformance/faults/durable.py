"""A fault for each scenario about durable streams."""

from __future__ import annotations

from typing import Final

from tests.conformance.faults.mutation import Fault, fault

_IS_ELSEWHERE: Final = "return not is_resumed_elsewhere(error)"
_PARAMS: Final = "params = None if resume.attaches else params or {}"
_ENDS: Final = "return isinstance(error, ConnectionClosed)"
_RECEIVED: Final = "run.position += 1"
_FORGETS: Final = ("Stream._receive", _RECEIVED, "pass")

DURABLE: Final[dict[str, Fault]] = {
    "durable-not-announced": fault(
        "opens durable streams whatever WELCOME announces",
        (
            "ClientConnection.open_stream",
            'if resume is not None and not announced.get("durable"):',
            "if False:",
        ),
    ),
    "durable-open": fault(
        "sends nil in place of an empty map",
        ("ClientConnection.open_stream", _PARAMS, "params = params or None"),
    ),
    "durable-open-is-repeated": fault(
        "attaches to a run that was never accepted",
        ("RunPosition.resume", "self.position, self.is_known)", "self.position, True)"),
    ),
    "durable-resume": fault(
        "starts a run that the application goes on with",
        ("SessionClient.resume", "is_known=True", "is_known=False"),
    ),
    "durable-after-a-loss": fault("does not count items", _FORGETS),
    "durable-after-accepted": fault(
        "attaches with params", ("ClientConnection.open_stream", _PARAMS, "params = params or {}")
    ),
    "durable-after-a-cut": fault(
        "reports errors that end only the attachment",
        ("is_interruption", 'error.details.get("detached") is True', "False"),
    ),
    "durable-after-a-drain": fault("does not count items", _FORGETS),
    "durable-stale-item": fault(
        "cancels a run of which an item is stale",
        ("ClientConnection._received_stale", "if left.resume is None:", "if True:"),
    ),
    "durable-resumed-elsewhere": fault(
        "resumes what was resumed elsewhere", ("is_interruption", _IS_ELSEWHERE, "return True")
    ),
    "durable-run-has-gone": fault(
        "attaches to a run that has gone",
        ("is_interruption", _ENDS, "return True or isinstance(error, ConnectionClosed)"),
    ),
    "durable-error-of-the-method": fault(
        "attaches to a run that has ended",
        ("is_interruption", _ENDS, "return True or isinstance(error, ConnectionClosed)"),
    ),
    "durable-leave": fault(
        "cancels a run that is left",
        (
            "ClientProtocol.abandon",
            "if isinstance(call, PendingStream) and call.stream.resume is not None:",
            "if False:",
        ),
    ),
    "durable-cancel": fault(
        "leaves a run that is cancelled",
        (
            "ClientProtocol.cancel_stream",
            "self.conversation.cancel(stream.number, self._clock.wall())",
            "self.conversation.detach(stream, self._clock.wall())",
        ),
    ),
    "durable-item-undecodable": fault(
        "does not leave a stream that it fails",
        (
            "Stream.receive",
            "self._middleware.end(error=error)\n            self.close()",
            "self._middleware.end(error=error)",
        ),
    ),
    "durable-taken": fault(
        "reports with the credit that is due alone",
        ("Stream._report_soon", "if self._report is None:", "if False:"),
    ),
    "durable-taken-again": fault(
        "reports before ACCEPTED, and not again",
        ("Stream._receive", "if pending.stream.is_accepted:", "if True:"),
    ),
}
