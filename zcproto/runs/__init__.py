"""Durable runs: methods whose items are kept until a client has taken them, whatever becomes of its connection."""
