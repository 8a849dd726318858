"""The error of a command that was not used as it should be."""

from __future__ import annotations

import typer

# Typer keeps this class to itself, and had it from Click before: the base of BadParameter.
(UsageError,) = typer.BadParameter.__bases__
