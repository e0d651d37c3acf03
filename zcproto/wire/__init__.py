"""Frames and messages of ZCP/1, without I/O, clock or session."""
