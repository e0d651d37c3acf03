"""Servers under load to which something happens, each judged in a report: `python -m bench scenario NAME`."""
