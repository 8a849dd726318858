"""The fake's text: bytes are tokens, and what comes is a function of the request."""
# ruff: noqa: N802 - names of the protocol

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import grpc
from google.protobuf.struct_pb2 import Struct

from loaderd.v1 import generation_pb2, generation_pb2_grpc, model_pb2
from tests.fake_daemon.failure import FailureError

if TYPE_CHECKING:
    from tests.fake_daemon.daemon import FakeDaemon

EOS = 256
VOCABULARY = 257
DRAWN_SEED = 4711
DEFAULT_MAX_NEW_TOKENS = 256
INPUTS = {"text", "token_ids", "messages"}
SUPPORTED = {
    "bypass_prefix_cache",
    "request_id",
    "keep_alive",
    "lease_id",
    "chat_template_kwargs",
    "add_special_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "n",
    "best_of",
    "max_new_tokens",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "echo",
    "skip_special_tokens",
    "return_token_ids",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "num_beams",
    "length_penalty",
    "early_stopping",
}
SAMPLING: tuple[Literal["top_k", "top_p", "seed"], ...] = ("top_k", "top_p", "seed")
NO_BEAMS = {"do_sample", "top_k", "top_p", "stop", "logprobs", "top_logprobs"}
LETTERS = b"abcdefghijklmnopqrstuvwxyz     "


def render(
    messages: list[generation_pb2.ChatMessage], variables: Struct, *, open_turn: bool = True
) -> str:
    """A template that reads `enable_thinking`."""
    turns = "".join(f"<{message.role}>{message.content}\n" for message in messages)
    thinking = not variables.fields or variables["enable_thinking"]
    opening = "<assistant>" if thinking else "<assistant><think></think>"
    return turns + opening if open_turn else turns


def logprob(token: int, place: int, top: int) -> generation_pb2.TokenLogprob:
    """Every token is the best at its place; how good, its place tells."""

    def text(token: int) -> str:
        return "<end>" if token == EOS else chr(token)

    own = -((7 * place + token) % 5 + 1) / 4
    others = [(token + more) % VOCABULARY for more in range(top)]
    return generation_pb2.TokenLogprob(
        token_id=token,
        text=text(token),
        logprob=own,
        top=[
            generation_pb2.TokenAlternative(token_id=other, text=text(other), logprob=own - more)
            for more, other in enumerate(others)
        ],
    )


class Writer:
    """Writes one completion, token by token."""

    def __init__(
        self, request: generation_pb2.StreamGenerateRequest, prompt: bytes, index: int, seed: int
    ) -> None:
        self.index = index
        self.finish: generation_pb2.Finish | None = None
        self.token_ids: list[int] = []
        self.logprobs: list[generation_pb2.TokenLogprob] = []
        self._request = request
        self._tokens = self._source(prompt, index, seed)
        self._held = prompt.decode(errors="replace") if request.echo else ""

    def step(self) -> generation_pb2.GenerationDelta | None:
        """The next token's delta; None when it brings no text yet."""
        token = next(self._tokens)
        self.token_ids.append(token)
        told = logprob(token, len(self.token_ids) + self.index, self._request.top_logprobs)
        self.logprobs.append(told)
        if token == EOS:
            self.finish = self._stop(eos_token_id=EOS)
        elif token in self._request.stop_token_ids:
            self.finish = self._stop(stop_token_id=token)
        else:
            self._held += chr(token)
        text = self._release()
        token_ids = [token] if self._request.return_token_ids else []
        asked = self._request.logprobs or self._request.top_logprobs
        delta = generation_pb2.GenerationDelta(
            index=self.index, text=text, token_ids=token_ids, logprobs=[told] if asked else []
        )
        return delta if text or token_ids or asked else None

    def score(self) -> float:
        """Mean log probability."""
        return sum(told.logprob for told in self.logprobs) / len(self.logprobs)

    def _release(self) -> str:
        """Text of which no stop string can grow any more."""
        for stop in self._request.stop:
            if self.finish is None and stop in self._held:
                self.finish = self._stop(stop_string=stop)
                end = self._held.index(stop)
                end += len(stop) if self._request.include_stop_str_in_output else 0
                return self._held[:end]
        limit = self._request.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        if self.finish is None and len(self.token_ids) >= limit:
            self.finish = generation_pb2.Finish(reason=generation_pb2.FINISH_REASON_LENGTH)
        keep = 0
        if self.finish is None:
            keep = max((self._overlap(stop) for stop in self._request.stop), default=0)
        end = len(self._held) - keep
        text, self._held = self._held[:end], self._held[end:]
        return text

    def _overlap(self, stop: str) -> int:
        """Characters at the end of the text that may be the begin of `stop`."""
        lengths = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((n for n in lengths if self._held.endswith(stop[:n])), 0)

    def _stop(self, **stop: Any) -> generation_pb2.Finish:
        return generation_pb2.Finish(reason=generation_pb2.FINISH_REASON_STOP, **stop)

    def _source(self, prompt: bytes, index: int, seed: int) -> Iterator[int]:
        if self._request.HasField("messages"):
            messages = self._request.messages.messages
            yield from f"[{len(messages)}] you said: {messages[-1].content}".encode("ascii")
            while not self._request.ignore_eos:
                yield EOS
        for place in itertools.count():
            digest = hashlib.sha256(b"%d %d %d " % (seed, index, place) + prompt).digest()
            yield LETTERS[digest[0] % len(LETTERS)]


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    def __init__(self, daemon: FakeDaemon) -> None:
        self._daemon = daemon

    def Generate(
        self, request: generation_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> generation_pb2.GenerateResponse:
        response = generation_pb2.GenerateResponse()
        same = generation_pb2.StreamGenerateRequest.FromString(request.SerializeToString())
        with self._daemon.seen("Generate", request, context).follow(context):
            deltas: list[generation_pb2.GenerationDelta] = []
            for message in self._run(same, context):
                if message.HasField("started"):
                    response.request_id = message.started.request_id
                    response.model_id = message.started.model_id
                elif message.HasField("delta"):
                    deltas.append(message.delta)
                elif message.HasField("prompt_logprobs"):
                    response.prompt_logprobs.extend(message.prompt_logprobs.logprobs)
                else:
                    response.usage.CopyFrom(message.finished.usage)
                    response.timings.CopyFrom(message.finished.timings)
                    response.seed = message.finished.seed
                    for index, finish in enumerate(message.finished.finishes):
                        mine = [delta for delta in deltas if delta.index == index]
                        response.completions.add(
                            index=index,
                            text="".join(delta.text for delta in mine),
                            token_ids=[token for delta in mine for token in delta.token_ids],
                            logprobs=[told for delta in mine for told in delta.logprobs],
                            finish=finish,
                        )
        return response

    def StreamGenerate(
        self, request: generation_pb2.StreamGenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[generation_pb2.StreamGenerateResponse]:
        with self._daemon.seen("StreamGenerate", request, context).follow(context):
            yield from self._run(request, context)

    def _run(
        self, request: generation_pb2.StreamGenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[generation_pb2.StreamGenerateResponse]:
        with self._daemon.models.in_use(request.model) as model:
            self._daemon.models.keep(model, request)
            self._check(request, model)
            prompt = self._prompt(request)
            sampled = request.temperature > 0 or any(request.HasField(name) for name in SAMPLING)
            seed = request.seed if request.HasField("seed") else DRAWN_SEED
            writers = [
                Writer(request, prompt, index, seed if sampled else 0)
                for index in range(max(request.num_beams, request.best_of or request.n or 1))
            ]
            ranked = request.best_of or request.num_beams > 1
            held: list[generation_pb2.GenerationDelta] | None = [] if ranked else None
            started = generation_pb2.GenerationStarted(
                request_id=request.request_id or "r-1",
                model_id=model.id,
                prompt_tokens=len(prompt),
                seed=seed,
            )
            yield generation_pb2.StreamGenerateResponse(started=started)
            if request.HasField("prompt_logprobs"):
                top = request.prompt_logprobs
                told = [logprob(token, place, top) for place, token in enumerate(prompt)][1:]
                prompt_logprobs = generation_pb2.PromptLogprobs(logprobs=told)
                yield generation_pb2.StreamGenerateResponse(prompt_logprobs=prompt_logprobs)
            while active := [writer for writer in writers if writer.finish is None]:
                if not self._daemon.pause(context, self._daemon.token_s):
                    return
                if model.state != model_pb2.MODEL_STATE_READY:
                    raise FailureError("MODEL_UNLOADED", model=model.name)
                for writer in active:
                    if (delta := writer.step()) is not None and held is not None:
                        held.append(delta)
                    elif delta is not None:
                        yield generation_pb2.StreamGenerateResponse(delta=delta)
            best = writers
            if held is not None:
                best = sorted(writers, key=lambda writer: -writer.score())[: request.n or 1]
            for index, writer in enumerate(best):
                for delta in [delta for delta in held or () if delta.index == writer.index]:
                    shown = generation_pb2.StreamGenerateResponse(delta=delta)
                    shown.delta.index = index
                    yield shown
            finished = generation_pb2.GenerationFinished(
                finishes=[writer.finish for writer in best if writer.finish],
                usage=generation_pb2.Usage(
                    prompt_tokens=len(prompt),
                    generated_tokens=sum(len(writer.token_ids) for writer in writers),
                ),
                seed=seed,
            )
            finished.timings.prefill.FromMilliseconds(20)
            finished.timings.decode.FromMilliseconds(500)
            finished.timings.time_to_first_token.FromMilliseconds(25)
            self._daemon.models.count(model, finished.usage)
            yield generation_pb2.StreamGenerateResponse(finished=finished)

    def _check(self, request: generation_pb2.StreamGenerateRequest, model: model_pb2.Model) -> None:
        for field, _ in request.ListFields():
            if field.name not in SUPPORTED | INPUTS | {"model"}:
                raise FailureError("UNSUPPORTED_OPTION", field=field.name, problem="not here")
        if not 0 <= request.temperature <= 100:
            raise FailureError("INVALID_ARGUMENT", field="temperature", problem="not 0 to 100")
        if request.HasField("max_new_tokens") and not request.max_new_tokens:
            raise FailureError("INVALID_ARGUMENT", field="max_new_tokens", problem="below 1")
        if request.top_logprobs and request.HasField("logprobs") and not request.logprobs:
            raise FailureError("INVALID_ARGUMENT", field="top_logprobs", problem="contradicts")
        self._check_beams(request)
        self._check_input(request, model)

    def _check_beams(self, request: generation_pb2.StreamGenerateRequest) -> None:
        given = {field.name: value for field, value in request.ListFields()}
        if not 1 <= given.get("num_beams", 1) <= 32:
            raise FailureError("INVALID_ARGUMENT", field="num_beams", problem="not 1 to 32")
        refused: list[str]
        if request.num_beams <= 1:
            refused = [name for name in ("length_penalty", "early_stopping") if name in given]
        elif request.n > request.num_beams:
            refused = ["n"]
        else:
            refused = [name for name in sorted(NO_BEAMS) if given.get(name)]
            refused += ["temperature"] if request.temperature > 0 else []
            refused += ["best_of"] if request.best_of > (request.n or 1) else []
        if refused:
            raise FailureError("INVALID_ARGUMENT", field=refused[0], problem="beams")

    def _check_input(self, request: Any, model: model_pb2.Model) -> None:
        kind = request.WhichOneof("input")
        if kind is None:
            raise FailureError("INVALID_ARGUMENT", field="input", problem="is missing")
        if kind == "messages":
            self._check_messages(request.messages.messages, request.chat_template_kwargs, model)
        elif request.HasField("chat_template_kwargs"):
            raise FailureError(
                "INVALID_ARGUMENT", field="chat_template_kwargs", problem="messages only"
            )
        if kind == "token_ids" and any(token >= VOCABULARY for token in request.token_ids.ids):
            raise FailureError("INVALID_ARGUMENT", field="token_ids", problem="unknown")

    def _check_messages(
        self,
        messages: list[generation_pb2.ChatMessage],
        variables: Struct,
        model: model_pb2.Model,
    ) -> None:
        if not model.details.has_chat_template:
            raise FailureError("UNSUPPORTED_OPTION", field="messages", problem="no chat template")
        if not messages:
            raise FailureError("INVALID_ARGUMENT", field="messages", problem="must not be empty")
        for name in variables.fields.keys() - {"enable_thinking"}:
            problem = f"the model's chat template takes enable_thinking, and no {name!r}"
            raise FailureError("UNSUPPORTED_OPTION", field="chat_template_kwargs", problem=problem)

    def _prompt(self, request: Any) -> bytes:
        match request.WhichOneof("input"):
            case "token_ids":
                return bytes(token for token in request.token_ids.ids if token != EOS)
            case "messages":
                return render(request.messages.messages, request.chat_template_kwargs).encode()
        return bytes(request.text, "utf-8")

    def Tokenize(
        self, request: generation_pb2.TokenizeRequest, context: Any
    ) -> generation_pb2.TokenizeResponse:
        with self._daemon.seen("Tokenize", request, context).follow(context):
            self._check_input(request, self._daemon.models.ready(request.model))
            prompt = self._prompt(request)
        return generation_pb2.TokenizeResponse(token_ids=prompt, tokens=map(chr, prompt))

    def Detokenize(
        self, request: generation_pb2.DetokenizeRequest, context: Any
    ) -> generation_pb2.DetokenizeResponse:
        with self._daemon.seen("Detokenize", request, context).follow(context):
            self._daemon.models.ready(request.model)
            if any(token >= VOCABULARY for token in request.token_ids):
                raise FailureError("INVALID_ARGUMENT", field="token_ids", problem="unknown")
            text = bytes(token for token in request.token_ids if token != EOS)
        return generation_pb2.DetokenizeResponse(text=text.decode(errors="replace"))

    def ApplyChatTemplate(
        self, request: generation_pb2.ApplyChatTemplateRequest, context: Any
    ) -> generation_pb2.ApplyChatTemplateResponse:
        with self._daemon.seen("ApplyChatTemplate", request, context).follow(context):
            model = self._daemon.models.ready(request.model)
            self._check_messages(list(request.messages), request.chat_template_kwargs, model)
            open_turn = not request.HasField("add_generation_prompt")
            text = render(
                list(request.messages),
                request.chat_template_kwargs,
                open_turn=open_turn or request.add_generation_prompt,
            )
        return generation_pb2.ApplyChatTemplateResponse(text=text, token_ids=text.encode())
