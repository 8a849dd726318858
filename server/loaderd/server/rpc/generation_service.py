"""loaderd.v1.GenerationService."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import ExitStack, aclosing, asynccontextmanager
from typing import Any

import grpc

from loaderd.server.access.caller import Caller
from loaderd.server.access.quotas import Quotas
from loaderd.server.logs.call import current_request_id
from loaderd.server.models.loads import Loads
from loaderd.server.models.registry import ModelRegistry
from loaderd.server.rpc.access import current_caller
from loaderd.server.rpc.convert import keep_alive as keep_alive_of
from loaderd.server.rpc.observer import Observer
from loaderd.server.supervisor.output_stream import OutputStream
from loaderd.server.tracing import names
from loaderd.server.tracing.generation import watching
from loaderd.v1 import generation_pb2, generation_pb2_grpc
from loaderd.worker.v1 import worker_pb2

Context = grpc.aio.ServicerContext[Any, Any]


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Text from loaded models. The model's worker reads and checks the parameters."""

    def __init__(
        self,
        registry: ModelRegistry,
        loads: Loads,
        quotas: Quotas,
        observer: Observer | None = None,
    ) -> None:
        self._registry = registry
        self._loads = loads
        self._quotas = quotas
        self._observer = observer

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> generation_pb2.GenerateResponse:
        """Generates and answers once."""
        # The two requests are equal on the wire, field by field.
        streamed = generation_pb2.StreamGenerateRequest.FromString(request.SerializeToString())
        response = generation_pb2.GenerateResponse()
        texts: defaultdict[int, list[str]] = defaultdict(list)
        completions: defaultdict[int, generation_pb2.Completion] = defaultdict(
            generation_pb2.Completion
        )
        async with self._run(streamed, context) as (model_id, stream):
            response.model_id = model_id
            response.request_id = streamed.request_id
            async for message in stream:
                if message.HasField("delta"):
                    delta = message.delta
                    texts[delta.index].append(delta.text)
                    completions[delta.index].token_ids.extend(delta.token_ids)
                    completions[delta.index].logprobs.extend(delta.logprobs)
                elif message.HasField("prompt_logprobs"):
                    response.prompt_logprobs.extend(message.prompt_logprobs.logprobs)
                elif message.HasField("finished"):
                    end = message.finished
        response.usage.CopyFrom(end.usage)
        response.timings.CopyFrom(end.timings)
        response.seed = end.seed
        for index, finish in enumerate(end.finishes):
            completion = completions[index]
            completion.index = index
            completion.text = "".join(texts[index])
            completion.finish.CopyFrom(finish)
            response.completions.append(completion)
        return response

    async def StreamGenerate(
        self, request: generation_pb2.StreamGenerateRequest, context: Context
    ) -> AsyncIterator[generation_pb2.StreamGenerateResponse]:
        """Streams text as it comes."""
        async with self._run(request, context) as (model_id, stream):
            async for message in stream:
                if message.HasField("started"):
                    message.started.model_id = model_id
                yield message

    async def Tokenize(
        self, request: generation_pb2.TokenizeRequest, context: Context
    ) -> generation_pb2.TokenizeResponse:
        """Text or messages -> token ids."""
        reply = await self._call(request.model, worker_pb2.Call(tokenize=request))
        return reply.tokenize

    async def Detokenize(
        self, request: generation_pb2.DetokenizeRequest, context: Context
    ) -> generation_pb2.DetokenizeResponse:
        """Token ids -> text."""
        reply = await self._call(request.model, worker_pb2.Call(detokenize=request))
        return reply.detokenize

    async def ApplyChatTemplate(
        self, request: generation_pb2.ApplyChatTemplateRequest, context: Context
    ) -> generation_pb2.ApplyChatTemplateResponse:
        """Messages -> prompt."""
        call = worker_pb2.Call(apply_chat_template=request)
        return (await self._call(request.model, call)).apply_chat_template

    async def _call(self, model: str, call: worker_pb2.Call) -> worker_pb2.Reply:
        caller = current_caller()
        with ExitStack() as use:
            use.enter_context(self._quotas.request(caller))
            await self._loads.ensure(model, caller)
            _, worker = use.enter_context(self._registry.use(model))
            until_answered = use.pop_all()
        return await worker.link.call(call, on_end=until_answered.close)

    @asynccontextmanager
    async def _run(
        self, request: generation_pb2.StreamGenerateRequest, context: Context
    ) -> AsyncIterator[tuple[str, AsyncIterable[generation_pb2.StreamGenerateResponse]]]:
        if not request.HasField("request_id"):
            request.request_id = current_request_id()
        keep_alive = keep_alive_of(request)
        lease_id = request.lease_id if request.HasField("lease_id") else None
        if lease_id is not None:
            self._registry.leases.check(lease_id)
        caller = current_caller()
        # Asked for now: of a call that has ended, gRPC's core crashes when it is asked.
        client = caller.name or _connection_of(context.peer())
        # The model is in use until its worker is done, not until a slow client has read it all.
        with ExitStack() as use:
            use.enter_context(self._quotas.request(caller))
            await self._loads.ensure(request.model, caller)
            asker = request.cache_salt or client
            model_id, worker = use.enter_context(
                self._registry.use(request.model, keep_alive, lease_id, asker)
            )
            record = self._registry.find(model_id)
            with (
                watching({**record.span_attributes, names.WORKER: worker.pid}) as watch,
                worker.link.generate(request, use.close, client, watch) as stream,
            ):
                metered = _Metered(stream, self._quotas, caller)
                try:
                    if self._observer is None:
                        yield model_id, metered
                        return
                    told = self._observer.generating(str(record.name), metered)
                    async with aclosing(told) as messages:
                        yield model_id, messages
                finally:
                    metered.charge()


class _Metered:
    """A stream whose tokens are taken off its client's as they come."""

    def __init__(self, stream: OutputStream, quotas: Quotas, caller: Caller) -> None:
        self._stream = stream
        self._quotas = quotas
        self._caller = caller
        self._charged = 0

    async def __aiter__(self) -> AsyncIterator[generation_pb2.StreamGenerateResponse]:
        """The stream's messages."""
        async for message in self._stream:
            self.charge()
            yield message

    def charge(self) -> None:
        """Takes off what has come since the last time, read or not."""
        self._quotas.charge(self._caller, self._stream.tokens - self._charged)
        self._charged = self._stream.tokens


def _connection_of(peer: str) -> str:
    """What stands for a client without a name: its connection; empty if that tells nothing.

    A TCP connection has a port of its own: whoever opens it is a client. Of a unix socket gRPC
    tells the same of all connections, so that those who use it are one client to the queue.
    This is a courtesy among clients, not security: nothing keeps one from opening connections.
    """
    return peer if peer.startswith(("ipv4:", "ipv6:")) else ""
