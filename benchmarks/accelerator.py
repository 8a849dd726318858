"""The batching engine on a GPU, beside transformers and beside what the memory allows.

`python -m benchmarks.accelerator --shape 1b` makes a Llama of that shape with random weights on
the device, lets some streams decode at once in the engine, with and without CUDA graphs, in
transformers' `generate` as one batch, and in its continuous batching, and prints tokens/s. The
bound beside them is the time in which the device reads the weights and the keys and values that a
step needs, at the rate of a large copy, measured here. `--profile` tells where a step's time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import io
import json
import logging
import pstats
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.figures import Figures, StreamTimes, summarize
from loaderd.server.worker import devices
from loaderd.server.worker.engine.batching.build import EngineSettings, batching_engine
from loaderd.server.worker.engine.completion import Tokenizer
from loaderd.server.worker.engine.parameters import typed_request
from loaderd.server.worker.facts import model_facts
from loaderd.v1.generation_pb2 import StreamGenerateRequest
from loaderd.worker.v1 import worker_pb2

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 999},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "tie_word_embeddings": False,
    },
}
"""Llama 3.2 1B and Llama 3.1 8B, and one to try this with."""
COMMON = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "bos_token_id": None,
    "eos_token_id": None,
}
PROMPT_TOKENS = 64
COPY_BYTES = 4 << 30

Side = Callable[[list[list[int]], int], Figures]
"""Generates so many tokens after each of some prompts."""


class _Numbers:
    """A tokenizer for models without words."""

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return "".join(f" {token_id}" for token_id in token_ids)


class EngineSide:
    """The engine around a model.

    Args:
        model: It gets another attention function.
        graphs: Whether decode steps may be replayed.
        sampled: Whether tokens are drawn, with the usual options, else the best ones.
    """

    def __init__(self, model: Any, *, graphs: bool, sampled: bool = False) -> None:
        self.on_step: Callable[[], None] = lambda: None
        self._sampled = sampled
        self._facts = model_facts(model)
        self._streams: dict[int, StreamTimes] = {}
        self._open = 0
        self._keys = 0
        self._changed = threading.Condition()
        self._engine, self.reason, _ = batching_engine(
            model,
            Tokenizer(_Numbers(), frozenset()),
            "random",
            self._take,
            on_death=self._changed.notify_all,
            context_length=self._facts.context_length,
            settings=EngineSettings(graphs=graphs),
        )

    def __call__(self, prompts: list[list[int]], tokens: int) -> Figures:
        """See `Side`."""
        self._streams.clear()
        self._open = len(prompts)
        chances: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 1}
        for prompt in prompts:
            self._keys += 1
            self._streams[self._keys] = StreamTimes()
            request = StreamGenerateRequest(
                model="random",
                do_sample=self._sampled,
                max_new_tokens=tokens,
                ignore_eos=True,
                bypass_prefix_cache=True,
                **(chances if self._sampled else {}),
            )
            self._engine.submit(
                typed_request(
                    request,
                    key=self._keys,
                    prompt=prompt,
                    arrived=time.monotonic(),
                    facts=self._facts,
                )
            )
        with self._changed:
            self._changed.wait_for(lambda: not self._open, timeout=300)
        return summarize(list(self._streams.values()))

    def close(self) -> None:
        """Ends it."""
        self._engine.close()

    def _take(self, outputs: Sequence[worker_pb2.Output]) -> None:
        self.on_step()
        with self._changed:
            for output in outputs:
                stream = self._streams[output.key]
                match output.WhichOneof("event"):
                    case "delta":
                        stream.arrive()
                    case "finished":
                        stream.tokens = output.finished.usage.generated_tokens
                        self._open -= 1
                    case "error":
                        stream.error = str(output.error)
                        self._open -= 1
            self._changed.notify_all()


def generate_side(model: Any) -> Side:
    """transformers' `generate`, all prompts as one batch."""

    def run(prompts: list[list[int]], tokens: int) -> Figures:
        ids = torch.tensor(prompts, device=model.device)
        options = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        begin = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=options)
        return _as_a_whole(len(prompts), tokens, time.perf_counter() - begin)

    return run


def continuous_side(model: Any) -> Side:
    """transformers' continuous batching, kept between runs."""

    logging.disable(logging.WARNING)
    sizes = ContinuousBatchingConfig(max_memory_percent=0.5)

    def run(prompts: list[list[int]], tokens: int) -> Figures:
        options = GenerationConfig(
            max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=-1
        )
        begin = time.perf_counter()
        results = model.generate_batch(
            prompts,
            generation_config=options,
            continuous_batching_config=sizes,
            persistent_manager=True,
        )
        seconds = time.perf_counter() - begin
        made = sum(len(result.generated_tokens) for result in results.values())
        if made != len(prompts) * tokens:
            raise RuntimeError(f"it generated {made} tokens")
        return _as_a_whole(len(prompts), tokens, seconds)

    return run


def _as_a_whole(streams: int, tokens: int, seconds: float) -> Figures:
    made = streams * tokens
    return Figures(streams, made, made / seconds, 0.0, 0.0, seconds / tokens, 0.0, {})


def build(shape: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A Llama with random weights."""
    config = LlamaConfig(**COMMON | SHAPES[shape])
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.generation_config = GenerationConfig()
    return model.eval()


def prompts_of(model: Any, streams: int) -> list[list[int]]:
    """No two alike."""
    draw = random.Random(streams)
    return [
        draw.choices(range(10, model.config.vocab_size), k=PROMPT_TOKENS) for _ in range(streams)
    ]


def copy_rate(device: torch.device) -> float:
    """Bytes that the device's memory moves in a second, read and written, in a large copy."""
    if device.type != "cuda":
        return float("nan")
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        devices.wait_for(device)
        begin = time.perf_counter()
        target.copy_(source)
        devices.wait_for(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * COPY_BYTES / min(seconds)


def bound(model: Any, streams: int, tokens: int, rate: float) -> float:
    """Tokens a second that no engine exceeds: each step reads all weights, and keys and values."""
    config = model.config
    weights = sum(each.nbytes for each in set(model.parameters()))
    if not config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.nbytes  # of which a step reads some rows
    head = config.hidden_size // config.num_attention_heads
    place = 2 * config.num_hidden_layers * config.num_key_value_heads * head * model.dtype.itemsize
    kept = streams * (PROMPT_TOKENS + tokens / 2) * place
    return float(streams * rate / (weights + kept))


def measure(name: str, side: Side, model: Any, options: argparse.Namespace) -> list[Figures]:
    """Figures by number of streams, each after a run that nobody counts."""
    found = []
    for streams in options.streams:
        prompts = prompts_of(model, streams)
        side(prompts, options.tokens)
        best = max(
            (side(prompts, options.tokens) for _ in range(options.rounds)),
            key=lambda figures: figures.tokens_per_second,
        )
        print(
            f"{name} {streams} streams: {best.tokens_per_second:.0f} tokens/s, "
            f"step {best.inter_token_p50 * 1e3:.2f} ms, {best.errors or 'no errors'}",
            flush=True,
        )
        found.append(best)
    return found


def tell_profile(name: str, side: EngineSide, model: Any, streams: int, tokens: int) -> None:
    """Where the time of a step goes: on the device by kernel, and in the engine's thread."""
    prompts = prompts_of(model, streams)
    side(prompts, tokens)
    calm = side(prompts, tokens)
    kernels = Counter[str]()
    launches = 0
    if torch.cuda.is_available():
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            side(prompts, tokens)
        for event in trace.key_averages():
            kernels[event.key] += event.self_device_time_total
            launches += event.count
    busy = sum(kernels.values()) / tokens / 1e3
    print(
        f"\n{name}, {streams} streams: {calm.inter_token_p50 * 1e3:.2f} ms a step, of which the "
        f"device computes {busy:.2f} ms in {launches / tokens:.0f} kernels and copies"
    )
    for kernel, microseconds in kernels.most_common(14):
        print(f"  {microseconds / tokens / 1e3:7.3f} ms  {kernel[:110]}")
    steps = cProfile.Profile()
    enabled = threading.Event()

    def once() -> None:
        if not enabled.is_set():
            enabled.set()
            steps.enable()

    side.on_step = once
    side(prompts, tokens)
    side.on_step = steps.disable
    side(prompts[:1], 2)
    side.on_step = lambda: None
    text = io.StringIO()
    pstats.Stats(steps, stream=text).sort_stats("tottime").print_stats(22)
    print("\n".join(line for line in text.getvalue().splitlines()[2:] if line.strip()), flush=True)


SIDES: dict[str, Callable[[Any], Side]] = {
    "generate": generate_side,
    "replayed": lambda model: EngineSide(model, graphs=True),
    "launched": lambda model: EngineSide(model, graphs=False),
    "sampled": lambda model: EngineSide(model, graphs=True, sampled=True),
    # Last: it keeps its memory.
    "continuous": continuous_side,
}


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--streams", default="1,8,32,64", type=_numbers, help="1,8,32,64")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of a stream (128)")
    parser.add_argument("--rounds", type=int, default=2, help="of which the best counts (2)")
    parser.add_argument("--sides", default=",".join(SIDES), help=f"of {', '.join(SIDES)}")
    parser.add_argument(
        "--profile", action="store_true", help="where the time of a replayed step goes"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()

    device = torch.device(options.device)
    rate = copy_rate(device)
    results: dict[str, list[Figures]] = {}
    failed = False
    for name in (name for name in SIDES if name in options.sides.split(",")):
        # Another for each: the engine changes attention and layers.
        model = build(options.shape, getattr(torch, options.dtype), device)
        bounds = [bound(model, streams, options.tokens, rate) for streams in options.streams]
        # transformers as it is by itself; the engine switches this off for its process.
        torch.backends.cuda.enable_cudnn_sdp(name in {"generate", "continuous"})
        side: Side | None = None
        try:
            side = SIDES[name](model)
            print(f"\n{name}: {getattr(side, 'reason', 'transformers')}", flush=True)
            results[name] = measure(name, side, model, options)
            if isinstance(side, EngineSide):
                if options.profile and name == "replayed":
                    for streams in (1, 32):
                        tell_profile(name, side, model, streams, options.tokens)
                side.close()
        except Exception as error:  # a side that fails is told, and the others go on
            failed = True
            print(f"{name} failed: {type(error).__name__}: {error}", flush=True)
        del side, model
        gc.collect()
        devices.release_cached_memory()
    _show(options, results, bounds, rate)
    if options.json:
        told = {name: [each.as_json() for each in found] for name, found in results.items()}
        options.json.write_text(json.dumps({"rate": rate, "bound": bounds, **told}))
    if failed:
        raise SystemExit(1)


def _show(
    options: argparse.Namespace,
    results: dict[str, list[Figures]],
    bounds: list[float],
    rate: float,
) -> None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    title = f"Llama {options.shape}, {options.dtype}, {name}, a copy moves {rate / 1e12:.2f} TB/s"
    table = Table("tokens/s", *map(str, options.streams), title=title)
    for side, found in results.items():
        table.add_row(side, *(f"{each.tokens_per_second:.0f}" for each in found))
    table.add_row("the memory's bound", *(f"{each:.0f}" for each in bounds))
    Console(width=100).print(table)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
