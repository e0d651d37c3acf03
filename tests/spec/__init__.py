"""The specification's own files: text, vectors, schema and generator agree."""
