"""Readies a model for batches: in the fastest of the ways in which it computes the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from loaderd.server.worker.engine.batching.attention import NAME
from loaderd.server.worker.engine.batching.cuda_graphs import CudaGraphs
from loaderd.server.worker.engine.batching.forward import (
    FlatForward,
    Forward,
    ModuleForward,
    can_flatten,
)
from loaderd.server.worker.engine.batching.linear import Linears, fastest, speed_up
from loaderd.server.worker.engine.batching.native import forward as native
from loaderd.server.worker.engine.batching.native.compiler import NotCompiledError
from loaderd.server.worker.engine.batching.native.kernels import Kernels
from loaderd.server.worker.engine.batching.suitability import (
    Findings,
    UnsuitableError,
    examine,
)
from loaderd.server.worker.engine.batching.trials import Outcome, Trials, Way, identity_of

logger = logging.getLogger(__name__)

_TOLD = {
    Way.NATIVE: "as one sequence of operators, most of them compiled for this CPU",
    Way.FLAT: "as one sequence of operators",
    Way.MODULES: "module by module",
}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model that computes the same in batches.

    Attributes:
        forward: It.
        outcome: What trying it brought, now or some time before.
        linears: How its linear layers are computed.
        kernels: For its attention; None for torch's.
        no_graphs: Why decode steps cannot be recorded, as far as was found out; None where they
            can, or where nothing records.
        how: What was chosen, for operators.
    """

    forward: Forward
    outcome: Outcome
    linears: Linears
    kernels: Kernels | None
    no_graphs: str | None
    how: str


def prepare(
    model: PreTrainedModel,
    trials: Trials,
    room_for_copies: int,
    find_kernels: Callable[[], Kernels],
) -> Prepared:
    """Gives the model our attention and our linear layers, and tries it if that was never done.

    Args:
        model: Changed in place.
        trials: What was found out before.
        room_for_copies: Bytes that copies of weights may take.
        find_kernels: Asked if the model is on the CPU.

    Raises:
        UnsuitableError: It does not compute the same.
    """
    kernels, missing = _kernels(model, find_kernels)
    identity = identity_of(model, None if kernels is None else kernels.identity)
    outcome, no_graphs = trials.find(identity), None
    if outcome is not None:
        model.set_attn_implementation(NAME)
        linears = speed_up(model, outcome.linears, room_for_copies)
    else:
        findings, kernels = _examine(model, kernels)
        best = fastest(model)
        linears = speed_up(model, best, room_for_copies)
        linears.make_copies()  # they take part in the trial
        sizes = {str(device): size for device, size in findings.bytes_per_token.items()}
        way = _way(model, findings, linears, kernels)
        outcome = Outcome(sizes, findings.windows, kernels is not None, way, best)
        forward = _forward(model, way, findings.windows, linears, kernels)
        no_graphs = _no_graphs(model, findings, forward)
        if no_graphs is None:  # else another load may have the memory that this one lacked
            trials.keep(identity, outcome)
    kernels = kernels if outcome.has_kernels else None
    way = outcome.way if can_flatten(model) else Way.MODULES
    forward = _forward(model, way, outcome.windows, linears, kernels)
    how = "; ".join(filter(None, [_TOLD[way], missing]))
    return Prepared(forward, outcome, linears, kernels, no_graphs, how)


def _kernels(
    model: PreTrainedModel, find_kernels: Callable[[], Kernels]
) -> tuple[Kernels | None, str]:
    """Those for a model, and why there are none, if there might be."""
    if any(place.type != "cpu" for place in places_of(model)):
        return None, ""
    try:
        return find_kernels(), ""
    except NotCompiledError as error:
        return None, f"no kernels were compiled: {error}"


def _examine(model: PreTrainedModel, kernels: Kernels | None) -> tuple[Findings, Kernels | None]:
    """With kernels, unless it is they with which it does not compute the same."""
    if kernels is not None:
        try:
            return examine(model, kernels), kernels
        except UnsuitableError as error:
            logger.info("with kernels of ours: %s", error)
    return examine(model), None


def _way(
    model: PreTrainedModel, findings: Findings, linears: Linears, kernels: Kernels | None
) -> Way:
    """The fastest that computes the same."""
    ways = [Way.NATIVE] * (kernels is not None and native.can_run(model))
    ways += [Way.FLAT] * can_flatten(model)
    for way in ways:
        if findings.agree(model, _forward(model, way, findings.windows, linears, kernels)):
            return way
    return Way.MODULES


def _forward(
    model: PreTrainedModel,
    way: Way,
    windows: Mapping[int, int | None],
    linears: Linears,
    kernels: Kernels | None,
) -> Forward:
    if way is Way.NATIVE and kernels is not None:
        return native.NativeForward(model, windows, kernels)
    if way is not Way.MODULES:
        return FlatForward(model, windows, linears.policy.activations)
    return ModuleForward(model)


def _no_graphs(model: PreTrainedModel, findings: Findings, forward: Forward) -> str | None:
    """Why decode steps cannot be recorded; None where they can, or where nothing records."""
    places = places_of(model)
    if all(place.type != "cuda" for place in places):
        return None
    if len(places) > 1:
        return "its layers are on several devices"
    try:
        # Not those of the engine: the memory of these goes with them.
        findings.check_static(model, forward, CudaGraphs(places.pop()))
    except UnsuitableError as error:
        return str(error)
    return None


def places_of(model: PreTrainedModel) -> set[torch.device]:
    """The devices that it is on."""
    return {parameter.device for parameter in model.parameters()}
