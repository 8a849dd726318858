"""Handles of loads, downloads and verifications under way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

from loaderd.client.receivers import DownloadReceiver, LoadReceiver, VerifyReceiver
from loaderd.client.sync.lease import Lease
from loaderd.client.sync.model import Model
from loaderd.client.sync.stream import Stream
from loaderd.client.sync.transport import ResponseStream, Transport
from loaderd.client.types import (
    DownloadPlan,
    DownloadProgress,
    LoadProgress,
    Snapshot,
    VerifyReport,
    VerifyUpdate,
)
from loaderd.v1 import cache_pb2, model_pb2

Message = TypeVar("Message")
Progress = TypeVar("Progress")
Result = TypeVar("Result")


class Operation(Stream[Message, Progress], ABC, Generic[Message, Progress, Result]):
    """Work of the daemon that reports progress and ends in a result.

    Iterate for progress; `result` waits for the end. Dropping the handle gives up waiting, and
    the daemon stops the work when nobody else waits for it.
    """

    @abstractmethod
    def result(self) -> Result:
        """Waits for the end and returns what came out."""

    def wait(self, on_progress: Callable[[Progress], object] | None) -> Result:
        """Reports each progress to `on_progress`, and returns the result."""
        with self:
            for progress in self:
                if on_progress is not None:
                    on_progress(progress)
            return self.result()

    def _read_to_end(self) -> None:
        for _ in self:
            pass


class LoadOperation(Operation[model_pb2.LoadModelResponse, LoadProgress, Model]):
    """A load under way; made by `Client.start_load`."""

    def __init__(
        self, transport: Transport, responses: ResponseStream[model_pb2.LoadModelResponse]
    ) -> None:
        self._transport = transport
        self._load = LoadReceiver()
        super().__init__(responses, self._load)

    def result(self) -> Model:
        """Waits for the model and returns it, READY.

        Raises:
            LoaderdError: The load failed, or was cancelled.
        """
        self._read_to_end()
        return Model(self._transport, self._load.result)

    def leased(self) -> Lease:
        """Waits for the model and returns the lease that was asked for with it.

        Raises:
            LoaderdError: The load failed, or was cancelled.
        """
        self._read_to_end()
        lease = self._load.lease
        return Lease(self._transport, lease, Model(self._transport, self._load.result, lease.id))


class DownloadOperation(Operation[cache_pb2.DownloadModelResponse, DownloadProgress, Snapshot]):
    """A download under way; made by `CacheClient.start_download`."""

    def __init__(self, responses: ResponseStream[cache_pb2.DownloadModelResponse]) -> None:
        self._download = DownloadReceiver()
        super().__init__(responses, self._download)

    @property
    def plan(self) -> DownloadPlan | None:
        """What it fetches; None before that is known, and when the hub is not asked or mute."""
        return self._download.plan

    def result(self) -> Snapshot:
        """Waits for the snapshot and returns it, complete.

        Raises:
            LoaderdError: The download failed, or was cancelled.
        """
        self._read_to_end()
        return self._download.result


class VerifyOperation(Operation[cache_pb2.VerifySnapshotResponse, VerifyUpdate, VerifyReport]):
    """A verification under way; made by `CacheClient.start_verify`.

    It yields how far it is, each problem as it is found, and how far a repair is.
    """

    def __init__(self, responses: ResponseStream[cache_pb2.VerifySnapshotResponse]) -> None:
        self._verification = VerifyReceiver()
        super().__init__(responses, self._verification)

    def result(self) -> VerifyReport:
        """Waits for the report and returns it.

        Raises:
            LoaderdError: The verification, or the repair, failed or was cancelled.
        """
        self._read_to_end()
        return self._verification.result
