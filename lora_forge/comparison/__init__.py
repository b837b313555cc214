"""Fair comparisons between objectives."""
