"""`zcproto demo`: a temporary server, many verified connections, and nothing left afterwards.

`run` is the demonstration, `server` controls the server's process, `child` is that process.
"""
