"""Parts measured alone."""
