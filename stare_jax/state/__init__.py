"""The state of training: the train state, the optimiser, checkpoints."""
