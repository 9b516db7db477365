"""What is trained and kept: the train state, the optimiser, checkpoints."""
