"""A disk that fails or hangs as a test requires."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Any

WRITES = ("INSERT", "UPDATE", "DELETE", "COMMIT", "WITH")


class Disk:
    """Makes SQLite connections with faults, by `connect`."""

    def __init__(self) -> None:
        self.error: tuple[int, str] | None = None
        """The code and the name of the error of every write."""
        self.times = 1_000_000
        """How many more writes fail."""
        self.at: tuple[str, ...] = WRITES
        """The beginnings of the statements that fail, hang or are slow."""
        self.delay_s = 0.0
        self.before: Callable[[sqlite3.Connection], object] | None = None
        """Called once in the thread of the store, before its next statement."""
        self.go_on = threading.Event()
        self.go_on.set()
        self.reached = threading.Event()
        """Set when a statement hangs."""
        self.statements: list[str] = []
        self.connections = 0

    def connect(self, *arguments: Any, **options: Any) -> sqlite3.Connection:
        self.connections += 1
        db = sqlite3.connect(*arguments, factory=_Connection, **options)
        assert isinstance(db, _Connection)
        db.disk = self
        return db

    def fail(self, code: int, name: str, *, times: int = 1_000_000, at: tuple[str, ...] = WRITES) -> None:
        self.error, self.times, self.at = (code, name), times, at

    def mend(self) -> None:
        self.error = None

    def hang(self, at: tuple[str, ...] = WRITES) -> None:
        self.at = at
        self.reached.clear()
        self.go_on.clear()

    def meet(self, db: sqlite3.Connection, statement: str) -> None:
        self.statements.append(statement)
        if self.before is not None:
            before, self.before = self.before, None
            before(db)
        if not statement.startswith(self.at):
            return
        if not self.go_on.is_set():
            self.reached.set()
            assert self.go_on.wait(30), "the test never let it go on"
        if self.delay_s:
            time.sleep(self.delay_s)
        if self.error is not None and self.times:
            self.times -= 1
            error = sqlite3.OperationalError("made for this test")
            error.sqlite_errorcode, error.sqlite_errorname = self.error
            raise error


class _Connection(sqlite3.Connection):
    disk: Disk | None = None

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        if self.disk is not None:
            self.disk.meet(self, sql)
        return super().execute(sql, *arguments)
