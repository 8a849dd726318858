"""What transformers' beam search makes of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tests.unit.worker.engine_client import EOS
from tests.unit.worker.outputs import Outputs


def reference_beams(
    model: Any, prompt: Sequence[int], n: int = 1, **options: Any
) -> list[list[int]]:
    """The `n` best outputs, each with the token that ended it."""
    ids = torch.tensor([prompt])
    # An engine may have taken the model's own options away.
    options = {"eos_token_id": EOS, "pad_token_id": EOS} | options
    with torch.no_grad():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_return_sequences=n,
            return_dict_in_generate=True,
            **options,
        )
    # Shorter outputs are filled up; no beam stands behind that.
    lengths = (output.beam_indices >= 0).sum(-1).tolist()
    return [
        sequence[len(prompt) :][:length].tolist()
        for sequence, length in zip(output.sequences, lengths, strict=True)
    ]


def outputs_by_index(outputs: Outputs) -> list[list[int]]:
    """The token ids of each completion."""
    assert outputs.finished is not None, outputs.error
    return [
        [token for delta in outputs.deltas if delta.index == index for token in delta.token_ids]
        for index in range(len(outputs.finished.finishes))
    ]
