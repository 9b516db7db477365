"""Where arrays live: meshes, rules and the shardings they give."""
