"""Where the layers of a loaded model are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from loaderd.server.worker import devices
from loaderd.server.worker.devices import DISK


def layer_devices(model: PreTrainedModel) -> dict[str, str]:
    """The device of each layer, and of each other module that has weights.

    Returns:
        Module name -> device, or "disk"; one entry with an empty name when all are on one.
    """
    found = {name: _device_of(model, name) for name in _units(model)}
    if len(set(found.values())) == 1:
        return {"": next(iter(found.values()))}
    return found


def weights_of(model: PreTrainedModel) -> list[nn.Parameter]:
    """All weights, each once; those that are offloaded have no data."""
    tied = model.all_tied_weights_keys  # of which no two are one any more, once offloaded
    return [
        weight for name, weight in model.named_parameters() if not (weight.is_meta and name in tied)
    ]


def offloaded_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that are elsewhere than where they are computed."""
    return sum(weight.nbytes for weight in weights_of(model) if weight.is_meta)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go."""
    embeddings = model.get_input_embeddings()
    device: torch.device = embeddings.weight.device
    if device.type != "meta":
        return device
    # accelerate brings what is offloaded to this device in each step.
    return torch.device(embeddings._hf_hook.execution_device)


def _units(model: PreTrainedModel) -> Iterator[str]:
    """Names of layers, and of modules outside of them that have weights of their own."""
    layers = model._no_split_modules or ()
    pending: list[tuple[str, nn.Module]] = [("", model)]
    while pending:
        name, module = pending.pop()
        own = next(module.parameters(recurse=False), None) is not None
        if own or type(module).__name__ in layers:
            yield name
            continue
        prefix = f"{name}." if name else ""
        inner = [(prefix + child, each) for child, each in module.named_children()]
        pending += [
            each for each in reversed(inner) if next(each[1].parameters(), None) is not None
        ]


def _device_of(model: PreTrainedModel, name: str) -> str:
    weight = next(model.get_submodule(name).parameters())
    if not weight.is_meta:
        return devices.name_of(weight.device)
    placed: Mapping[str, Any] = model.hf_device_map
    while name not in placed:
        name = name.rpartition(".")[0]
    return DISK if placed[name] == DISK else devices.name_of(torch.device(placed[name]))
