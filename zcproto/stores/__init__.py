"""Where sessions are kept: in memory, in a file of SQLite, in Valkey.

Reading order: store.py (what every store does), memory.py; rows.py, session_file.py, worker.py and sqlite.py;
valkey.py. answers.py bounds what is kept of requests with an idempotency key.
This room does the I/O of sessions. What sessions are is decided in zcproto.sessions.
"""
