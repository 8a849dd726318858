"""transformers' from_pretrained, made to take only whole models and to run no code of theirs."""

from __future__ import annotations

import json
import logging
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
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from loaderd.server.errors import (
    DeviceMemoryError,
    ModelUnsupportedError,
    SnapshotCorruptError,
    SnapshotIncompleteError,
)
from loaderd.server.store.selection import CONFIG
from loaderd.server.worker import devices
from loaderd.server.worker.tokenizer_files import without_foreign_files
from loaderd.server.worker.weight_files import WeightFiles

logger = logging.getLogger(__name__)

_ADAPTER = "adapter_config.json"
_TRUST = {"trust_remote_code": False, "local_files_only": True}


@dataclass(frozen=True)
class ModelFolder:
    """A folder that holds a model.

    Attributes:
        path: The folder; everything that loading needs is in it.
        name: The model's name, for errors.
        allow_pickle: Read weights from pickles when there are no safetensors.
    """

    path: Path
    name: str
    allow_pickle: bool = False

    def load_model(self, dtype: torch.dtype, device_map: str) -> PreTrainedModel:
        """Loads the model, ready for inference.

        Args:
            dtype: Of the weights and of the computation.
            device_map: "auto", "cpu" or a device such as "cuda:0".

        Raises:
            SnapshotIncompleteError: A file is missing.
            SnapshotCorruptError: A file is damaged, or a tensor is missing or of another shape.
            ModelUnsupportedError: It is no causal language model that transformers knows.
            DeviceMemoryError: It does not fit.
            InvalidArgumentError, UnsupportedOptionError: See `devices.check_device_map`.
        """
        devices.check_device_map(device_map)
        weights = self._weights()
        config = self._config()
        model_class = self._model_class(config)
        needed, free = _needed_bytes(weights, dtype, config), devices.free_bytes(device_map)
        if needed > free:
            raise DeviceMemoryError(self.name, needed, free)
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                self.path,
                config=config,
                dtype=dtype,
                device_map=device_map,
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
            raise weights.unreadable(weights.listing) from error
        except ImportError as error:
            self._unsupported(error, "it needs a library that is not installed")
        except Exception as error:
            if not devices.is_out_of_memory(error):
                raise
            raise DeviceMemoryError(self.name) from error
        self._check_report(report, weights.listing)
        if "disk" in getattr(model, "hf_device_map", {}).values():
            raise DeviceMemoryError(self.name)
        return model

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Loads the tokenizer; without a padding token, the end-of-sequence token pads.

        Raises:
            ModelUnsupportedError: There is none that transformers can read.
        """
        try:
            with without_foreign_files(self.path) as folder:
                tokenizer = AutoTokenizer.from_pretrained(folder, **_TRUST)
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

    def _weights(self) -> WeightFiles:
        if (self.path / _ADAPTER).exists():
            raise ModelUnsupportedError(self.name, "it is an adapter; load the model it adapts")
        if not (self.path / CONFIG).exists():
            raise SnapshotIncompleteError(self.name, CONFIG)
        return WeightFiles.find(self.path, self.name, allow_pickle=self.allow_pickle)

    def _config(self) -> PreTrainedConfig:
        try:
            config = AutoConfig.from_pretrained(self.path, **_TRUST)
        except Exception as error:  # its content is data, and the ways to misread it are many
            self._unsupported(error, self._config_problem())
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

    def _unsupported(self, error: Exception, problem: str) -> NoReturn:
        logger.warning("cannot load %s: %s", self.name, problem, exc_info=error)
        raise ModelUnsupportedError(self.name, problem) from error


def _needed_bytes(weights: WeightFiles, dtype: torch.dtype, config: PreTrainedConfig) -> int:
    numbers = weights.count_numbers()
    if getattr(config, "quantization_config", None) is not None:
        return weights.size_bytes
    return numbers * int(dtype.itemsize)
