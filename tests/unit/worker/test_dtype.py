from pathlib import Path

import pytest

from loaderd.server.box.dtype import choose_dtype, cpu_flags
from loaderd.server.errors import InvalidArgumentError
from loaderd.v1.model_pb2 import Dtype

UNSET = Dtype.DTYPE_UNSPECIFIED


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("amx_bf16 avx512_fp16 avx512_bf16", Dtype.DTYPE_BFLOAT16),
        ("avx512_fp16 avx512_bf16", Dtype.DTYPE_FLOAT16),
        ("avx512_bf16 avx512f", Dtype.DTYPE_BFLOAT16),
        ("asimd fphp asimdhp bf16", Dtype.DTYPE_BFLOAT16),
        ("avx2 avx512f f16c", Dtype.DTYPE_FLOAT32),
        ("", Dtype.DTYPE_FLOAT32),
    ],
)
def test_on_a_cpu_the_flags_decide(flags: str, expected: Dtype.ValueType) -> None:
    choice = choose_dtype(UNSET, on_accelerator=False, flags=frozenset(flags.split()))
    assert choice.dtype == expected
    assert "CPU" in choice.reason


def test_accelerators_take_float16() -> None:
    choice = choose_dtype(UNSET, on_accelerator=True, flags=frozenset({"amx_bf16"}))
    assert choice.dtype == Dtype.DTYPE_FLOAT16


@pytest.mark.parametrize("asked", [value for value in Dtype.values() if value != UNSET])
@pytest.mark.parametrize("on_accelerator", [False, True])
def test_what_is_asked_for_is_obeyed(asked: Dtype.ValueType, on_accelerator: bool) -> None:
    choice = choose_dtype(asked, on_accelerator=on_accelerator, flags=frozenset({"amx_bf16"}))
    assert (choice.dtype, choice.reason) == (asked, "asked for")


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"options\.dtype"):
        choose_dtype(99, on_accelerator=False, flags=frozenset())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["flags", "Features"])
def test_flags_are_read_as_linux_lists_them(tmp_path: Path, name: str) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{name}\t\t: fpu avx2 bf16\nbugs\t: spectre\n")
    assert cpu_flags(cpuinfo) == {"fpu", "avx2", "bf16"}


def test_without_cpuinfo_nothing_is_claimed(tmp_path: Path) -> None:
    assert cpu_flags(tmp_path / "absent") == frozenset()
