"""Count the items of one direction of a stream against its credit (sans-IO, both ends; zcp1.md, section 18.5).

    SendCredit   the sender's half: may an item be sent?
    ItemQueue    the receiver's half: was an item allowed, which items wait, when to grant more?

Rules:
- Credit is absolute: items and bytes since OPEN. An item may exceed the bytes that are left, and is then the last.
- The receiver grants for what the application has taken, never for what it has only stored.
- A receiver that holds nothing has granted at least one item and one byte more than it has received.

It must not know: frames, tokens, which end it serves.
"""

from __future__ import annotations

from collections import deque

from zcproto.errors import Code, ProtocolError
from zcproto.wire.frame import MIN_LENGTH
from zcproto.wire.message import Credit, MessageError, decode_credit


def read_credit(body: bytes) -> tuple[int, ...]:
    """Return the two or three numbers of a CREDIT. Raises ProtocolError."""
    try:
        return decode_credit(body)
    except MessageError as error:
        raise ProtocolError(Code.PROTOCOL_ERROR, "CREDIT cannot be read") from error


class SendCredit:
    """What the peer allows to send, and what was sent: totals since OPEN."""

    __slots__ = ("bytes", "items", "raised", "sent_bytes", "sent_items")

    def __init__(self, credit: Credit) -> None:
        self.items, self.bytes = credit
        self.sent_items = 0
        self.sent_bytes = 0
        self.raised = 0  # how often

    @property
    def may_send(self) -> bool:
        return self.sent_items < self.items and self.sent_bytes < self.bytes

    def count(self, length: int) -> None:
        """Count an item that is sent."""
        self.sent_items += 1
        self.sent_bytes += length

    def read(self, body: bytes) -> bool:
        """Apply a CREDIT of two numbers. Return and raise as `grow`; also ProtocolError if it is malformed."""
        items, size, *taken = read_credit(body)
        if taken:
            raise ProtocolError(Code.PROTOCOL_ERROR, "CREDIT of three numbers on a stream without ACCEPTED")
        return self.grow(items, size)

    def grow(self, items: int, size: int) -> bool:
        """Apply new totals. Raises ProtocolError if they are lower than before.

        Return False if the peer did not need to send them: they raise nothing, or there were more than items.
        """
        if items < self.items or size < self.bytes:
            raise ProtocolError(Code.PROTOCOL_ERROR, "credit is lower than before")
        is_needed = (items > self.items or size > self.bytes) and self.raised <= self.sent_items
        self.items, self.bytes = items, size
        self.raised += 1
        return is_needed


class ItemQueue:
    """The items that a peer has sent and the application has not taken.

    `window` is how many items and bytes to grant beyond what was taken, at least 1 of each; its owner may lower it.
    `has_ended`: the peer sends no more. Nothing is granted until `next_grant` is first called.
    """

    __slots__ = ("_bodies", "_granted", "_received", "_taken", "has_ended", "window")

    def __init__(self, window: Credit, granted: Credit = (0, 0)) -> None:
        self.window = window
        self.has_ended = False
        self._granted = granted
        self._received = (0, 0)
        self._taken = (0, 0)
        self._bodies: deque[bytes] = deque()

    @property
    def held(self) -> int:
        """The number of items that wait."""
        return len(self._bodies)

    @property
    def held_bytes(self) -> int:
        return self._received[1] - self._taken[1]

    @property
    def promised_bytes(self) -> int:
        """The bytes that the peer may send, or has sent, and that were not taken."""
        return self.held_bytes if self.has_ended else max(self.held_bytes, self._granted[1] - self._taken[1])

    @property
    def granted(self) -> Credit:
        return self._granted

    @property
    def taken(self) -> int:
        """The number of items taken: the number of the next one."""
        return self._taken[0]

    @property
    def still_allowed(self) -> int:
        """How many items the peer may have sent that have not arrived; each counts 64 bytes or more."""
        items = self._granted[0] - self._received[0]
        size = self._granted[1] - self._received[1]
        return 0 if self.has_ended or size <= 0 else min(items, -(-size // MIN_LENGTH))

    def receive(self, body: bytes) -> None:
        """Add an item. Raises ProtocolError if the credit did not allow it, or the peer had ended its items."""
        if self.has_ended:
            raise ProtocolError(Code.PROTOCOL_ERROR, "ITEM after END")
        items, size = self._received
        if items >= self._granted[0] or size >= self._granted[1]:
            raise ProtocolError(Code.PROTOCOL_ERROR, "ITEM beyond the credit")
        self._received = items + 1, size + MIN_LENGTH + len(body)
        self._bodies.append(body)

    def end(self) -> None:
        """Record that the peer sends no more. Raises ProtocolError the second time."""
        if self.has_ended:
            raise ProtocolError(Code.PROTOCOL_ERROR, "END after END")
        self.has_ended = True

    def take(self) -> bytes:
        """Return the body of the oldest item. Raises IndexError if none waits."""
        body = self._bodies.popleft()
        items, size = self._taken
        self._taken = items + 1, size + MIN_LENGTH + len(body)
        return body

    def next_grant(self) -> Credit | None:
        """Return the credit to send, or None until half of the window is used.

        A peer without credit whose items were all taken has used all of it: there is no deadlock.
        """
        if self.has_ended:
            return None
        items, size = self._granted
        window_items, window_bytes = self.window
        more_items = self._taken[0] + window_items - items
        more_bytes = self._taken[1] + window_bytes - size
        if more_items * 2 < window_items and more_bytes * 2 < window_bytes:
            return None
        self._granted = items + max(more_items, 0), size + max(more_bytes, 0)
        return self._granted

    def clear(self) -> None:
        """Discard what waits."""
        self._bodies.clear()
        self._taken = self._received
