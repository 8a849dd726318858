"""What a worker says about one request, put together."""

from __future__ import annotations

from dataclasses import dataclass, field

from loaderd.v1 import generation_pb2
from loaderd.worker.v1 import worker_pb2


@dataclass
class Outputs:
    """Everything that came for one request."""

    started: generation_pb2.GenerationStarted | None = None
    positions: list[int] = field(default_factory=list)
    prompt_logprobs: list[generation_pb2.TokenLogprob] = field(default_factory=list)
    deltas: list[generation_pb2.GenerationDelta] = field(default_factory=list)
    finished: generation_pb2.GenerationFinished | None = None
    error: worker_pb2.Error | None = None

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for delta in self.deltas for token_id in delta.token_ids]

    @property
    def finish(self) -> generation_pb2.Finish:
        assert self.finished is not None, self.error
        (finish,) = self.finished.finishes
        return finish

    @property
    def ended(self) -> bool:
        return self.finished is not None or self.error is not None

    def add(self, output: worker_pb2.Output) -> None:
        assert not self.ended, "nothing may follow the last output"
        match output.WhichOneof("event"):
            case "started":
                assert self.started is None
                self.started = output.started
            case "queued":
                assert self.started is None
                self.positions.append(output.queued.position)
            case "prompt_logprobs":
                assert self.started is not None
                assert not self.deltas
                self.prompt_logprobs.extend(output.prompt_logprobs.logprobs)
            case "delta":
                assert self.started is not None
                self.deltas.append(output.delta)
            case "finished":
                self.finished = output.finished
            case "error":
                self.error = output.error
