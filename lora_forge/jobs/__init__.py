"""Jobs: many prompts, in batches, restartable."""
