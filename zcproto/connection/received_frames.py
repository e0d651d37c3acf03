"""Decode the frames of a client outside the fast paths of `ServerConnection`.

Most clients send only usual frames: their connections need no decoder, nor what is kept here of frames that are
incomplete or stale.
"""

from __future__ import annotations

from typing import Final

from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import Accepted, Side

# Smaller incomplete frames are part of the cost of a connection; a report for each read would cost a tenth of it.
REPORTED_FROM: Final = 4_096
REPORTED_STEP: Final = 65_536


class ReceivedFrames(FrameDecoder):
    """The frames of one client.

    `header_at` is when the header of an incomplete frame arrived: wall time and monotonic time. `reported` are the
    bytes of that frame that were reported to the edge.
    """

    __slots__ = ("header_at", "reported", "stale_in_a_row")

    def __init__(self, limit: int, accepted: Accepted) -> None:
        super().__init__(Side.SERVER, limit)
        self.accepted = accepted
        self.header_at: tuple[int, float] | None = None
        self.reported = 0
        self.stale_in_a_row = 0

    def report(self) -> int:
        """Return what the incomplete frame holds, in whole steps, and at most its size."""
        buffered = self.buffered
        in_steps = -(-buffered // REPORTED_STEP) * REPORTED_STEP
        self.reported = min(in_steps, self.expected) if buffered >= REPORTED_FROM else 0
        return self.reported
