"""The training of a batch: train.py is its way from top to bottom."""
