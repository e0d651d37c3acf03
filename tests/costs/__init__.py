"""Tests of the time and memory of the core, on inputs large enough to measure."""
