"""A run on disk: its phases in order, its records, its plan."""
