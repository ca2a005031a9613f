"""lm-evaluation-harness: its model class for melens, its tasks from local files, and runs of it."""
