"""The pages of docs/: they name what exists, explain every message, and are generated from the code."""
