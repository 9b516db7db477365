"""Episodes as they happen: `collect` runs them, `decisions` is the interface of actors, `rounds` runs lost ones again.

`places` decides which episode an environment is in, `records` stores the episodes as they grow.
"""
