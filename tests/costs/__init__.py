"""Time and memory of the core, measured on inputs large enough to tell."""
