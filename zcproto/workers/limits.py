"""Limits over the workers of a server.

    connections, requests, logins: SharedMemory, counted together without a message
    memory of what waits:          share_of, a part for each worker

    shared memory: a column per worker, which it alone writes; sums are read over all columns
    column: counts | events, two windows | failed logins, two windows

Decides: what is admitted under a limit that holds for all workers together.

What a peer may do is counted together: connections, requests, logins. A share would refuse a user whose one
connection is in one worker at a fraction of the limit. A count is never below the truth and costs microseconds, and
a peer gains nothing by having all of its connections in one worker. Failed logins are counted here too; the
coordinator decides how long each has to wait (throttle.py).

Memory is divided. Beyond a bound of memory something is dropped, and a worker can only drop what it holds itself.
Under a common bound it would drop what honest clients sent while an attacker fills another worker; if it spared
them, all workers could hold twice the bound. A share is exact, and a client that fills it harms one worker.

Work in one event loop (`tls.max_handshakes`, `limits.threads`, ...) is limited in each worker.

Rules of counting:
- A key is counted at DEPTH places of a table, which it may share with other keys; its count is the least of them.
  That is never less than the truth. It is more if other keys share all places, which is unlikely and which no peer
  can bring about: the places depend on a secret.
- To be admitted, a worker counts first and then reads the sum, so that racing workers never exceed a limit. Those
  that see each other's attempts try again a few times: one of them may be refused although a place was left.
- A rate is that of a sliding window: all of this window and the part of the one before that is not yet over. A
  worker clears its part of a window before it writes to a new one; others ignore it until then.
- The memory is bounded by the configuration, whatever peers do.
- The column of a worker that has ended is cleared by the process that started it.

It must not know: processes, how the memory is shared, what is counted, the clock. `now` is monotonic seconds, which
all processes of a machine have in common.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import blake2b
from math import ceil
from struct import unpack
from typing import Any, Final

from zcproto.common.counts import Counting, Counts
from zcproto.common.rates import BURST_S, EventRate
from zcproto.config.model import Config

DEPTH: Final = 4
KEYS: Final = 3
"""Places of a table per connection: with a key for each connection, one key in 200 is counted once too often."""

MIN_ROWS: Final = 4_096
EVENT_ROWS: Final = 8_192
CACHED_KEYS: Final = 4_096
TRIES: Final = 4
"""Attempts at the last place of a limit, which other workers try to take too."""

CELL: Final = 4
"""Bytes of a count."""

Places = tuple[int, ...]


class SharedMemory:
    """The counts of all workers. `rows_for` connections and `workers` columns; `secret` places the keys."""

    def __init__(self, memory: Any, workers: int, connections: int, secret: bytes) -> None:
        self.workers = workers
        self._secret = secret
        self._cells = memoryview(memory).cast("B").cast("i")
        rows = rows_for(connections)
        self._counts = _Table(0, rows)
        self._events = _Table(self._counts.end, EVENT_ROWS, windows=2)
        self._failures = _Table(self._events.end, EVENT_ROWS, windows=2)
        self._stride = self._failures.end
        assert len(self._cells) == self._stride * workers, "the memory has the size of `memory_size`"

    def worker(self, number: int) -> WorkerCounting:
        """Return what worker `number`, from 0, counts with."""
        return WorkerCounting(self, number)

    def clear(self, number: int) -> None:
        """Forget the counts of a worker that has ended."""
        begin = number * self._stride
        self._cells[begin : begin + self._stride] = array("i", bytes(CELL * self._stride))

    def counts(self, name: str, number: int) -> SharedCounts:
        return SharedCounts(
            self._cells, number * self._stride, self._stride, self._places(name, self._counts)
        )

    def events(self, name: str, number: int, seconds: float) -> SharedWindow:
        return self._window(name, number, seconds, self._events)

    def failures(self, name: str, number: int, seconds: float) -> SharedWindow:
        return self._window(name, number, seconds, self._failures)

    def _window(self, name: str, number: int, seconds: float, table: _Table) -> SharedWindow:
        places = self._places(name, table)
        return SharedWindow(self._cells, number * self._stride, self._stride, table, places, seconds)

    def _places(self, name: str, table: _Table) -> Callable[[str], Places]:
        secret, begin, rows = self._secret, table.begin, table.rows

        @lru_cache(CACHED_KEYS)
        def places(key: str) -> Places:
            text = f"{name}\0{key}".encode("utf-8", "surrogatepass")
            found = unpack(f"={DEPTH}I", blake2b(text, key=secret, digest_size=CELL * DEPTH).digest())
            return tuple(begin + depth * rows + each % rows for depth, each in enumerate(found))

        return places


def memory_size(workers: int, connections: int) -> int:
    """Return the bytes of memory for so many workers, and connections of all of them."""
    events = 2 * (1 + DEPTH * EVENT_ROWS)
    return CELL * workers * (DEPTH * rows_for(connections) + 2 * events)


def rows_for(connections: int) -> int:
    """Return the places of each of the DEPTH tables of counts: a power of two."""
    return max(1 << (KEYS * connections - 1).bit_length(), MIN_ROWS)


class _Table:
    """The place of one kind of counts in each column. A window has a number before its counts."""

    __slots__ = ("begin", "end", "rows", "size")

    def __init__(self, begin: int, rows: int, windows: int = 0) -> None:
        self.rows = rows
        self.size = DEPTH * rows + bool(windows)
        self.begin = begin + bool(windows)
        self.end = begin + self.size * (windows or 1)


class SharedCounts(Counts):
    """Counts of one worker among others: its own as exact numbers, those of all by the table."""

    __slots__ = ("_cells", "_column", "_places", "_stride")

    def __init__(self, cells: memoryview, column: int, stride: int, places: Callable[[str], Places]) -> None:
        super().__init__()
        self._cells = cells
        self._column = column
        self._stride = stride
        self._places = places

    def __getitem__(self, key: str) -> int:
        cells, stride = self._cells, self._stride
        return min([sum(cells[place::stride].tolist()) for place in self._places(key)])

    @property
    def most(self) -> int:
        """The count, over all workers, of the key with most in this one."""
        own = self._own
        return self[max(own, key=own.__getitem__)] if own else 0

    def surplus(self, key: str) -> int:
        workers = len(self._cells) // self._stride
        return self._own.get(key, 0) - ceil(self[key] / workers)

    def add(self, key: str, limit: int = 0) -> bool:
        self._change(key, 1)
        if limit:
            for _ in range(TRIES):
                if self._is_at_most(key, limit):
                    break
                self._change(key, -1)
                if self[key] >= limit:  # not only by attempts of others at the same moment
                    return False
                self._change(key, 1)
            else:
                self._change(key, -1)
                return False
        return super().add(key)

    def remove(self, key: str) -> None:
        super().remove(key)
        self._change(key, -1)

    def _is_at_most(self, key: str, count: int) -> bool:
        cells, stride = self._cells, self._stride
        for place in self._places(key):  # noqa: SIM110 - a generator costs as much as the sums
            if sum(cells[place::stride].tolist()) <= count:
                return True
        return False

    def _change(self, key: str, by: int) -> None:
        cells, column = self._cells, self._column
        for place in self._places(key):
            cells[column + place] += by


class SharedWindow:
    """Events of all workers in a sliding window of some seconds, by key."""

    __slots__ = ("_cells", "_column", "_places", "_size", "_stride", "_table", "seconds")

    def __init__(
        self,
        cells: memoryview,
        column: int,
        stride: int,
        table: _Table,
        places: Callable[[str], Places],
        seconds: float,
    ) -> None:
        self._cells = cells
        self._column = column
        self._stride = stride
        self._table = table
        self._size = table.size
        self._places = places
        self.seconds = seconds

    def add(self, key: str, count: int, now: float) -> None:
        """Count events of this worker."""
        window = int(now // self.seconds)
        cells, offset = self._cells, self._column + window % 2 * self._size
        head = offset + self._table.begin - 1
        if cells[head] != window:
            cells[head + 1 : head + self._size] = array("i", bytes(CELL * (self._size - 1)))
            cells[head] = window
        for place in self._places(key):
            cells[offset + place] += count

    def is_at_most(self, key: str, count: float) -> bool:
        """Return True if a key has at most so many events for certain: the usual case, at less cost."""
        cells, stride, other = self._cells, self._stride, self._size
        for place in self._places(key):  # windows that are over count too
            if sum(cells[place::stride].tolist()) + sum(cells[place + other :: stride].tolist()) <= count:
                return True
        return False

    def count(self, key: str, now: float, *, is_whole: bool = False) -> float:
        """Return the events of a key in the last seconds; `is_whole`: in both windows, without a fraction."""
        if self.is_at_most(key, 0):
            return 0.0
        window, part = divmod(now, self.seconds)
        weight = 1.0 if is_whole else 1 - part / self.seconds
        places = self._places(key)
        now_sums, then_sums = self._sums(places, int(window)), self._sums(places, int(window) - 1)
        return min([one + weight * other for one, other in zip(now_sums, then_sums, strict=True)])

    def _sums(self, places: Places, window: int) -> Sequence[int]:
        """Return the sums of a window at some places, over the workers that have written in it."""
        cells, stride, offset = self._cells, self._stride, window % 2 * self._size
        heads = cells[offset + self._table.begin - 1 :: stride].tolist()
        columns = [cells[offset + place :: stride].tolist() for place in places]
        if heads.count(window) == len(heads):
            return [sum(column) for column in columns]
        return [
            sum([count for head, count in zip(heads, column, strict=True) if head == window])
            for column in columns
        ]


class SharedRate(EventRate[str]):
    """A rate that all workers count together."""

    __slots__ = ("_window",)

    def __init__(self, window: SharedWindow, per_second: int) -> None:
        super().__init__(per_second)
        self._window = window

    def __contains__(self, key: str) -> bool:
        return self.per_second > 0

    def admit(self, key: str, now: float) -> int:
        if not self.per_second:
            return 0
        most = max(BURST_S * self.per_second, 1) - 1
        if not self._window.is_at_most(key, most):
            excess = self._window.count(key, now) - most
            if excess > 0:
                return max(ceil(excess * self._step * 1000), 1)
        self._window.add(key, 1, now)
        return 0

    def charge(self, key: str, cost: int, now: float) -> None:
        if self.per_second:
            self._window.add(key, cost, now)

    def left(self, key: str, now: float) -> float:
        return max(BURST_S * self.per_second - self._window.count(key, now), 0.0)


class WorkerCounting(Counting):
    """Makes the counts of one worker."""

    def __init__(self, memory: SharedMemory, number: int) -> None:
        self._memory = memory
        self._number = number

    def counts(self, name: str) -> SharedCounts:
        return self._memory.counts(name, self._number)

    def rate(self, name: str, per_second: int = 0) -> SharedRate:
        return SharedRate(self._memory.events(name, self._number, BURST_S), per_second)

    def failures(self, name: str, seconds: float) -> SharedWindow:
        """Return the counts of failed logins, which are remembered for at least `seconds`."""
        return self._memory.failures(name, self._number, seconds)


# --- memory --------------------------------------------------------------------------------------------------

LEAST_PENDING: Final = 256
"""Pending connections of a worker: several batches of accepts, or clients that are not slow displace each other."""

LEAST_STREAM_BYTES: Final = 1_048_576
LEAST_PARTIAL_BYTES: Final = 65_536


def share_of(config: Config, workers: int) -> Config:
    """Return the configuration of each of so many workers, each of which can serve its clients fairly."""
    tls, limits, streams = config.tls, config.limits, config.streams
    partial = _share(limits.partial_frame_bytes, workers, LEAST_PARTIAL_BYTES)
    return config.model_copy(
        update={
            "tls": tls.model_copy(
                update={"max_pending": _share(tls.max_pending, workers, LEAST_PENDING)},
            ),
            "limits": limits.model_copy(
                update={
                    "partial_frame_bytes": partial,
                    "partial_frame_bytes_per_user": min(limits.partial_frame_bytes_per_user, partial),
                },
            ),
            "streams": streams.model_copy(
                update={"memory_bytes": _share(streams.memory_bytes, workers, LEAST_STREAM_BYTES)},
            ),
        }
    )


def _share(limit: int, workers: int, least: int) -> int:
    return max(-(-limit // workers), min(limit, least))
