"""The project's own proof, which is not installed: `python -m bench` in a clone."""
