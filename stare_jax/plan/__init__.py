"""The cost of a run, read from programs that are compiled ahead of time: memory, products, exchanges, time."""
