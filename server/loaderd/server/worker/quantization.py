"""Weights in fewer bits, quantized while a model loads by libraries that transformers integrates.

torchao has integers of 8 and 4 bits, bitsandbytes NormalFloat of 4 bits. Only linear layers are
quantized, and of those not the one that gives the logits. What a library, a device or a dtype
cannot do is refused here by name, before a weight is read.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_bitsandbytes_available, is_torchao_available

from loaderd.server.box.cpu import CPU
from loaderd.server.errors import InvalidArgumentError, UnsupportedOptionError
from loaderd.server.worker import devices
from loaderd.v1.model_pb2 import Quantization

FIELD = "options.quantization"

_GROUP = 32
"""Weights that share a scale where there are 4 bits for each."""
_INSTALL = "install loaderd[quantization]"
_PACKS = "support_avx512bf16_for_cpu"
"""Whether a layer of bitsandbytes, at its first use, packs its weights for such a CPU."""
_PACKED_ROWS = 32


@dataclass(frozen=True, slots=True)
class Quantizer:
    """What quantizes a model's weights while it loads.

    Attributes:
        kind: What it makes of them.
        library: The library that does.
        config: transformers' name for it, an argument of from_pretrained.
        bits: Of a quantized weight, with its share of the scales.
    """

    kind: Quantization.ValueType
    library: str
    config: Any
    bits: float

    @property
    def name(self) -> str:
        """As clients write it."""
        return Quantization.Name(self.kind).removeprefix("QUANTIZATION_").lower()

    def finish(self, model: PreTrainedModel) -> None:
        """Refuses a model of which nothing was quantized, and readies one of which something was.

        Raises:
            UnsupportedOptionError: It has no layer that could be.
        """
        if not any(map(is_quantized, model.parameters())):
            raise UnsupportedOptionError(
                FIELD,
                f"this model has no linear layers that {self.library} can hold as {self.name}",
            )
        for layer in model.modules():
            if getattr(layer, _PACKS, False) and not _can_pack(layer):
                setattr(layer, _PACKS, False)


def choose_quantizer(
    asked: Quantization.ValueType, *, device_map: str, dtype: torch.dtype
) -> Quantizer | None:
    """What does LoadOptions.quantization here; None where nothing is to be quantized.

    Args:
        asked: The option.
        device_map: Which devices compute.
        dtype: Of what is computed.

    Raises:
        InvalidArgumentError: `asked` is no value of `loaderd.v1.Quantization`.
        UnsupportedOptionError: This installation, or such a device, has no such weights.
    """
    if asked == Quantization.QUANTIZATION_UNSPECIFIED:
        return None
    make = _MAKERS.get(asked)
    if make is None:
        raise InvalidArgumentError(FIELD, f"{asked} is no value of loaderd.v1.Quantization")
    return make(devices.kind_of(device_map), dtype)


def quantization_reason(
    model: PreTrainedModel, quantizer: Quantizer | None, *, is_gguf: bool = False
) -> str:
    """What quantized a model's weights, or in which form its files had them; for operators."""
    if is_gguf:
        return "blocks of a GGUF file, unpacked to the dtype"
    if quantizer is None:
        return _form_of_files(model)
    linear = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
    count = sum(map(is_quantized, linear))
    return (
        f"asked for; {count} of {len(linear)} linear layers as {quantizer.name}, "
        f"by {quantizer.library} {version(quantizer.library)}"
    )


def is_quantized(weight: torch.Tensor) -> bool:
    """Whether a weight is something else than a plain tensor of numbers."""
    return type(weight) not in {nn.Parameter, torch.Tensor} or not weight.is_floating_point()


def count_numbers(weight: torch.Tensor) -> int:
    """How many numbers a weight stands for."""
    state = getattr(weight, "quant_state", None)  # bitsandbytes packs the numbers themselves
    return math.prod(weight.shape if state is None else state.shape)


def count_bytes(weight: torch.Tensor) -> int:
    """The memory of a weight, with its scales."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return int(weight.nbytes + state.absmax.nbytes)
    if hasattr(weight, "__tensor_flatten__"):  # torchao's consist of several tensors
        names, _ = weight.__tensor_flatten__()
        return sum(count_bytes(getattr(weight, name)) for name in names)
    return int(weight.nbytes)


def _can_pack(layer: Any) -> bool:
    """Whether packing goes well and loses nothing: it computes in bfloat16, by whole blocks."""
    outputs, inputs = layer.weight.quant_state.shape
    return bool(
        layer.compute_dtype == torch.bfloat16
        and outputs % _PACKED_ROWS == 0
        and inputs % layer.weight.quant_state.blocksize == 0
    )


def _int8(_device: str, _dtype: torch.dtype) -> Quantizer:
    _require_torchao()
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    return Quantizer(Quantization.QUANTIZATION_INT8, "torchao", config, bits=8.5)


def _int4(device: str, dtype: torch.dtype) -> Quantizer:
    _require_torchao()
    from transformers import TorchAoConfig

    # A scale and a zero for each group, both of the dtype.
    bits = 4 + 2 * 8 * dtype.itemsize / _GROUP
    config = TorchAoConfig(_int4_on_cuda(dtype) if device == "cuda" else _int4_on_cpu(device))
    return Quantizer(Quantization.QUANTIZATION_INT4, "torchao", config, bits)


def _int4_on_cuda(dtype: torch.dtype) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    if dtype != torch.bfloat16:
        raise UnsupportedOptionError(FIELD, "int4 on a CUDA device needs the dtype bfloat16")
    if torch.cuda.get_device_capability() < (8, 0):
        raise UnsupportedOptionError(
            FIELD, "int4 needs a CUDA device of compute capability 8.0 or later"
        )
    return Int4WeightOnlyConfig(
        group_size=_GROUP,
        int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D,
        set_inductor_config=False,
    )


def _int4_on_cpu(device: str) -> Any:
    if device != CPU:
        raise UnsupportedOptionError(FIELD, f"torchao has no int4 weights on {device} devices")
    try:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    except ImportError:
        problem = f"torchao {version('torchao')} has no int4 weights on CPUs"
        raise UnsupportedOptionError(FIELD, problem) from None
    return PrototypeInt4WeightOnlyConfig(group_size=_GROUP, set_inductor_config=False)


def _nf4(device: str, dtype: torch.dtype) -> Quantizer:
    if not is_bitsandbytes_available():
        raise UnsupportedOptionError(FIELD, f"bitsandbytes is not installed here; {_INSTALL}")
    if device == "mps":
        raise UnsupportedOptionError(FIELD, "nf4 is not for mps devices")
    if device == CPU and importlib.util.find_spec("kernels") is not None:
        # It would take its product from a repository of the hub, if the cache has that.
        raise UnsupportedOptionError(
            FIELD, "nf4 on a CPU would run code of the hub's where the package kernels is installed"
        )
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    # A float32 scale for each block of 64.
    return Quantizer(Quantization.QUANTIZATION_NF4, "bitsandbytes", config, bits=4.5)


def _require_torchao() -> None:
    if not is_torchao_available():
        raise UnsupportedOptionError(FIELD, f"torchao is not installed here; {_INSTALL}")


_MAKERS: dict[Quantization.ValueType, Callable[[str, torch.dtype], Quantizer]] = {
    Quantization.QUANTIZATION_INT8: _int8,
    Quantization.QUANTIZATION_INT4: _int4,
    Quantization.QUANTIZATION_NF4: _nf4,
}


def _form_of_files(model: PreTrainedModel) -> str:
    own = getattr(model.config, "quantization_config", None)
    if own is None:
        return ""
    method = getattr(own, "quant_method", None) or own.get("quant_method")
    method = getattr(method, "value", method)
    return f"as its files have them, by {method}"
