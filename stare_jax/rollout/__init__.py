"""Episodes as they happen: `collect` runs them, `acting` lets policies decide, `rounds` runs lost ones again.

`decisions` is the interface of actors, `places` decides which episode an environment is in, `records` stores the
episodes as they grow.
"""
