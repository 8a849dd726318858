"""transformers' from_pretrained, made to take only whole models and to run no code of theirs."""

from __future__ import annotations

import errno
import json
import logging
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import is_gguf_available

from loaderd.server.errors import (
    DeviceMemoryError,
    DiskFullError,
    ModelUnsupportedError,
    SnapshotCorruptError,
    SnapshotIncompleteError,
    UnsupportedOptionError,
)
from loaderd.server.store.selection import CONFIG, GGUF
from loaderd.server.worker import devices
from loaderd.server.worker.gguf_tokenizer import gguf_tokenizer
from loaderd.server.worker.layout import Layout
from loaderd.server.worker.quantization import FIELD as QUANTIZATION
from loaderd.server.worker.quantization import Quantizer
from loaderd.server.worker.tokenizer_files import added_tokens, has_tokenizer, without_foreign_files
from loaderd.server.worker.weight_files import WeightFiles

logger = logging.getLogger(__name__)

_ADAPTER = "adapter_config.json"
_UNREADABLE_GGUF = f"transformers {transformers.__version__} cannot read its GGUF file"
_TRUST = {"trust_remote_code": False, "local_files_only": True}


@dataclass(frozen=True)
class ModelFolder:
    """A folder that holds a model.

    Attributes:
        path: The folder; everything that loading needs is in it.
        name: The model's name, for errors.
        allow_pickle: Read weights from pickles when there are no safetensors.
        file: The GGUF file that is the model, where the folder may hold others.
    """

    path: Path
    name: str
    allow_pickle: bool = False
    file: str | None = None

    def load_model(
        self, dtype: torch.dtype, layout: Layout, quantizer: Quantizer | None = None
    ) -> PreTrainedModel:
        """Loads the model, ready for inference.

        Args:
            dtype: Of the weights and of the computation.
            layout: Where its layers may go.
            quantizer: What quantizes the weights, if anything does.

        Raises:
            SnapshotIncompleteError: A file is missing.
            SnapshotCorruptError: A file is damaged, or a tensor is missing or of another shape.
            ModelUnsupportedError: It is no causal language model that transformers knows.
            DeviceMemoryError: It does not fit.
            DiskFullError: The disk cannot hold what is offloaded to it.
            InvalidArgumentError: The layout does not fit the model.
            UnsupportedOptionError: The box has no such device, or the model cannot be quantized.
        """
        layout.check()
        weights = self._weights()
        config = self._config(weights.gguf_file)
        model_class = self._model_class(config)
        if quantizer is not None and (weights.gguf_file or _is_quantized(config)):
            raise UnsupportedOptionError(QUANTIZATION, "the model's files are quantized already")
        packed = quantizer is not None or _is_quantized(config)
        if packed and layout.may_offload:
            raise UnsupportedOptionError(QUANTIZATION, "quantized weights cannot be offloaded")
        free, needed = layout.free_bytes, _needed_bytes(weights, dtype, config, quantizer)
        if free is not None and needed > free:
            raise DeviceMemoryError(self.name, needed, free)
        # Only transformers knows the sizes of packed layers, when it makes them.
        places = layout.arguments() if packed else layout.mapped(config, dtype, self.name, needed)
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                self.path,
                config=config,
                dtype=dtype,
                **places,
                offload_folder=layout.folder,
                **_quantization(weights.gguf_file, quantizer),
                use_safetensors=not weights.are_pickles,
                weights_only=True,
                # Never what the config says: that may name a kernel of the hub.
                attn_implementation="sdpa" if model_class._supports_sdpa else "eager",
                # So that they are reported below instead of raised as text.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **_TRUST,
            )
        except SafetensorError as error:
            self._check_disk(error, layout.folder, needed)
            raise weights.unreadable(weights.listing) from error
        except ImportError as error:
            self._unsupported(error, "it needs a library that is not installed")
        except Exception as error:
            if devices.is_out_of_memory(error):
                raise DeviceMemoryError(self.name) from error
            self._check_disk(error, layout.folder, needed)
            if weights.gguf_file is None:
                raise
            self._unsupported(error, _UNREADABLE_GGUF)  # the ways to misread it are many
        self._check_report(report, weights.listing)
        if quantizer is not None:
            quantizer.finish(model)
        layout.check_spill(getattr(model, "hf_device_map", {}), self.name, needed)
        return model

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Loads the tokenizer; without a padding token, the end-of-sequence token pads.

        Raises:
            ModelUnsupportedError: There is none that transformers can read.
        """
        try:
            if self.is_gguf and not has_tokenizer(self.path):
                tokenizer = gguf_tokenizer(self._weights())
            else:
                with without_foreign_files(self.path) as folder:
                    known = added_tokens(folder)
                    given = {} if known is None else {"added_tokens_decoder": known}
                    tokenizer = AutoTokenizer.from_pretrained(folder, **given, **_TRUST)
        except Exception as error:  # its files are data, and the ways to misread them are many
            self._unsupported(error, "it has no tokenizer that can be read")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            # Set in some tokenizer.json; switched off once here, the backend never changes
            # again, so that threads can share it.
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        return tokenizer

    @property
    def is_gguf(self) -> bool:
        """Whether the model is a GGUF file.

        Raises:
            LoaderdError: See `load_model`.
        """
        may_be = self.file is not None or any(self.path.glob(f"*{GGUF}"))
        return may_be and self._weights().gguf_file is not None

    def _weights(self) -> WeightFiles:
        if (self.path / _ADAPTER).exists():
            raise ModelUnsupportedError(self.name, "it is an adapter; load the model it adapts")
        weights = WeightFiles.find(
            self.path, self.name, allow_pickle=self.allow_pickle, file=self.file
        )
        if weights.gguf_file is None and not (self.path / CONFIG).exists():
            raise SnapshotIncompleteError(self.name, CONFIG)
        if weights.gguf_file is not None and not is_gguf_available():
            problem = "GGUF files need the package gguf here; install loaderd[quantization]"
            raise ModelUnsupportedError(self.name, problem)
        return weights

    def _config(self, gguf_file: str | None) -> PreTrainedConfig:
        try:
            config = AutoConfig.from_pretrained(self.path, gguf_file=gguf_file, **_TRUST)
        except Exception as error:  # its content is data, and the ways to misread it are many
            problem = self._config_problem() if gguf_file is None else _UNREADABLE_GGUF
            self._unsupported(error, problem)
        # It could name other weights than those that were checked, a pickle among them.
        config.transformers_weights = None
        return config

    def _config_problem(self) -> str:
        try:
            model_type = json.loads((self.path / CONFIG).read_bytes())["model_type"]
        except (ValueError, KeyError, TypeError):
            return "its config.json names no model_type"
        if model_type in CONFIG_MAPPING:
            return "its config.json does not fit its model_type"
        return f"transformers {transformers.__version__} does not know its model_type"

    def _model_class(self, config: PreTrainedConfig) -> Any:
        found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if found is None:
            raise ModelUnsupportedError(
                self.name, f"{config.model_type} is not a causal language model"
            )
        return found[0] if isinstance(found, tuple) else found

    def _check_report(self, report: dict[str, Any], listing: str) -> None:
        """Refuses a model of which transformers made up a part."""
        for tensor in sorted(report["missing_keys"]):
            raise SnapshotCorruptError(self.name, listing, f"a tensor {tensor!r}", "none")
        for tensor, found, expected in sorted(report["mismatched_keys"]):
            raise SnapshotCorruptError(
                self.name,
                listing,
                f"tensor {tensor!r} of shape {tuple(expected)}",
                f"shape {tuple(found)}",
            )

    def _check_disk(self, error: Exception, folder: Path | None, needed: int) -> None:
        """Tells a disk that could not take what is offloaded to it from other failures."""
        is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if folder is not None and (is_full or f"(os error {errno.ENOSPC})" in str(error)):
            raise DiskFullError(needed, shutil.disk_usage(folder).free) from error

    def _unsupported(self, error: Exception, problem: str) -> NoReturn:
        logger.warning("cannot load %s: %s", self.name, problem, exc_info=error)
        raise ModelUnsupportedError(self.name, problem) from error


def _is_quantized(config: PreTrainedConfig) -> bool:
    return getattr(config, "quantization_config", None) is not None


def _quantization(gguf_file: str | None, quantizer: Quantizer | None) -> dict[str, Any]:
    """The arguments of from_pretrained that concern it."""
    if gguf_file is not None:
        return {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    return {"quantization_config": quantizer.config} if quantizer else {}


def _needed_bytes(
    weights: WeightFiles,
    dtype: torch.dtype,
    config: PreTrainedConfig,
    quantizer: Quantizer | None,
) -> int:
    shapes = weights.shapes()
    numbers = sum(map(math.prod, shapes))
    if quantizer is not None:
        # Matrices but for embeddings and what gives the logits, which have a row for each token.
        tokens = config.get_text_config(decoder=True).vocab_size
        linear = (shape for shape in shapes if len(shape) == 2 and shape[0] != tokens)
        fewer = sum(map(math.prod, linear))
        return (numbers - fewer) * int(dtype.itemsize) + math.ceil(fewer * quantizer.bits / 8)
    if _is_quantized(config):
        return weights.size_bytes
    return numbers * int(dtype.itemsize)
