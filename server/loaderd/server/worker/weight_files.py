"""The files that hold a model's weights: which they are, whether they can be read, how much."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open

from loaderd.server.errors import (
    ModelUnsupportedError,
    SnapshotCorruptError,
    SnapshotIncompleteError,
)
from loaderd.server.store.gguf import GgufHeader, read_header
from loaderd.server.store.selection import find_weights, is_gguf, is_index, is_pickle
from loaderd.server.store.weights import check_file, read_shards

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightFiles:
    """The weights of a model in a folder.

    Attributes:
        folder: The folder.
        model: The model's name, for errors.
        listing: The file that stands for all: the only one, or the index.
        shards: The files that hold the weights.
    """

    folder: Path
    model: str
    listing: str
    shards: tuple[str, ...]

    @staticmethod
    def find(
        folder: Path, model: str, *, allow_pickle: bool, file: str | None = None
    ) -> WeightFiles:
        """Finds the weights, and checks them as far as no tensor has to be read.

        Args:
            folder: Where.
            model: The model's name, for errors.
            allow_pickle: Take pickles when there are no safetensors.
            file: The file that holds them, if it is known.

        Raises:
            ModelUnsupportedError: There are none that can be loaded.
            SnapshotIncompleteError: A shard is missing.
            SnapshotCorruptError: The index or a header is damaged.
        """
        names = {path.name for path in folder.iterdir()}
        listing = file or find_weights(names, model, allow_pickle=allow_pickle)
        shards = [listing]
        if is_index(listing):
            shards = sorted(read_shards((folder / listing).read_bytes(), listing, model))
        for shard in shards:
            if not (folder / shard).is_file():
                raise SnapshotIncompleteError(model, shard)
            check_file(folder / shard, shard, model)
        return WeightFiles(folder, model, listing, tuple(shards))

    @property
    def are_pickles(self) -> bool:
        """Whether they are pickles."""
        return is_pickle(self.listing)

    @property
    def gguf_file(self) -> str | None:
        """The GGUF file that they are in; None for all else."""
        return self.listing if is_gguf(self.listing) else None

    @property
    def gguf_header(self) -> GgufHeader:
        """What the GGUF file says of itself."""
        return read_header(self.folder / self.listing, self.listing, self.model)

    @property
    def size_bytes(self) -> int:
        """Bytes of the files."""
        return sum((self.folder / shard).stat().st_size for shard in self.shards)

    def shapes(self) -> list[Sequence[int]]:
        """The shapes of all tensors. Looks into every file, so that none surprises later.

        Raises:
            ModelUnsupportedError: A pickle holds something else than tensors.
            SnapshotCorruptError: A file cannot be read.
        """
        if self.gguf_file is not None:
            return list(self.gguf_header.shapes)
        shapes_of = self._pickled_shapes if self.are_pickles else self._shapes
        return [shape for shard in self.shards for shape in shapes_of(shard)]

    def unreadable(self, file: str) -> SnapshotCorruptError:
        """The error for a file that is damaged."""
        kind = "pickled tensors" if self.are_pickles else "safetensors data"
        return SnapshotCorruptError(self.model, file, kind, "something else")

    def _shapes(self, shard: str) -> Sequence[Sequence[int]]:
        try:
            with safe_open(self.folder / shard, framework="pt") as weights:
                keys = weights.keys()
                return [weights.get_slice(key).get_shape() for key in keys]
        except SafetensorError as error:
            raise self.unreadable(shard) from error

    def _pickled_shapes(self, shard: str) -> Sequence[Sequence[int]]:
        """The shapes of a pickle's tensors; whatever code it holds is not run."""
        try:
            tensors = torch.load(self.folder / shard, map_location="meta", weights_only=True)
        except UnpicklingError as error:
            logger.warning("%s of %s is refused", shard, self.model, exc_info=error)
            raise self._not_only_tensors(shard) from error
        except Exception as error:  # its content is data, and the ways to misread it are many
            raise self.unreadable(shard) from error
        if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
            raise self._not_only_tensors(shard)
        return [tensor.shape for tensor in tensors.values()]

    def _not_only_tensors(self, shard: str) -> ModelUnsupportedError:
        return ModelUnsupportedError(
            self.model, f"its {shard} holds something else than tensors, which is never read"
        )
