"""Fair comparisons between objectives."""

SEEDS = 3  # 0, 1 and 2, unless asked for others
CONTROLS = 8  # control prompts that are drawn, unless asked for others
