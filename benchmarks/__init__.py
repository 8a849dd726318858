"""Measurements of the daemon beside what people would do without it."""
