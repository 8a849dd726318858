"""Thousands of requests as nobody would plan them, and what they leave behind."""
