"""Parts measured alone: `python -m bench micro NAME`."""
