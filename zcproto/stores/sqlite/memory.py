"""The database of sessions in memory: no file, the same statements.

A failure that would have a file closed and opened again is rolled back, because closing would end all sessions.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Final

from zcproto.stores.answers import AnswerLimits
from zcproto.stores.base import Notice
from zcproto.stores.sqlite.database import SessionDatabase
from zcproto.stores.sqlite.file import CACHED_STATEMENTS, Connect, create_tables, reason_of

_NAME: Final = ":memory:"


class MemoryDatabase(SessionDatabase):
    """Sessions and answers that end with the process."""

    def __init__(
        self,
        *,
        answers: AnswerLimits,
        time: Callable[[], int],
        on_notice: Notice,
        connect: Connect = sqlite3.connect,
    ) -> None:
        super().__init__(Path(_NAME), answers=answers, time=time, on_notice=on_notice, connect=connect)

    def open(self) -> None:
        db = self._db = self._connect(_NAME, isolation_level=None, cached_statements=CACHED_STATEMENTS)
        create_tables(db)
        self.opened(db)

    def ready(self) -> sqlite3.Connection:
        assert self._db is not None, "it is closed last"
        return self._db

    def _recover(self, error: Exception) -> str:
        self._roll_back()
        return reason_of(error)
