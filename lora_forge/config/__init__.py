"""Run configs and model configs: read, checked, all mistakes at once."""
