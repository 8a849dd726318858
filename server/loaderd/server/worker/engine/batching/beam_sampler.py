"""The next tokens of one request's beams, chosen among those after any of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loaderd.server.errors import InvalidArgumentError, LoaderdError
from loaderd.server.worker.engine.batching import choice
from loaderd.server.worker.engine.batching.beams import Beam, BeamSearch, Candidate
from loaderd.server.worker.engine.batching.history import History
from loaderd.server.worker.engine.batching.logits_processors import process
from loaderd.server.worker.engine.batching.sampler import no_token
from loaderd.server.worker.engine.protocol import Beams, GenerationRequest


class BeamSampler:
    """Gives a beam search its candidates.

    As in transformers, masks and penalties apply to log probabilities, and a beam's score is the
    sum of what they make of them.

    Args:
        request: What it is for.
        beams: How it searches.
    """

    def __init__(self, request: GenerationRequest, beams: Beams) -> None:
        self._request = request
        self._search = BeamSearch(beams, request.stopping)
        self._histories = [History(request)] if History.needed_for(request) else []

    @property
    def is_over(self) -> bool:
        """Whether the best outputs are known."""
        return self._search.is_over

    @property
    def ended(self) -> Sequence[Beam]:
        """The best outputs that have ended, best first."""
        return self._search.ended

    def advance(self, logits: Tensor) -> list[Candidate]:
        """One step.

        Args:
            logits: [running beams, vocabulary], float32: what the model put out for the last
                token of each, best beam first; for the prompt's before the first step.

        Returns:
            The running beams now, best first; none when it is over.

        Raises:
            LoaderdError: Masks leave no token, or too few for as many outputs as are wanted.
        """
        with torch.inference_mode():
            scores = logits.log_softmax(-1)
            if self._histories:
                process(scores, list(enumerate(self._histories)))
            own = [beam.score for beam in self._search.running]
            scores += torch.tensor(own, dtype=torch.float32, device=scores.device)[:, None]
            chosen = self._search.advance(self._candidates(scores))
        if self.is_over and len(self.ended) < self._request.n:
            raise self._too_few(scores)
        self._follow(chosen)
        return chosen

    def cut(self) -> None:
        """Ends it here, with what there is, if it is not over."""
        self._search.cut()

    def _candidates(self, scores: Tensor) -> list[Candidate]:
        count = min(self._search.wanted, scores.numel())
        values, places = choice.highest(scores.view(1, -1), count)
        finite = values.isfinite()
        if not bool(finite.all()) and bool(scores.isnan().any()):
            raise self._too_few(scores)
        return [
            Candidate(place // scores.shape[1], place % scores.shape[1], score)
            for place, score in zip(places[finite].tolist(), values[finite].tolist(), strict=True)
        ]

    def _follow(self, chosen: Sequence[Candidate]) -> None:
        if not self._histories:
            return
        parents = [candidate.parent for candidate in chosen]
        histories = [
            # The last beam of a parent goes on with its history.
            self._histories[parent]
            if parent not in parents[beam + 1 :]
            else self._histories[parent].fork()
            for beam, parent in enumerate(parents)
        ]
        for history, candidate in zip(histories, chosen, strict=True):
            history.push(candidate.token_id)
        self._histories = histories

    def _too_few(self, scores: Tensor) -> LoaderdError:
        if not self.ended or bool(scores.isnan().any()):
            return no_token(self._request.sampling, scores, masked=bool(self._histories))
        return InvalidArgumentError("n", f"masks leave no more than {len(self.ended)} outputs")
