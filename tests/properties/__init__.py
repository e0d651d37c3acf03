"""Property tests (Hypothesis), kept apart so that the other core tests take seconds."""
