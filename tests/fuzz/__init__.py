"""Fuzz targets: invariants for arbitrary input bytes, searched with coverage guidance. See README.md."""
