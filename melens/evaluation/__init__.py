"""What a model can do with an edit and without it, paired, with controls."""
