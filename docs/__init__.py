"""Pages for people, and the generator of the reference pages: `python -m docs.generate`."""
