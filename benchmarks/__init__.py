"""Measurements: each module prints a table of medians and ratios and writes its figures as JSON."""
