"""Training's state: parameters and optimiser, and the checkpoints that keep them."""
