"""The policy for a model's number type where the load leaves it open."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loaderd.server.errors import InvalidArgumentError
from loaderd.v1.model_pb2 import Dtype, Quantization

_CPU_RULES = (
    ("amx_bf16", Dtype.DTYPE_BFLOAT16, "the CPU multiplies bfloat16 matrices natively (AMX)"),
    ("avx512_fp16", Dtype.DTYPE_FLOAT16, "the CPU computes float16 natively (AVX-512)"),
    ("avx512_bf16", Dtype.DTYPE_BFLOAT16, "the CPU computes bfloat16 natively (AVX-512)"),
    ("bf16", Dtype.DTYPE_BFLOAT16, "the CPU computes bfloat16 natively (Arm)"),
)
"""Flag of the CPU, the type it speaks for, and why; the fastest matrix multiplication first."""


@dataclass(frozen=True, slots=True)
class DtypeChoice:
    """A number type and the reason for it.

    Attributes:
        dtype: Never unspecified.
        reason: As ModelDetails.dtype_reason tells it.
    """

    dtype: Dtype.ValueType
    reason: str


def choose_dtype(
    asked: Dtype.ValueType,
    *,
    on_accelerator: bool,
    flags: frozenset[str],
    quantization: Quantization.ValueType = Quantization.QUANTIZATION_UNSPECIFIED,
) -> DtypeChoice:
    """Chooses by rule, never by timing, so that one box always chooses alike.

    Args:
        asked: LoadOptions.dtype; DTYPE_UNSPECIFIED for the policy.
        on_accelerator: Whether layers go to an accelerator.
        flags: What the CPU can do, see `cpu_flags`.
        quantization: LoadOptions.quantization.

    Raises:
        InvalidArgumentError: `asked` is not a value of `loaderd.v1.Dtype`.
    """
    if asked not in Dtype.values():
        raise InvalidArgumentError("options.dtype", f"{asked} is no value of loaderd.v1.Dtype")
    if asked != Dtype.DTYPE_UNSPECIFIED:
        return DtypeChoice(asked, "asked for")
    if quantization == Quantization.QUANTIZATION_INT4:
        return DtypeChoice(Dtype.DTYPE_BFLOAT16, "int4 weights are multiplied fastest with it")
    if on_accelerator:
        return DtypeChoice(Dtype.DTYPE_FLOAT16, "default on accelerators")
    for flag, dtype, reason in _CPU_RULES:
        if flag in flags:
            return DtypeChoice(dtype, reason)
    return DtypeChoice(Dtype.DTYPE_FLOAT32, "the CPU computes no 16-bit type natively")


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The instruction sets that Linux lists for this CPU; empty where it does not say."""
    if not cpuinfo.exists():
        return frozenset()
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return frozenset(value.split())
    return frozenset()
