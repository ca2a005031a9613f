"""Models whose blocks are read from disk while they run, one in memory at a time."""
