"""Forward passes of the model over tokens of many requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loaderd.server.worker.engine.batching.attention import Chunk, StepAttention
from loaderd.server.worker.engine.batching.forward import Forward
from loaderd.server.worker.engine.batching.kernels import PLAIN, LinearPolicy
from loaderd.server.worker.engine.batching.kv_cache import KvCache


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


class Runner:
    """Puts steps together.

    All tokens of a step go through the model as one row; the attention function alone knows
    where one request ends and the next one begins.

    Args:
        forward: The model.
        cache: For keys and values.
        device: Of the token ids.
        linears: How the model's linear layers are computed.
    """

    def __init__(
        self, forward: Forward, cache: KvCache, device: torch.device, linears: LinearPolicy = PLAIN
    ) -> None:
        self._forward = forward
        self._cache = cache
        self._linears = linears
        self._device = device
        self.windows: dict[int, int | None] = {}

    def run(self, feeds: Sequence[Feed]) -> torch.Tensor:
        """One forward pass.

        Args:
            feeds: At least one, each slot at most once.

        Returns:
            Logits in float32 [wanted tokens, vocabulary], in the order of the feeds.
        """
        # Neighbouring slots in one run, so that their attention is one call.
        order = sorted(
            range(len(feeds)), key=lambda i: (len(feeds[i].token_ids) > 1, feeds[i].slot)
        )
        ordered = [feeds[i] for i in order]
        chunks = [Chunk(feed.slot, feed.begin, len(feed.token_ids)) for feed in ordered]
        ends = [chunk.begin + chunk.count for chunk in chunks]
        inputs = torch.tensor(
            [
                [token for feed in ordered for token in feed.token_ids],
                [
                    position
                    for c, end in zip(chunks, ends, strict=True)
                    for position in range(c.begin, end)
                ],
            ],
            device=self._device,
        )
        step = StepAttention(self._cache, chunks)
        wanted = _wanted(feeds, order)
        # Models cannot compute logits of nothing.
        some = wanted or [0]
        every = some == list(range(inputs.shape[1]))
        keep = None if every else torch.tensor(some, device=self._device)
        with torch.inference_mode(), self._linears.step(inputs.shape[1]):
            logits = self._forward(inputs[0], inputs[1], step, keep)
            self.windows = step.windows
            return logits[: len(wanted)].float()


def _wanted(feeds: Sequence[Feed], order: Sequence[int]) -> list[int]:
    """Places of the tokens that want logits, in the order of the feeds."""
    places: dict[int, range] = {}
    token = 0
    for i in order:
        token += len(feeds[i].token_ids)
        places[i] = range(token - feeds[i].wants, token)
    return [place for i in range(len(feeds)) for place in places[i]]
