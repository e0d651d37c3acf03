"""The servers of the others: each prints where it listens, echoes, and ends with its standard input.

    python -m bench.peers.servers.NAME CERTIFICATE KEY

They run in an environment of their own, so nothing of zcproto may be imported here.
"""
