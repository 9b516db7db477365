"""Places of arrays: meshes, rules and the shardings they give."""
