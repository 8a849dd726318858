"""What trying models brought, on disk, so that the next load of such a model need not try again.

A trial is forward passes of the whole model, which take seconds where the model is large or the
CPU slow. What it finds out depends on the code that runs and on the model's configuration, not on
its weights; how fast its linear layers are, on the box.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from loaderd.server.box.cpu import cores
from loaderd.server.box.dtype import cpu_flags
from loaderd.server.worker import devices
from loaderd.server.worker.engine.batching.kernels import Form, LinearPolicy
from loaderd.server.worker.quantization import is_quantized

logger = logging.getLogger(__name__)

_MOST = 256
"""Outcomes that are kept; the oldest ones go."""


class Way(StrEnum):
    """How a model is run: see native/forward.py and forward.py."""

    NATIVE = "native"
    FLAT = "flat"
    MODULES = "modules"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What trying a model brought.

    Attributes:
        bytes_per_token: Of keys and values, over all layers of a device, by its name.
        windows: By layer, how far it looks back; None for all the way.
        has_kernels: Whether its attention computes the same with kernels of ours.
        way: How it is run.
        linears: The fastest way to compute its linear layers, were there memory for all.
    """

    bytes_per_token: Mapping[str, int]
    windows: Mapping[int, int | None]
    has_kernels: bool
    way: Way
    linears: LinearPolicy


class Trials:
    """Remembers outcomes.

    Args:
        folder: Where; None to remember nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def find(self, identity: str) -> Outcome | None:
        """The outcome for a model, if it was tried before and the note of it can be read."""
        if self._folder is None:
            return None
        try:
            return _read(json.loads((self._folder / f"{identity}.json").read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning("what was tried before cannot be read: %r", error)
            return None

    def keep(self, identity: str, outcome: Outcome) -> None:
        """Remembers an outcome, as far as the disk allows."""
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            scratch = self._folder / f"{identity}.{secrets.token_hex(4)}.tmp"
            scratch.write_text(json.dumps(asdict(outcome)))
            scratch.replace(self._folder / f"{identity}.json")
            notes = sorted(self._folder.iterdir(), key=lambda note: note.stat().st_mtime)
            for note in notes[:-_MOST]:
                note.unlink(missing_ok=True)
        except OSError as error:
            logger.info("what was tried is not remembered: %s", error)


UNREMEMBERED = Trials(None)
"""Every model is tried."""


def identity_of(model: PreTrainedModel, kernels: str | None = None) -> str:
    """A digest of all that an outcome depends on: the model's configuration and the code.

    Args:
        model: It.
        kernels: The identity of ours; None where there are none.
    """
    devices_used = {str(parameter.device) for parameter in model.parameters()}
    facts: dict[str, Any] = {
        "class": type(model).__name__,
        "config": model.config.to_json_string(use_diff=False),
        "dtype": str(model.dtype),
        "device_map": getattr(model, "hf_device_map", None),
        "devices": sorted(devices_used),
        "accelerators": [device.name for device in devices.accelerators()],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "quantization": _quantization(model),
        "cpu": [torch.backends.cpu.get_cpu_capability(), cores(), *sorted(cpu_flags())],
        "kernels": kernels,
        "engine": _code(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _quantization(model: PreTrainedModel) -> list[str]:
    """What its weights are made of; nothing for one that is not quantized."""
    kinds = {type(weight) for weight in model.parameters() if is_quantized(weight)}
    packages = {kind.__module__.partition(".")[0] for kind in kinds} - {"torch"}
    return sorted(
        [kind.__qualname__ for kind in kinds] + [f"{name} {version(name)}" for name in packages]
    )


def _read(noted: Any) -> Outcome:
    sizes = {str(device): int(size) for device, size in noted["bytes_per_token"].items()}
    if not sizes or min(sizes.values()) < 1:
        raise ValueError("keys and values take memory")
    return Outcome(
        bytes_per_token=sizes,
        windows={
            int(layer): None if tokens is None else int(tokens)
            for layer, tokens in noted["windows"].items()
        },
        has_kernels=bool(noted["has_kernels"]),
        way=Way(noted["way"]),
        linears=LinearPolicy(**{rows: Form(form) for rows, form in noted["linears"].items()}),
    )


def _code() -> str:
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for file in sorted([*folder.rglob("*.py"), *folder.rglob("*.c")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()
