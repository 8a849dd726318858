"""What the daemon's commands do. Importing this module pays all import time that loading needs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import accelerate  # noqa: F401 - loading imports it
import torch
import transformers
from google.protobuf.duration_pb2 import Duration
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama  # noqa: F401 - most models build on it
from transformers.models.qwen2 import modeling_qwen2  # noqa: F401 - as above

from loaderd.server.box.cpu import CPU, cores
from loaderd.server.box.dtype import choose_dtype, cpu_flags
from loaderd.server.errors import LoaderdError, ModelNotLoadedError
from loaderd.server.logs.call import bind
from loaderd.server.worker import devices
from loaderd.server.worker.engine.batching.build import EngineSettings, batching_engine
from loaderd.server.worker.engine.batching.caches import cache_folder
from loaderd.server.worker.engine.batching.suitability import UnsuitableError
from loaderd.server.worker.engine.batching.trials import Trials
from loaderd.server.worker.engine.completion import Tokenizer
from loaderd.server.worker.engine.parameters import ModelFacts, check_supported, typed_request
from loaderd.server.worker.engine.protocol import Engine
from loaderd.server.worker.engine.sequential import SequentialEngine
from loaderd.server.worker.facts import TORCH_DTYPES, model_details, model_facts
from loaderd.server.worker.failures import error_message, incident
from loaderd.server.worker.layout import Layout
from loaderd.server.worker.link import Link
from loaderd.server.worker.loader import ModelLoader
from loaderd.server.worker.passing_thread import in_passing_thread
from loaderd.server.worker.quantization import choose_quantizer, quantization_reason
from loaderd.server.worker.tokenization import Tokenization, special_ids
from loaderd.v1.model_pb2 import Offload
from loaderd.worker.v1 import worker_pb2

logger = logging.getLogger(__name__)

_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "accelerate")


@dataclass(frozen=True)
class _Hosted:
    """The loaded model."""

    facts: ModelFacts
    engine: Engine
    tokenization: Tokenization


class ModelHost:
    """Holds at most one model and answers for it. No error leaves it but as an event.

    Args:
        link: Takes the events.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._hosted: _Hosted | None = None
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(min(torch.get_num_threads(), cores()))

    def stand_by(self) -> None:
        """Tells the daemon that a load can come."""
        versions = {library: version(library) for library in _LIBRARIES}
        measured_at = time.monotonic()
        standby = worker_pb2.Standby(
            devices=devices.inventory(), versions=versions, measured_at=measured_at
        )
        self._link.send(standby=standby)

    def load(self, command: worker_pb2.Load) -> None:
        """Loads the model; after a failure the stream ends."""
        if self._hosted is not None:
            logger.error("asked to load %s, but a model is loaded already", command.model)
            return
        in_passing_thread(partial(self._try_to_load, command), "load")

    def _try_to_load(self, command: worker_pb2.Load) -> None:
        # The thread's lines in the log, and nobody else's: it ends with the load.
        bind(trace_id=command.trace.trace_id, span_id=command.trace.span_id)
        try:
            self._link.send(loaded=self._load(command))
        except LoaderdError as error:
            self._fail(error)
        except Exception as error:
            self._fail(incident(error, f"loading {command.model}", quotes_prompts=False))

    def generate(self, command: worker_pb2.Generate, arrived: float) -> None:
        """Starts a generation request.

        Args:
            command: The request.
            arrived: Monotonic time of its arrival.
        """
        request = command.request
        try:
            hosted = self._model(request.model)
            check_supported(request, hosted.engine.name, hosted.engine.supported_parameters)
            prompt = hosted.tokenization.prompt(request)
            hosted.engine.submit(
                typed_request(
                    request,
                    key=command.key,
                    prompt=prompt,
                    arrived=arrived,
                    facts=hosted.facts,
                    client=command.client,
                    bad_words=hosted.tokenization.bad_words(request),
                    trace=command.trace,
                )
            )
        except LoaderdError as error:
            self._refuse(command.key, error)
        except Exception as error:
            self._refuse(command.key, incident(error, f"taking request {request.request_id}"))

    def cancel(self, command: worker_pb2.Cancel) -> None:
        """Stops a generation request."""
        if self._hosted is not None:
            self._hosted.engine.cancel(command.key)

    def call(self, command: worker_pb2.Call) -> None:
        """Does tokenizer work."""
        asked = command.WhichOneof("request")
        name = getattr(command, asked).model if asked else ""
        try:
            reply = self._model(name).tokenization.answer(command)
        except LoaderdError as error:
            reply = worker_pb2.Reply(error=error_message(error))
        except Exception as error:
            reply = worker_pb2.Reply(error=error_message(incident(error, "doing tokenizer work")))
        reply.key = command.key
        self._link.send(reply=reply)

    def _load(self, command: worker_pb2.Load) -> worker_pb2.Loaded:
        begin, before = time.monotonic(), devices.held_bytes()
        options = command.options
        layout = _layout(command)
        layout.check()
        dtype = choose_dtype(
            options.dtype,
            on_accelerator=layout.kind != CPU,
            flags=cpu_flags(),
            quantization=options.quantization,
        )
        quantizer = choose_quantizer(
            options.quantization, device_map=layout.main, dtype=TORCH_DTYPES[dtype.dtype]
        )
        loader = ModelLoader(
            command.path,
            dtype=TORCH_DTYPES[dtype.dtype],
            device_map=layout.device_map,
            max_memory=layout.max_memory,
            offload=layout.offload,
            offload_folder=layout.folder,
            shown_name=command.model,
            allow_pickle=command.allow_pickle,
            quantizer=quantizer,
        )
        model, tokenizer = loader.load_model(), loader.load_tokenizer()
        form = quantization_reason(model, quantizer, is_gguf=loader.is_gguf)
        weights = Duration()
        weights.FromNanoseconds(round((time.monotonic() - begin) * 1e9))
        facts = model_facts(model)
        completions = Tokenizer(tokenizer, special_ids(tokenizer))
        bounds = {
            device: before.get(device, 0) + most for device, most in options.max_memory.items()
        }
        engine, reason, later_bytes = self._engine(
            model, completions, command.model, facts, EngineSettings(max_device_bytes=bounds)
        )
        self._hosted = _Hosted(facts, engine, Tokenization(tokenizer, facts.vocabulary_size))
        details = model_details(
            model,
            tokenizer,
            dtype,
            engine,
            reason,
            quantization=options.quantization,
            quantization_reason=form,
        )
        taken = {
            device: max(held - before[device], 0) for device, held in devices.held_bytes().items()
        }
        taken[CPU] = taken.get(CPU, 0) + later_bytes
        return worker_pb2.Loaded(details=details, weights=weights, held_bytes=taken)

    def _engine(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        name: str,
        facts: ModelFacts,
        settings: EngineSettings,
    ) -> tuple[Engine, str, int]:
        """The best engine that can serve the model, why it is this one, and `later_bytes`."""
        try:
            return batching_engine(
                model,
                tokenizer,
                name,
                self._emit,
                on_death=_end_process,
                context_length=facts.context_length,
                settings=settings,
                trials=Trials(cache_folder("trials")),
            )
        except UnsuitableError as error:
            logger.info("%s is served one request at a time: %s", name, error)
            sequential = SequentialEngine(model, tokenizer, name, self._emit, on_death=_end_process)
            return sequential, f"no batches: {error}", 0

    def _fail(self, error: LoaderdError) -> None:
        logger.error("load failed: %s", error.reason)
        self._link.send(load_failed=worker_pb2.LoadFailed(error=error_message(error)))
        self._link.close()

    def _model(self, name: str) -> _Hosted:
        if self._hosted is None:
            raise ModelNotLoadedError(name)
        return self._hosted

    def _refuse(self, key: int, error: LoaderdError) -> None:
        self._emit([worker_pb2.Output(key=key, error=error_message(error))])

    def _emit(self, outputs: Sequence[worker_pb2.Output]) -> None:
        self._link.send(step=worker_pb2.Step(outputs=outputs))


def _layout(command: worker_pb2.Load) -> Layout:
    options = command.options
    device_map: str | dict[str, str] = dict(options.module_map)
    if not device_map:
        device_map = options.device_map if options.HasField("device_map") else devices.AUTO
    offload = Offload.Name(options.offload).removeprefix("OFFLOAD_").lower()
    return Layout(
        device_map,
        max_memory=dict(command.weight_room) or None,
        offload=offload if options.offload else "",
        folder=Path(command.offload_folder) if command.offload_folder else None,
    )


def _end_process() -> None:
    logging.shutdown()
    os._exit(1)
