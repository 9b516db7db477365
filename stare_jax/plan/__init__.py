"""What a run will cost, read from programs that are compiled ahead of time: memory, products, exchanges, time."""
