"""Pays before a load what libraries do at their first use, beyond being imported.

transformers builds tables of how checkpoints are converted and loads modules when they are first
asked for, and torch prepares kernels: a tenth of what the first load of a small model takes.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from tokenizers import Tokenizer as Tokens
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loaderd.server.box.cpu import CPU
from loaderd.server.box.dtype import choose_dtype, cpu_flags
from loaderd.server.worker import devices
from loaderd.server.worker.engine.batching.build import batching_engine
from loaderd.server.worker.engine.completion import Tokenizer
from loaderd.server.worker.facts import TORCH_DTYPES
from loaderd.server.worker.loader import ModelLoader
from loaderd.server.worker.passing_thread import in_passing_thread
from loaderd.v1.model_pb2 import Dtype

logger = logging.getLogger(__name__)

_CONTEXT = 64
_LAYERS = 32
"""transformers compiles a pattern for each tensor's name, and Python keeps the last 512: these are
those of so many layers, which have the same names in most models."""


def warm_up() -> None:
    """Loads a made-up model as small as can be, in the way that real ones are, and runs it.

    On the CPU only: a context on an accelerator takes memory that no spare worker should hold.
    """
    in_passing_thread(_load_a_model, "warm-up")


def _load_a_model() -> None:
    try:
        with tempfile.TemporaryDirectory(prefix="warm-up-") as folder:
            _make_model(Path(folder))
            _load(Path(folder))
    except Exception:
        logger.warning("warming up failed; the first load takes longer", exc_info=True)


def _make_model(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=_CONTEXT,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens = Tokens(BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(folder)


def _load(folder: Path) -> None:
    dtype = choose_dtype(Dtype.DTYPE_UNSPECIFIED, on_accelerator=False, flags=cpu_flags())
    loader = ModelLoader(
        str(folder),
        dtype=TORCH_DTYPES[dtype.dtype],
        device_map=CPU if devices.accelerators() else devices.AUTO,
        shown_name="warm-up",
    )
    model, tokenizer = loader.load_model(), loader.load_tokenizer()
    engine, *_ = batching_engine(
        model,
        Tokenizer(tokenizer, frozenset()),
        "warm-up",
        emit=lambda _outputs: None,
        on_death=lambda: None,
        context_length=_CONTEXT,
    )
    engine.close()
