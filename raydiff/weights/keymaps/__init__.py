"""Renames from other layouts to the names of our modules (which are diffusers'), kept as tables."""
