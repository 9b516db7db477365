"""Data sets on disk: `schema` says what they are, `writer` and `reader` do that; `demos` and `rollouts` collect them.

`filters`, `norm_stats` and `batches` turn demonstrations into what imitation trains on, `pairs` turns rollouts into
preference pairs, and `summary` shows what is inside. `import_rlds` brings in what real robots recorded: `rlds_source`
reads it, `rlds_layouts` knows what it means.
"""
