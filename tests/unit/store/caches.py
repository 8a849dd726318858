"""Caches and folders made up file by file, in the hub library's layout."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loaderd.server.store.cache import RepoFolder, TreeEntry
from loaderd.server.store.scan import CacheContents, CacheScanner

COMMIT = "a" * 40
OTHER_COMMIT = "b" * 40
CONFIG = b'{"model_type": "llama"}'


def safetensors(size: int = 64, fill: bytes = b"\1") -> bytes:
    """A file of one tensor of `size` bytes."""
    header = {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + fill * size


def index(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"w{i}": shard for i, shard in enumerate(shards)}}).encode()


SMALL_MODEL: dict[str, bytes] = {
    "config.json": CONFIG,
    "model.safetensors": safetensors(),
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"eos_token": "</s>"}',
}
SHARDED_MODEL: dict[str, bytes] = {
    "config.json": CONFIG,
    "model.safetensors.index.json": index("model-1-of-2.safetensors", "model-2-of-2.safetensors"),
    "model-1-of-2.safetensors": safetensors(10),
    "model-2-of-2.safetensors": safetensors(20),
    "tokenizer.json": b"{}",
}


def write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@dataclass(frozen=True)
class MadeUpRepo:
    """A repository of a cache."""

    folder: RepoFolder

    def add(
        self,
        files: Mapping[str, bytes],
        *,
        commit: str = COMMIT,
        refs: tuple[str, ...] = ("main",),
        listing: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Adds a snapshot; `listing` is what the hub says the commit has."""
        for name, content in files.items():
            self._link(name, content, commit)
        for ref in refs:
            self.folder.write_ref(ref, commit)
        if listing is not None:
            self.folder.write_tree(commit, {n: entry(n, c) for n, c in listing.items()})
        return self.folder.snapshot(commit)

    def blob(self, name: str, commit: str = COMMIT) -> Path:
        return (self.folder.snapshot(commit) / name).resolve(strict=True)

    def _link(self, name: str, content: bytes, commit: str) -> None:
        blob = self.folder.blobs / entry(name, content).digest
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        pointer = self.folder.snapshot(commit) / name
        pointer.parent.mkdir(parents=True, exist_ok=True)
        ups = "../" * (2 + name.count("/"))
        pointer.symlink_to(f"{ups}blobs/{blob.name}")


def entry(name: str, content: bytes) -> TreeEntry:
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if name.endswith(".safetensors"):
        return TreeEntry(len(content), "c" * 40, hashlib.sha256(content).hexdigest())
    return TreeEntry(len(content), git)


def made_up_repo(cache_dir: Path, repo_id: str = "org/model") -> MadeUpRepo:
    return MadeUpRepo(RepoFolder(cache_dir, repo_id))


def scan(cache_dir: Path) -> CacheContents:
    """The listing of a cache that nobody looked at before."""
    return CacheScanner(cache_dir).scan()


def move_to_shared_store(blob: Path, cache_dir: Path) -> Path:
    """Puts a blob where several repositories can share it, and a link in its place."""
    store = cache_dir / "blobs"
    store.mkdir(exist_ok=True)
    (store / ".huggingface-shared-blobs").write_text("1\n")
    xet_hash = hashlib.sha256(b"xet" + blob.read_bytes()).hexdigest()
    shared = store / xet_hash[:2] / xet_hash
    shared.parent.mkdir(exist_ok=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    return shared


def open_to_all(folder: Path) -> None:
    """Lets every user into a folder of pytest's, which lets in its owner alone."""
    while folder.stat().st_mode & 0o005 != 0o005:
        folder.chmod(0o755)
        folder = folder.parent
