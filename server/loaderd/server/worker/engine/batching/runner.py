"""Forward passes of the model over tokens of many requests."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loaderd.server.worker import devices
from loaderd.server.worker.engine.batching.attention import Chunk, StepAttention
from loaderd.server.worker.engine.batching.feed import Feed
from loaderd.server.worker.engine.batching.forward import Forward
from loaderd.server.worker.engine.batching.kv_cache import KvCache
from loaderd.server.worker.engine.batching.native.attention import NativeAttention
from loaderd.server.worker.engine.batching.native.kernels import Kernels
from loaderd.server.worker.engine.batching.static_step import StaticSteps
from loaderd.server.worker.engine.batching.transfer import sent


class Runner:
    """Puts steps together.

    All tokens of a step go through the model as one row; the attention function alone knows
    where one request ends and the next one begins.

    Args:
        forward: The model.
        cache: For keys and values.
        device: Of the token ids.
        static: Takes the steps that it can; None for none.
        kernels: For attention on a CPU; None for torch's.

    Attributes:
        cache: As given.
        windows: By layer, how far it looks back; None for all the way.
    """

    def __init__(
        self,
        forward: Forward,
        cache: KvCache,
        device: torch.device,
        static: StaticSteps | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        self._forward = forward
        self._kernels = kernels
        self.cache = cache
        self._device = device
        self._static = static
        self.windows: dict[int, int | None] = {}

    def run(self, feeds: Sequence[Feed]) -> torch.Tensor:
        """One forward pass.

        Args:
            feeds: At least one, each slot at most once.

        Returns:
            Logits in float32 [wanted tokens, vocabulary], in the order of the feeds.
        """
        with torch.inference_mode():
            logits = None if self._static is None else self._static.run(feeds)
            if logits is None:
                logits = self._run(feeds)
        if not len(logits):
            # Else nobody would, and the engine's clock would see launches alone.
            devices.wait_for(logits.device)
        return logits

    def _run(self, feeds: Sequence[Feed]) -> torch.Tensor:
        # Neighbouring slots in one run, so that their attention is one call.
        order = sorted(
            range(len(feeds)), key=lambda i: (len(feeds[i].token_ids) > 1, feeds[i].slot)
        )
        ordered = [feeds[i] for i in order]
        chunks = [Chunk(feed.slot, feed.begin, len(feed.token_ids)) for feed in ordered]
        ends = [chunk.begin + chunk.count for chunk in chunks]
        table = torch.tensor(
            [
                [token for feed in ordered for token in feed.token_ids],
                [
                    position
                    for c, end in zip(chunks, ends, strict=True)
                    for position in range(c.begin, end)
                ],
            ]
        )
        inputs = sent(table, self._device)
        step: StepAttention | NativeAttention
        if self._kernels is not None:
            step = NativeAttention(self.cache, chunks, self._kernels)
        else:
            step = StepAttention(self.cache, chunks)
        wanted = _wanted(feeds, order)
        # Models cannot compute logits of nothing.
        some = wanted or [0]
        every = some == list(range(inputs.shape[1]))
        keep = None if every else sent(torch.tensor(some), self._device)
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
