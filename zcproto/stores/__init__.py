"""Session stores: SQLite for one process, Valkey or Redis for several.

Reading order: base.py (the contract of every store); sqlite/ (rows.py, database.py, file.py, store.py) with
worker.py, its thread; valkey/ (url.py, link.py, servers.py, scripts.py, store.py);
operations.py (how operations are run); pending.py, revoker.py, leases.py and sync.py (one process's sessions and
their store); service.py (the `session.*` operations). answers.py bounds the answers kept for idempotency keys.

This room does the I/O of sessions. The rules of sessions are in zcproto.sessions.
"""
