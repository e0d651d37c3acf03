"""Encode and decode the frames and messages of ZCP/1 (sans-IO)."""
