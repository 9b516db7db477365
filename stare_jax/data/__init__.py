"""Data sets on disk: `schema` says what they are, `writer` and `reader` do that; `demos` and `rollouts` collect them.

`filters`, `norm_stats` and `batches` turn demonstrations into what imitation trains on, `pairs` turns rollouts into
preference pairs, `summary` shows what is inside, and `seeds` keeps the phases apart.
"""
