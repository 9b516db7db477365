"""The train state, its optimiser and its checkpoints."""
