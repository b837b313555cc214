"""Stable Diffusion XL: what the family is, and its backend."""
