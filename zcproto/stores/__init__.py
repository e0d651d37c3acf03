"""Where sessions are kept: in memory, in a file of SQLite, in Valkey.

Reading order: store.py (what every store does), memory.py, sqlite.py, valkey.py.
This room does the I/O of sessions. What sessions are is decided in zcproto.sessions.
"""
