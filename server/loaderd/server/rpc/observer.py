"""Who looks on while calls run, such as metrics."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable
from typing import Protocol

from loaderd.v1.generation_pb2 import StreamGenerateResponse


class Observer(Protocol):
    """Told of every call; changes none."""

    def called(self, method: str, code: str) -> None:
        """A call over gRPC has ended.

        Args:
            method: Such as `loaderd.v1.ModelService/ListModels`.
            code: The name of its status code.
        """

    def generating(
        self, model: str, messages: AsyncIterable[StreamGenerateResponse]
    ) -> AsyncGenerator[StreamGenerateResponse, None]:
        """A request for text begins.

        Args:
            model: The name of the model.
            messages: What its worker sends.

        Returns:
            The same messages, as they come.
        """
