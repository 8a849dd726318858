"""ModelLoader: a name in, a loaded model and its tokenizer out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import huggingface_hub.constants
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loaderd.server.errors import LoaderdError, OfflineNotCachedError
from loaderd.server.store import hub
from loaderd.server.store.cache import default_cache_dir
from loaderd.server.store.hub_access import HubAccess
from loaderd.server.store.names import HubName, LocalName, parse_name_or_path
from loaderd.server.store.resolve import NotCached, resolve
from loaderd.server.worker import devices
from loaderd.server.worker.failures import incident
from loaderd.server.worker.layout import Layout
from loaderd.server.worker.pretrained import ModelFolder
from loaderd.server.worker.quantization import Quantizer


class ModelLoader:
    """Loads a model by its name: from a local folder, the Hugging Face cache, or the hub.

    The first of these that has it: an existing local folder; the snapshot in the cache that the
    revision points to there; a download into that cache. Only safetensors weights are read,
    unless pickles are allowed, and no code that comes with a model is run.

    Args:
        model_name: A folder, `org/name`, or `org/name@revision` (branch, tag or commit).
        cache_dir: The Hugging Face cache; default: the one that the hub library uses.
        dtype: Of the weights and of the computation.
        device_map: "auto", "balanced" or "sequential" for accelerators (the CPU on a box without),
            "cpu", a device such as "cuda:0", or the device, or "disk", of each module.
        max_memory: Most bytes of weights on each device; what it does not name gets none.
        offload: Where layers may go that do not fit: nowhere, "cpu", or "disk" after that.
        offload_folder: For weights on the disk that cannot be read from the model's files.
        token: The hub token; default: the one that the hub library uses.
        shown_name: What errors call the model; default: `model_name`.
        allow_pickle: Take weights in pickles when there are no safetensors. They are read as
            tensors only; what else they hold is refused.
        quantizer: What quantizes the weights; default: nothing does.
    """

    def __init__(
        self,
        model_name: str,
        *,
        cache_dir: Path | None = None,
        dtype: torch.dtype = torch.float16,
        device_map: str | Mapping[str, str] = devices.AUTO,
        max_memory: Mapping[str, int] | None = None,
        offload: str = "",
        offload_folder: Path | None = None,
        token: str | None = None,
        shown_name: str | None = None,
        allow_pickle: bool = False,
        quantizer: Quantizer | None = None,
    ) -> None:
        self.model_name = model_name
        self.cache_dir = cache_dir or default_cache_dir()
        self.dtype = dtype
        self.layout = Layout(device_map, max_memory, offload, offload_folder)
        self.quantizer = quantizer
        self._token = token
        self._shown_name = shown_name or model_name
        self._allow_pickle = allow_pickle

    def load_model(self) -> PreTrainedModel:
        """Loads the model, ready for inference.

        Raises:
            LoaderdError: The name leads to no model that can be loaded here; the class says why.
        """
        with self._domain_errors("loading a model"):
            return self._folder.load_model(self.dtype, self.layout, self.quantizer)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Loads the tokenizer; without a padding token, the end-of-sequence token pads.

        Raises:
            LoaderdError: The name leads to no tokenizer that can be loaded; the class says why.
        """
        with self._domain_errors("loading a tokenizer"):
            return self._folder.load_tokenizer()

    @property
    def is_gguf(self) -> bool:
        """Whether the model is a GGUF file.

        Raises:
            LoaderdError: The name leads to no model.
        """
        return self._folder.is_gguf

    @cached_property
    def _folder(self) -> ModelFolder:
        path = self._path()
        folder, file = (path.parent, path.name) if path.is_file() else (path, None)
        return ModelFolder(folder, self._shown_name, self._allow_pickle, file)

    def _path(self) -> Path:
        name = parse_name_or_path(self.model_name)
        if isinstance(name, LocalName) and name.path.is_dir():
            return name.path
        found = resolve(
            name, cache_dir=self.cache_dir, local_roots=None, allow_pickle=self._allow_pickle
        )
        return self._download(found) if isinstance(found, NotCached) else found.path

    def _download(self, missing: NotCached) -> Path:
        name: HubName = missing.name
        if huggingface_hub.is_offline_mode():
            raise missing.problem or OfflineNotCachedError(str(name))
        access = HubAccess(
            endpoint=huggingface_hub.constants.ENDPOINT,
            token=self._token or huggingface_hub.get_token(),
        )
        plan = hub.plan(name, self.cache_dir, access, allow_pickle=self._allow_pickle)
        return hub.download(plan, self.cache_dir, access).path

    @contextmanager
    def _domain_errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except LoaderdError:
            raise
        except Exception as error:
            raise incident(error, f"{doing}: {self._shown_name}", quotes_prompts=False) from error
