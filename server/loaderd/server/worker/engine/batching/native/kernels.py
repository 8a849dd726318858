"""The functions of kernels.c, of tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_long, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loaderd.server.worker.engine.batching.caches import cache_folder
from loaderd.server.worker.engine.batching.native.compiler import NotCompiledError, load

_SOURCE = Path(__file__).with_name("kernels.c")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BLOCK = 128
"""Tokens whose scores are computed together, as in kernels.c."""
_MOST_IN_A_HEAD = 16384
"""Numbers and scores of all the queries that share a key: they are on a thread's stack."""


class Rows(NamedTuple):
    """Where tokens are that decode.

    Attributes:
        slots: [rows], int64; where the keys and values of each are.
        positions: [rows], int64; of the tokens in their slots.
    """

    slots: torch.Tensor
    positions: torch.Tensor


@cache
def kernels_of_this_cpu() -> Kernels:
    """Those that all models of this process share; compiled once for each user of a box.

    Raises:
        NotCompiledError: They are not to be had here; the text says why.
    """
    return Kernels(cache_folder("kernels"))


class Kernels:
    """Compiled for this CPU, with torch's threads.

    All tensors are on the CPU, of float32, bfloat16 or float16.

    Args:
        folder: See `compiler.load`.

    Attributes:
        identity: Other kernels, or the same ones from another compiler, have another.

    Raises:
        NotCompiledError: They are not to be had here; the text says why.
    """

    def __init__(self, folder: Path | None) -> None:
        run_parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
        if run_parallel is None:
            raise NotCompiledError("torch does not compute with GNU OpenMP here")
        library = load(_SOURCE, folder)
        self.identity = Path(library._name).stem
        library.use_threads.argtypes = [c_void_p]
        library.use_threads(ctypes.cast(run_parallel, c_void_p))
        self._norm = _function(
            library.add_and_norm, [c_void_p] * 4, [c_long, c_int, c_float, c_int, c_int]
        )
        self._silu = _function(
            library.silu_and_multiply, [c_void_p] * 2, [c_long, c_int, c_int, c_int]
        )
        self._turn = _function(
            library.turn, [c_void_p] * 6, [c_long, c_int, c_int, c_int, c_float, c_int, c_int]
        )
        self._attend = _function(
            library.attend, [c_void_p] * 8, [c_long] * 12, [c_int] * 3, [c_float, c_int]
        )

    def add_and_norm(
        self,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        epsilon: float,
        normed: torch.Tensor,
    ) -> None:
        """Adds to the residual, and takes its root mean square norm.

        Args:
            hidden: [rows, size], float32; changed in place.
            delta: [rows, size], what is added; None for nothing.
            weight: [size], float32.
            epsilon: Added to the mean square.
            normed: [rows, size]; the result.
        """
        rows, size = hidden.shape
        self._norm(
            hidden.data_ptr(),
            None if delta is None else delta.data_ptr(),
            weight.data_ptr(),
            normed.data_ptr(),
            rows,
            size,
            epsilon,
            0 if delta is None else _TYPES[delta.dtype],
            _TYPES[normed.dtype],
            torch.get_num_threads(),
        )

    def silu_and_multiply(self, gate_and_up: torch.Tensor, product: torch.Tensor) -> None:
        """The gate of a perceptron.

        Args:
            gate_and_up: [rows, 2 * size]: the gates, and what they are for.
            product: [rows, size]; the result.
        """
        rows, size = product.shape
        self._silu(
            gate_and_up.data_ptr(),
            product.data_ptr(),
            rows,
            size,
            _TYPES[gate_and_up.dtype],
            _TYPES[product.dtype],
            torch.get_num_threads(),
        )

    def turn(
        self,
        projected: torch.Tensor,
        cosines: torch.Tensor,
        sines: torch.Tensor,
        turned: torch.Tensor,
        *,
        heads: int,
        head_norms: tuple[torch.Tensor, torch.Tensor] | None,
        epsilon: float,
    ) -> None:
        """Normalises queries and keys head by head, where a model does, and turns them.

        Args:
            projected: [rows, (heads + 2 * key heads) * dimensions]: queries, keys, values.
            cosines: [rows, dimensions / 2], float32.
            sines: Alike.
            turned: [rows, heads + 2 * key heads, dimensions]; the result, with values as they are.
            heads: Of queries.
            head_norms: Of queries and of keys, [dimensions] in float32 each; None without.
            epsilon: Of these norms.
        """
        rows, every, dimensions = turned.shape
        of_queries, of_keys = head_norms or (None, None)
        self._turn(
            projected.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            None if of_queries is None else of_queries.data_ptr(),
            None if of_keys is None else of_keys.data_ptr(),
            turned.data_ptr(),
            rows,
            heads,
            (every - heads) // 2,
            dimensions,
            epsilon,
            _TYPES[projected.dtype],
            _TYPES[turned.dtype],
            torch.get_num_threads(),
        )

    def can_attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether `attend` is for these: of one type, and of heads that it has room for."""
        shared = query.shape[1] // key.shape[1]
        return (
            query.dtype == key.dtype == value.dtype
            and query.dtype in _TYPES
            and key.shape == value.shape
            and shared * (key.shape[2] + _BLOCK) <= _MOST_IN_A_HEAD
            and all(tensor.stride(-1) == 1 for tensor in (query, key, value))
        )

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cached: tuple[torch.Tensor, torch.Tensor],
        rows: Rows,
        *,
        window: int | None,
        scaling: float,
    ) -> torch.Tensor:
        """Attention of one token in each of some rows, whose keys and values it writes first.

        Args:
            query: [rows, heads, dimensions]; those for which `can_attend`.
            key: [rows, key heads, dimensions].
            value: Alike.
            cached: Keys and values, [slots, key heads, tokens, dimensions] each, contiguous.
            rows: Where the tokens are.
            window: Most tokens that a token looks back on, itself included; None for all.
            scaling: Of the scores.

        Returns:
            [rows, heads, dimensions].

        Raises:
            MemoryError: There is none.
            IndexError: The cache has no such place, or is for other heads.
        """
        count, heads, dimensions = query.shape
        keys, values = cached
        output = torch.empty((count, heads, dimensions), dtype=query.dtype)
        failed = self._attend(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            output.data_ptr(),
            rows.slots.data_ptr(),
            rows.positions.data_ptr(),
            count,
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            *keys.shape,
            window or 0,
            heads,
            key.shape[1],
            dimensions,
            scaling,
            _TYPES[query.dtype],
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError if failed == 1 else IndexError(f"not in {tuple(keys.shape)}")
        return output


def _function(function: Any, *arguments: Sequence[Any]) -> Any:
    """With its types: those given, and at last how many threads it may use."""
    function.argtypes = [kind for kinds in arguments for kind in kinds] + [c_int]
    return function
