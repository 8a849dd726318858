"""A model that answers on stdout."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from loaderd.cli import output
from loaderd.cli.progress import progress_display
from loaderd.cli.units import count
from loaderd.client.errors import ModelNotLoadedError
from loaderd.client.types import FinishReason, ModelState

if TYPE_CHECKING:
    from loaderd.client import (
        Client,
        GenerationParameters,
        GenerationResult,
        GenerationStream,
        Message,
        Model,
    )


class Speaker:
    """Loads a model when it is first needed, or is gone again, and streams its answers."""

    def __init__(
        self,
        client: Client,
        name: str,
        parameters: GenerationParameters,
        timeout: float | None,
        *,
        stats: bool,
    ) -> None:
        self._client = client
        self._name = name
        self._parameters = parameters
        self._timeout = timeout
        self._stats = stats
        self._model: Model | None = None

    def has_chat_template(self) -> bool:
        """Whether the model takes messages."""
        details = self._ready_model().details
        return details is not None and details.has_chat_template

    def say(self, prompt: str | list[Message], spoken: list[str]) -> None:
        """Streams the answer to stdout, and into `spoken` piece by piece.

        A model that was unloaded since the last answer is loaded again.
        """
        try:
            self._say(prompt, spoken)
        except ModelNotLoadedError:
            if spoken:
                raise
            self._model = None
            self._say(prompt, spoken)

    def _say(self, prompt: str | list[Message], spoken: list[str]) -> None:
        with self._stream(prompt) as stream:
            try:
                for delta in stream:
                    spoken.append(delta.text)
                    sys.stdout.write(delta.text)
                    sys.stdout.flush()
            except BaseException:
                if any(spoken):
                    _end_line(spoken)  # what is told of the failure stands by itself
                raise
        _end_line(spoken)
        if self._stats:
            output.message(_statistics(stream.result))
        if self._stats or sys.stderr.isatty():
            self._tell_limit(stream.result)

    def _tell_limit(self, result: GenerationResult) -> None:
        """Says that the answer goes on where a limit cut it off that nobody has set."""
        unasked = self._parameters.get("max_new_tokens") is None
        if not unasked or result.finish.reason is not FinishReason.LENGTH:
            return
        usage = result.usage
        text = f"stopped at {count(usage.generated_tokens, 'token')}"
        details = self._ready_model().details
        context = details.context_length if details is not None else None
        if context is not None and usage.prompt_tokens + usage.generated_tokens >= context:
            output.message(f"{text}: the model's context of {context} is full")
        else:
            output.message(f"{text}; --max-new-tokens for more")

    def _stream(self, prompt: str | list[Message]) -> GenerationStream:
        model = self._ready_model()
        if isinstance(prompt, str):
            return model.stream(prompt, timeout=self._timeout, **self._parameters)
        return model.stream(messages=prompt, timeout=self._timeout, **self._parameters)

    def _ready_model(self) -> Model:
        if self._model is None:
            self._model = self._find() or self._load()
        return self._model

    def _find(self) -> Model | None:
        """The model if it is loaded already, with whatever options."""
        try:
            model = self._client.model(self._name, timeout=self._timeout)
        except ModelNotLoadedError:
            return None
        return model if model.state is ModelState.READY else None

    def _load(self) -> Model:
        with progress_display(self._name) as display:
            model = self._client.load(self._name, on_progress=display.load, timeout=self._timeout)
        if model.info.stale:
            output.message(output.STALE)
        return model


def _end_line(spoken: list[str]) -> None:
    if not "".join(spoken).endswith("\n"):
        output.result("")


def _statistics(result: GenerationResult) -> str:
    usage, timings = result.usage, result.timings
    parts = [f"{count(usage.prompt_tokens, 'prompt token')}, {usage.generated_tokens} generated"]
    if timings.decode and usage.generated_tokens > 1:
        rate = (usage.generated_tokens - 1) / timings.decode.total_seconds()
        parts.append(f"{rate:.1f} tokens/s")
    first_ms = timings.time_to_first_token.total_seconds() * 1000
    parts.append(f"first token after {first_ms:.0f} ms")
    parts.append(f"ended by {result.finish.reason.name.lower()}")
    parts.append(f"seed {result.seed}")
    return ", ".join(parts)
