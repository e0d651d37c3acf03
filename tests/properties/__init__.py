"""What holds for any input, by Hypothesis. Apart from the rooms' own tests, so that those take seconds."""
