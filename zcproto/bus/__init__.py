"""What the processes of one server, or of several, share beside sessions: topics.

    topics.py   the topics of one process, and the numbers by which it finds what a carrier has lost

A carrier is between the processes: the coordinator's links for workers (zcproto/workers/topics.py), Valkey or Redis
for several servers.
"""
