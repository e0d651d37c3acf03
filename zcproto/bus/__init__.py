"""What the processes of one server, or of several, share beside sessions: topics and durable runs.

    topics.py       the topics of one process, and the numbers by which it finds what a carrier has lost
    connection.py   a connection to Valkey or Redis, for one of the carriers below
    valkey.py       carries topics
    runs.py         carries durable runs, by the script runs.lua
    sealing.py      seals what they send

A carrier is between the processes: the coordinator's links for workers (zcproto/workers/topics.py and runs.py),
Valkey or Redis for several servers.
"""
