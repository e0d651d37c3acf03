"""The other servers: each prints its port, echoes, and ends with its standard input.

    python -m bench.peers.servers.NAME CERTIFICATE KEY

They run in an environment of their own, so they must not import zcproto.
"""
