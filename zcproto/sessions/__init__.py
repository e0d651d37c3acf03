"""Sessions and their tokens in memory (sans-IO).

Reading order: token.py (tokens and digests), session.py (settings and values returned to callers), registry.py (the
decisions), then table.py, index.py and slab.py (how 100,000 sessions fit in 20 MB).
"""

from zcproto.sessions.registry import SessionRegistry
from zcproto.sessions.session import EndReason, OpenedSession, Session, SessionInfo, SessionSettings
from zcproto.sessions.token import TOKEN_SIZE, token_from_text, token_text

__all__ = [
    "TOKEN_SIZE",
    "EndReason",
    "OpenedSession",
    "Session",
    "SessionInfo",
    "SessionRegistry",
    "SessionSettings",
    "token_from_text",
    "token_text",
]
