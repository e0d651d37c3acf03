"""Processes of one server: a supervisor that starts and restarts them, and the messages between it and them.

Reading order: channel.py (messages), restarts.py (when a process is started again), supervisor.py.
zcproto/runtime/processes.py decides what the processes do.
"""
