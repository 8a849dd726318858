"""What a request puts into a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Feed:
    """What one request puts into a step.

    Attributes:
        slot: Of its keys and values.
        begin: Position of its first token in this step.
        token_ids: One when it decodes, else a piece of its prompt.
        wants: How many of its last tokens are to have logits.
    """

    slot: int
    begin: int
    token_ids: Sequence[int]
    wants: int
