"""`python -m benchmarks.quantization`: what fewer bits cost and bring, in each form."""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.prompts import Prompts
from benchmarks.streams import (
    GREEDY,
    MODEL,
    SdkReader,
    integers,
    run_load,
    spawned_daemon,
    warm_up,
)
from loaderd.client import AsyncClient, AsyncModel
from loaderd.client.errors import UnsupportedOptionError
from loaderd.client.types import DtypeName, QuantizationName

_TEXT = Path(__file__).with_name("quantization_text.txt")
_FORMS: tuple[tuple[QuantizationName | None, DtypeName], ...] = (
    (None, "float32"),
    (None, "bfloat16"),
    ("int8", "float32"),
    ("int4", "bfloat16"),
    ("nf4", "float32"),
)


@dataclass(frozen=True)
class Form:
    """A way to load the model.

    Attributes:
        model: Its folder, or its GGUF file.
        dtype: Of what is computed.
        quantization: Of the weights; None for none.
    """

    model: Path
    dtype: DtypeName
    quantization: QuantizationName | None

    def __str__(self) -> str:
        kind = self.quantization or ("GGUF" if self.model.is_file() else "plain")
        return f"{kind}, {self.dtype}"


@dataclass(frozen=True)
class Measured:
    """What one form costs and brings.

    Attributes:
        form: The form.
        weight_bytes: Memory of the weights.
        load_s: From the request to READY.
        perplexity: Of the text.
        speeds: Tokens/s, by number of streams.
    """

    form: Form
    weight_bytes: int
    load_s: float
    perplexity: float
    speeds: tuple[float, ...]


def measure_quantization(
    model: Path, gguf: Path | None, *, tokens: int = 64, streams: Sequence[int] = (1, 8)
) -> Table:
    """Loads the model in one form after the other."""
    found, refused = asyncio.run(_measure(model, gguf, tokens, streams))
    heads = [f"{count} streams, tokens/s" for count in streams]
    title = f"{model.name}, quantized at load; {tokens} new tokens, one run"
    caption = "\n".join(refused)
    table = Table("", "weights", "until READY", "perplexity", *heads, title=title, caption=caption)
    plain = found[0].speeds
    for each in found:
        speeds = [
            f"{speed:.1f} ({speed / usual:.2f} x)"
            for speed, usual in zip(each.speeds, plain, strict=True)
        ]
        table.add_row(
            str(each.form),
            f"{each.weight_bytes / 1e6:.0f} MB",
            f"{each.load_s:.1f} s",
            f"{each.perplexity:.2f}",
            *speeds,
        )
    return table


async def _measure(
    model: Path, gguf: Path | None, tokens: int, streams: Sequence[int]
) -> tuple[list[Measured], list[str]]:
    found, refused = [], []
    roots = ["--allow-local", str(gguf.parent)] if gguf else []
    with spawned_daemon(model, arguments=roots) as daemon:
        async with AsyncClient(daemon.address) as client:
            for form in _forms(model, gguf):
                try:
                    loaded = await client.load(
                        str(form.model), dtype=form.dtype, quantization=form.quantization
                    )
                except UnsupportedOptionError as error:
                    refused.append(f"{form}: {error}")
                    continue
                found.append(await _figures(form, loaded, tokens, streams))
                print(found[-1], file=sys.stderr)
                await loaded.unload()
    return found, refused


def _forms(model: Path, gguf: Path | None) -> Iterator[Form]:
    for quantization, dtype in _FORMS:
        yield Form(model, dtype, quantization)
    if gguf is not None:
        yield Form(gguf, "float32", None)


async def _figures(form: Form, model: AsyncModel, tokens: int, streams: Sequence[int]) -> Measured:
    details, took = model.info.details, model.info.timings.total
    if details is None or took is None:
        raise RuntimeError(f"{model.name} is not READY")
    prompts = Prompts()
    reader = SdkReader(model, GREEDY)
    await warm_up(reader, prompts.take(max(streams)))
    speeds = []
    for count in streams:
        figures = await run_load(reader, prompts.take(count), tokens)
        if figures.errors:
            raise RuntimeError(f"streams failed: {figures.errors}")
        speeds.append(figures.tokens_per_second)
    result = await model.generate(_TEXT.read_text(), max_new_tokens=1, prompt_logprobs=0)
    logprobs = [token.logprob for token in result.prompt_logprobs]
    perplexity = math.exp(-sum(logprobs) / len(logprobs))
    return Measured(form, details.weight_bytes, took.total_seconds(), perplexity, tuple(speeds))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL, help=f"folder ({MODEL.name})")
    parser.add_argument("--gguf", type=Path, help="the same model as a GGUF file (none)")
    parser.add_argument("--streams", type=integers, default=[1, 8], help="loads (1,8)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each stream (64)")
    options = parser.parse_args()
    gguf = options.gguf.absolute() if options.gguf else None
    table = measure_quantization(
        options.model.absolute(), gguf, tokens=options.tokens, streams=options.streams
    )
    Console().print(table)


if __name__ == "__main__":
    main()
