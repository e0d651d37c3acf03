"""Sessions: tokens and what they stand for, in memory, without I/O.

Reading order: token.py (what a token is), session.py (what callers see), registry.py (all decisions),
table.py, index.py, slab.py and strings.py (how 100,000 of them fit in 20 MB).
"""

from zcproto.sessions.registry import SessionRegistry
from zcproto.sessions.session import OpenedSession, Session, SessionInfo, SessionSettings
from zcproto.sessions.token import TOKEN_SIZE, token_from_text, token_text

__all__ = [
    "TOKEN_SIZE",
    "OpenedSession",
    "Session",
    "SessionInfo",
    "SessionRegistry",
    "SessionSettings",
    "token_from_text",
    "token_text",
]
