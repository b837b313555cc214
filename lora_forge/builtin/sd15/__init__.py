"""Stable Diffusion 1.x: what the family is, and its backend."""
