"""The command line: one file per verb; what a verb works with is imported when it works."""
