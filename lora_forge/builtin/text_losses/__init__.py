"""Losses that look at the text encoders alone."""
