"""Tokens: made at random, known by their hash alone."""

from __future__ import annotations

import hashlib
import secrets

PREFIX = "loaderd_"
"""What tokens begin with, so that whoever finds one in the wrong place can tell what it is."""


def new_token() -> str:
    """A token of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(token: str) -> str:
    """The hash by which the daemon knows a token: its SHA-256, in hexadecimal digits.

    A token is as random as the hash is long, so neither salt nor a slow hash would add anything.
    """
    return hashlib.sha256(token.encode()).hexdigest()
