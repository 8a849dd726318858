"""The worker's engine without a daemon around it, in a process of its own.

`python -m benchmarks.engine_alone MODEL DTYPE` loads the model as a worker does, then reads a
request on each line of standard input, `{"prompts": [...], "tokens": 64}`, runs these prompts
together and answers with a line of figures.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from benchmarks.figures import Figures, StreamTimes, summarize
from loaderd.server.supervisor.launcher import worker_environment
from loaderd.v1 import generation_pb2, model_pb2
from loaderd.worker.v1 import worker_pb2

_DTYPES = {
    "float16": model_pb2.DTYPE_FLOAT16,
    "bfloat16": model_pb2.DTYPE_BFLOAT16,
    "float32": model_pb2.DTYPE_FLOAT32,
}


class EngineAlone:
    """The engine, started in a process with the environment of a worker.

    Args:
        model: Folder of the model.
        dtype: As users write it.
    """

    def __init__(self, model: Path, dtype: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.engine_alone", str(model), dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=worker_environment(),
            text=True,
        )
        self._line()

    def __enter__(self) -> EngineAlone:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.communicate()

    def run(self, prompts: Sequence[str], tokens: int) -> Figures:
        """Runs these prompts together, greedy, for this many new tokens each."""
        pipe = self._process.stdin
        if pipe is None:
            raise RuntimeError("no pipe")
        pipe.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
        pipe.flush()
        return Figures(**self._line())

    def _line(self) -> dict[str, Any]:
        pipe = self._process.stdout
        line = pipe.readline() if pipe is not None else ""
        if not line:
            raise RuntimeError("the engine's process has ended; it has said why")
        answer: dict[str, Any] = json.loads(line)
        return answer


class _Recorder:
    """Stands where a worker has its link to the daemon."""

    def __init__(self) -> None:
        self.streams: dict[int, StreamTimes] = {}
        self._open: set[int] = set()
        self._changed = threading.Condition()

    def begin(self, key: int) -> None:
        """Expects outputs with this key."""
        with self._changed:
            self.streams[key] = StreamTimes()
            self._open.add(key)

    def wait(self) -> None:
        """Until all have ended."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open)

    def send(self, **event: Any) -> None:
        """Takes an event, as `Link.send`."""
        if "load_failed" in event:
            raise RuntimeError(f"the model was not loaded: {event['load_failed']}")
        if "step" in event:
            with self._changed:
                for output in event["step"].outputs:
                    if output.key in self.streams:  # else it is of no request
                        self._take(output)
                self._changed.notify_all()

    def close(self) -> None:
        """As `Link.close`."""

    def _take(self, output: worker_pb2.Output) -> None:
        times = self.streams[output.key]
        match output.WhichOneof("event"):
            case "delta":
                times.arrive()
            case "finished":
                times.tokens = output.finished.usage.generated_tokens
                self._open.discard(output.key)
            case "error":
                times.error = str(output.error)
                self._open.discard(output.key)


def main() -> None:
    """Serves standard input."""
    from loaderd.server.worker.host import ModelHost
    from loaderd.server.worker.link import Link

    path, dtype = sys.argv[1:]
    recorder = _Recorder()
    host = ModelHost(cast(Link, recorder))
    options = model_pb2.LoadOptions(dtype=_DTYPES[dtype])
    host.load(worker_pb2.Load(path=path, model=path, options=options))
    print("{}", flush=True)
    key = 0
    for line in sys.stdin:
        asked = json.loads(line)
        recorder.streams.clear()
        for prompt in asked["prompts"]:
            key += 1
            recorder.begin(key)
            request = generation_pb2.StreamGenerateRequest(
                model=path,
                text=prompt,
                do_sample=False,
                max_new_tokens=asked["tokens"],
                ignore_eos=True,
            )
            host.generate(worker_pb2.Generate(key=key, request=request), time.monotonic())
        recorder.wait()
        print(json.dumps(summarize(list(recorder.streams.values())).as_json()), flush=True)


if __name__ == "__main__":
    main()
