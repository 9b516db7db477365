"""Meshes, rules, and the shardings that they give to arrays."""
