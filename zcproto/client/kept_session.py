"""The session of a client that continues after a restart.

Decides: whether the session of the file is used, and when the file is written.

Rules:
- The server has the last word: it is asked before the session of the file is used. If it refuses the token, the
  session is refreshed, or another one is opened.
- The file is written before the session is used. While a refresh token is being spent, the file has none: using it
  again after a crash would end the session.
- Closing the client keeps the session, unless another client has the file.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from zcproto.client.protocol import ClientProtocol
from zcproto.client.retry import Backoff, Then, retry_after_ms, what_next
from zcproto.client.session import ENDED_BY_REFUSAL, ClientSession, SessionManager, answer
from zcproto.client.session_file import SessionFile
from zcproto.errors import CallError, Code, ConnectionClosed, ProtocolError
from zcproto.wire.frame import NO_TOKEN


@dataclass(eq=False, repr=False)
class KeptSessionManager(SessionManager):
    """Manages the session of one client, which is kept in `file`."""

    file: SessionFile
    _was_loaded: bool = field(default=False, init=False)
    _resumed: ClientSession | None = field(default=None, init=False)  # that of the file, until it is accepted

    async def _renew(self, must: bool) -> None:
        try:
            if self._was_loaded or not await self._resume():
                await asyncio.to_thread(self.file.save, None)
                await super()._renew(must)
        finally:
            kept = None if self.session is None else self.session.as_result()
            await asyncio.to_thread(self.file.save, kept)

    async def _resume(self) -> bool:
        """Use the session of the file if the server accepts its token. Return False if it does not."""
        kept = await asyncio.to_thread(self.file.load)
        self._was_loaded = True
        if kept is None:
            return False
        connection = await self._ready_connection()
        try:
            session = self._session_of(kept, connection)
        except ProtocolError:  # the file does not have a session
            return False
        self._resumed = self.session = session
        self.token = session.token_bytes
        backoff = Backoff(self.random)
        while self._loop.time() < session.valid_until:
            try:
                await answer(connection, self._show(connection))
            except ConnectionClosed:
                await asyncio.sleep(backoff.next())
            except CallError as error:
                if what_next(error) in (Then.LATER, Then.AT_ONCE):
                    await asyncio.sleep(backoff.next(retry_after_ms(error.details)))
                else:
                    session.expire()
                    if error.code is not Code.TOKEN_EXPIRED:  # else it may be refreshed
                        self._drop_resumed()
            else:
                self._resumed = None
                self._begin(session, connection)
                return True
            connection = await self._ready_connection()
        return False

    def _drop_resumed(self) -> None:
        """Forget the session of the file, which the server has refused."""
        self._resumed = self.session = None
        self.token = NO_TOKEN

    async def _ready_connection(self) -> ClientProtocol:
        while True:
            connection = await self._get_connection()
            await connection.wait_ready()
            if connection.ready:
                return connection

    def _opens_instead(self, error: CallError, *, must: bool) -> bool:
        if self.session is not None and self.session is self._resumed and error.code in ENDED_BY_REFUSAL:
            self._drop_resumed()
            return True
        return super()._opens_instead(error, must=must)

    async def close(self, connection: ClientProtocol | None) -> None:
        """Keep the session in the file for the next client. Without the file, end it."""
        await super().close(None if self.file.is_held else connection)
        self.file.close()
