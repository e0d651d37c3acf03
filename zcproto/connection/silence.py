"""Whether a server is silent while requests wait for it (zcp1.md, section 6.6).

Decides: when a PING is sent to find out, and how long its answer may take.
"""

from __future__ import annotations

from typing import Final

from zcproto.connection.events import NEVER

PING_AFTER: Final = 5.0
"""Seconds without a byte after which a PING is sent, while requests are in flight."""

PING_AFTER_TIMEOUT: Final = 1.0
"""The same when a call has timed out."""

ANSWER_WITHIN: Final = 2.0
"""Seconds from that PING until the connection is silent."""

BYTES_PER_SECOND: Final = 65_536
"""Another second is allowed for so many bytes sent since the last one arrived: a slow link takes its time."""


class SentPing:
    """A PING behind the bytes of a connection up to number `end`, of which the transport had sent `taken`."""

    __slots__ = ("_end", "_taken")

    def __init__(self, end: int, taken: int) -> None:
        self._end = end
        self._taken = taken

    def has_advanced(self, taken: int) -> bool:
        """Return whether the transport has sent bytes before the PING since the last call."""
        before, self._taken = self._taken, max(self._taken, min(taken, self._end))
        return self._taken > before


NO_PING: Final = SentPing(0, 0)


class Silence:
    """The PING of one connection whose answer is awaited.

    `check_at` is when to check next, and `asked_at` when the last PING was sent, in monotonic seconds. `is_late` is
    whether its answer was late at the last check. `heard_at` and `sent` in the arguments are the time of the last
    byte received and the count of bytes sent.
    """

    __slots__ = (
        "_answer_by",
        "_heard_at",
        "_ping",
        "_probed_at",
        "_sent_before",
        "asked_at",
        "check_at",
        "is_late",
    )

    def __init__(self, heard_at: float, sent: int) -> None:
        self.check_at = NEVER
        self.asked_at = -NEVER
        self._probed_at = NEVER  # the last byte before the PING that waits for an answer
        self._answer_by = NEVER
        self._ping = NO_PING
        self.is_late = False
        self._heard_at, self._sent_before = heard_at, sent

    def note_sending(self, heard_at: float, sent: int) -> None:
        """Note the bytes sent before the next ones."""
        if heard_at != self._heard_at:
            self._heard_at, self._sent_before = heard_at, sent

    def is_silent(self, heard_at: float) -> bool:
        """Return whether no byte has arrived since a PING whose answer is late."""
        return self.is_late and heard_at == self._probed_at

    def check(
        self, now: float, heard_at: float, sent: int, unsent: int, *, waits: bool, after: float = PING_AFTER
    ) -> bool:
        """Return whether to send a PING.

        Args:
            unsent: bytes that wait in the transport. While it sends those before a PING, the answer is not late.
            waits: whether requests are in flight.
            after: seconds without a byte after which a PING is sent.
        """
        if self._probed_at not in (NEVER, heard_at):
            self._probed_at, self.is_late = NEVER, False  # answered
        if self._probed_at != NEVER:
            if self._ping.has_advanced(sent - unsent):
                self._answer_by = now + self._allowed(sent)
            self.is_late = now >= self._answer_by
            self.check_at = now + ANSWER_WITHIN if self.is_late else self._answer_by
            return False
        if not waits:
            self.check_at = NEVER
            return False
        if now < heard_at + after:
            self.check_at = heard_at + PING_AFTER
            return False
        self._probed_at, self.asked_at = heard_at, now
        self._ping = SentPing(sent, sent - unsent)
        self.check_at = self._answer_by = now + self._allowed(sent)
        return True

    def _allowed(self, sent: int) -> float:
        return ANSWER_WITHIN + (sent - self._sent_before) / BYTES_PER_SECOND
