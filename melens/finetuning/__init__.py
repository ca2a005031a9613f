"""Training with an edit in force, and what becomes of the ME Layer meanwhile."""
