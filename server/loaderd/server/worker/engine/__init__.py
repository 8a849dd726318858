"""Engines: what turns a prompt into tokens, and what all engines share."""
