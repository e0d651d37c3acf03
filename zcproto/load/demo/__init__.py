"""The whole in one command: a server of its own, many verified connections, and nothing left of it.

`run` is the demonstration, `server` the server's process as its parent sees it, `child` that process itself.
"""
