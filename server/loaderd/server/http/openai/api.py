"""The routes below /v1."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route, Router

from loaderd.server.errors import LoaderdError
from loaderd.server.http.caller import caller
from loaderd.server.http.errors import body_of, defect
from loaderd.server.http.guard import Bounded, WhileConnected
from loaderd.server.http.openai.answer import Answer, usage
from loaderd.server.http.openai.asked import Asked
from loaderd.server.http.openai.chat import ChatAnswer, read_chat
from loaderd.server.http.openai.completions import TextAnswer, read_completion
from loaderd.server.http.openai.event_stream import DONE, EventStream, comment, event
from loaderd.server.http.openai.fields import Fields
from loaderd.server.logs.call import current_request_id
from loaderd.server.rpc.local import LocalCalls
from loaderd.v1 import model_pb2
from loaderd.v1.generation_pb2 import GenerateRequest, StreamGenerateResponse

_GENERATION = "loaderd.v1.GenerationService"
_MODELS = "loaderd.v1.ModelService"


class OpenAiApi:
    """Answers as OpenAI's API does, by the daemon's own services.

    Args:
        calls: Reaches them.
    """

    def __init__(self, calls: LocalCalls) -> None:
        self._calls = calls

    def routes(self) -> Mount:
        """All routes."""
        router = Router(
            [
                Route("/models", self._list_models),
                Route("/models/{model:path}", self._get_model),
                Route("/chat/completions", self._chat, methods=["POST"]),
                Route("/completions", self._complete, methods=["POST"]),
            ],
            redirect_slashes=False,
            middleware=[Middleware(Bounded), Middleware(WhileConnected)],
        )
        return Mount("/v1", router)

    async def _list_models(self, request: Request) -> Response:
        method = f"{_MODELS}/ListModels"
        listed = await self._calls.unary(method, model_pb2.ListModelsRequest(), caller(request))
        ready = [each for each in listed.models if each.state == model_pb2.MODEL_STATE_READY]
        names = Counter(each.name for each in ready)
        # Requests cannot tell two of one name apart but by their ids.
        data = [_model(each, each.name if names[each.name] == 1 else each.id) for each in ready]
        return JSONResponse({"object": "list", "data": data})

    async def _get_model(self, request: Request) -> Response:
        name = request.path_params["model"]
        wanted = model_pb2.GetModelRequest(model=name)
        found = await self._calls.unary(f"{_MODELS}/GetModel", wanted, caller(request))
        return JSONResponse(_model(found.model, name))

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, read_chat, ChatAnswer)

    async def _complete(self, request: Request) -> Response:
        return await self._answer(request, read_completion, TextAnswer)

    async def _answer(
        self,
        request: Request,
        read: Callable[[Fields], Asked],
        shape: Callable[[str, int, str], Answer],
    ) -> Response:
        if not _is_json(request):
            # Also what keeps pages that a browser shows from sending any without asking first.
            raise HTTPException(415, "the body must be JSON, with content-type application/json")
        asked = read(Fields.parse(await request.body()))
        request_id = asked.request.request_id = current_request_id()
        answer = shape(request_id, int(time.time()), asked.request.model)
        try:
            return await self._begin(request, asked, answer)
        except LoaderdError as error:
            raise asked.in_its_names(error) from error

    async def _begin(self, request: Request, asked: Asked, answer: Answer) -> Response:
        call = caller(request, asked.user)
        if not asked.stream:
            whole = GenerateRequest.FromString(asked.request.SerializeToString())
            return JSONResponse(
                answer.whole(await self._calls.unary(f"{_GENERATION}/Generate", whole, call))
            )
        messages = self._calls.stream(f"{_GENERATION}/StreamGenerate", asked.request, call)
        # What is refused is refused before the first message, and so with a status.
        first = await anext(messages)
        return EventStream(_events(asked, answer, first, messages))


async def _events(
    asked: Asked,
    answer: Answer,
    first: StreamGenerateResponse,
    rest: AsyncGenerator[StreamGenerateResponse, None],
) -> AsyncGenerator[bytes, None]:
    """A generation as events; one that fails on its way ends in an event that says so."""
    async with aclosing(rest):
        try:
            for each in _told(asked, answer, first):
                yield each
            async for message in rest:
                for each in _told(asked, answer, message):
                    yield each
            yield DONE
        except LoaderdError as error:
            yield event(body_of(asked.in_its_names(error)))
        except Exception as error:
            yield event(body_of(defect(error)))


def _told(asked: Asked, answer: Answer, message: StreamGenerateResponse) -> list[bytes]:
    """The events that one message becomes."""
    chunks: list[dict[str, Any]] = []
    match message.WhichOneof("event"):
        case "queued":
            return [comment(f"queued, {message.queued.position} before")]
        case "started":
            answer.fingerprint = message.started.model_id
            count = asked.request.n if asked.request.HasField("n") else 1
            chunks = [answer.chunk(choice) for choice in answer.opening(count)]
        case "delta":
            chunks = [answer.chunk(answer.delta(message.delta))]
        case "finished":
            finishes = enumerate(message.finished.finishes)
            chunks = [answer.chunk(answer.ending(index, finish)) for index, finish in finishes]
    if asked.include_usage:
        chunks = [{**chunk, "usage": None} for chunk in chunks]
        if message.HasField("finished"):
            chunks.append({**answer.chunk(), "usage": usage(message.finished.usage)})
    return [event(chunk) for chunk in chunks]


def _model(model: model_pb2.Model, name: str) -> dict[str, Any]:
    owner = model.repo_id.partition("/")[0] if "/" in model.repo_id else "local"
    return {
        "id": name,
        "object": "model",
        "created": model.created_at.seconds,
        "owned_by": owner,
    }


def _is_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0]
    return kind.strip().lower() == "application/json"
