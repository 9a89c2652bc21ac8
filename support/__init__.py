"""Plumbing: what brings text, weights, options and results in and out.."""
