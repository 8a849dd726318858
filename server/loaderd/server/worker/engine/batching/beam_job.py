"""A request that searches with beams."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from loaderd.server.worker.engine.batching.beam_sampler import BeamSampler
from loaderd.server.worker.engine.batching.beams import Candidate, placed
from loaderd.server.worker.engine.batching.job import Job, Row
from loaderd.server.worker.engine.completion import Tokenizer
from loaderd.server.worker.engine.protocol import Beams, GenerationRequest, SampledToken
from loaderd.v1.generation_pb2 import FinishReason
from loaderd.worker.v1.worker_pb2 import Output


class BeamJob(Job):
    """A job whose rows are places for beams, not completions, until the best outputs are known.

    A row in which no beam is has no token that is to be computed.

    Args:
        request: The request.
        send: Takes the outputs, in the engine's thread.
        beams: How it searches.

    Attributes:
        beams: The rows of the running beams, best first; the first row until the first step.
    """

    def __init__(
        self, request: GenerationRequest, send: Callable[[Output], None], beams: Beams
    ) -> None:
        super().__init__(request, send)
        self.beams: list[Row] = []
        self._how = beams

    def begin(self, slots: tuple[int, ...], keys: Iterator[int], tokenizer: Tokenizer) -> None:
        """See `Job.begin`."""
        super().begin(slots, keys, tokenizer)
        self.beams = self.rows[:1]
        self._prompt_is_known = False
        self._sampler = BeamSampler(self.request, self._how)

    def echo(self) -> None:
        """The texts begin at the end, when they are known."""

    def advance(self, logits: Tensor) -> list[Candidate]:
        """Chooses the beams' next tokens; with them it may end.

        Args:
            logits: [running beams, vocabulary], float32, best beam first.

        Returns:
            The running beams now, by the place of their parents; none when it has ended.

        Raises:
            LoaderdError: It cannot go on.
        """
        self.clock.token()
        self._prompt_is_known = True
        chosen = self._sampler.advance(logits)
        if not self._sampler.is_over and not self.is_late:
            return chosen
        self.stop(FinishReason.FINISH_REASON_TIME)
        return []

    def place(self, chosen: Sequence[Candidate], follow: Callable[[Row, Row], None]) -> None:
        """Gives the running beams to rows.

        Args:
            chosen: As `advance` gave them.
            follow: Makes a row hold what another one holds.
        """
        parents = [self.beams[candidate.parent] for candidate in chosen]
        self.beams = placed(parents, self.rows)
        for row, parent in zip(self.beams, parents, strict=True):
            if row is not parent:
                follow(row, parent)
        for row, candidate in zip(self.beams, chosen, strict=True):
            row.token_ids.append(candidate.token_id)

    def stop(self, reason: FinishReason.ValueType) -> None:
        """Tells the best outputs; `reason` is why those ended that did not end by themselves."""
        self._sampler.cut()
        best = [beam.token_ids for beam in self._sampler.ended[: self.request.n]]
        for index, row in enumerate(self._best()):
            if self._prompt_is_known:
                self._show(index, row, row.completion.echo())
            for token_id in best[index] if index < len(best) else ():
                self._show(index, row, row.completion.push(SampledToken(token_id)))
        for row in self.rows[self.request.n :]:
            row.completion.close(reason)  # There is no output for it, so nothing to show.
        super().stop(reason)

    def _best(self) -> list[Row]:
        return self.rows[: self.request.n]
