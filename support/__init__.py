"""Plumbing: what brings text, weights, options and results in and out. Nothing here imports the five files."""
