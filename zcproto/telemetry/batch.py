"""Sends spans, log records and metrics from threads of their own, in batches.

    put -> queue -> (thread) batch -> exporter

Rules:
- `put` never waits. What does not fit in the queue is dropped and counted.
- A batch that the exporter cannot deliver is given up and counted: the next ones would wait for it.
- The end waits for at most a given time.

Must not know: what is sent, and where.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY, attach, set_value
from opentelemetry.sdk._logs import LogRecordProcessor, ReadWriteLogRecord
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor

MAX_BATCH: Final = 256
"""Items of a batch: about five milliseconds of encoding, during which the event loop waits for the interpreter."""

T = TypeVar("T")


class Batches(Generic[T]):
    """Items that wait to be exported, and the thread that does. `export` returns whether they have arrived.

    `size` is the most of a batch; so many are exported at once.
    """

    def __init__(
        self,
        export: Callable[[Sequence[T]], bool],
        *,
        most: int,
        delay: float,
        name: str,
        size: int = MAX_BATCH,
    ) -> None:
        self._export = export
        self._size = size
        self._most = most
        self._delay = delay
        self._waiting: deque[T] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self.sent = 0
        self.failed = 0
        self.dropped = 0
        self._thread = threading.Thread(target=self._work, name=f"zcproto-{name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def put(self, item: T) -> None:
        """Queue an item, or drop it."""
        with self._changed:
            if self._is_closed or len(self._waiting) >= self._most:
                self.dropped += 1
                return
            self._waiting.append(item)
            if len(self._waiting) == self._size:
                self._changed.notify_all()

    def begin_close(self) -> None:
        """Take no more items, and export what waits at once."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def close(self, limit: float) -> int:
        """Wait for the export of what waits, at most `limit` seconds; return how many items are lost."""
        self.begin_close()
        self._thread.join(limit)
        with self._changed:
            lost = len(self._waiting)
            self._waiting.clear()
            self.dropped += lost
            return lost

    def _work(self) -> None:
        attach(set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))  # an exporter that is traced would never end
        while True:
            with self._changed:
                self._changed.wait_for(self._is_due, self._delay)
                batch = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
                if not batch and self._is_closed:
                    return
            if batch:
                self._send(batch)

    def _is_due(self) -> bool:
        return self._is_closed or len(self._waiting) >= self._size

    def _send(self, batch: Sequence[T]) -> None:
        try:
            has_arrived = self._export(batch)
        except Exception:  # an exporter may be any
            has_arrived = False
        if has_arrived:
            self.sent += len(batch)
        else:
            self.failed += len(batch)


class BatchedSpans(SpanProcessor):
    """Queues spans that have ended and are sampled."""

    def __init__(self, batches: Batches[ReadableSpan]) -> None:
        self._batches = batches

    def on_end(self, span: ReadableSpan) -> None:
        if span.context.trace_flags.sampled:
            self._batches.put(span)


class BatchedLogs(LogRecordProcessor):
    """Queues log records."""

    def __init__(self, batches: Batches[ReadWriteLogRecord]) -> None:
        self._batches = batches

    def on_emit(self, log_record: ReadWriteLogRecord) -> None:
        self._batches.put(log_record)

    def shutdown(self) -> None:
        """Do nothing: `Batches.close` has a limit."""

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Return True without waiting."""
        return True
