"""Whatever bytes come: what holds for them, searched by coverage. README.md says how it is run."""
