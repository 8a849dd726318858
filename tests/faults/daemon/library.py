"""The hub library, used as other programs of the box use it: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
patterns = sys.argv[2:] or None
print(snapshot_download(sys.argv[1], allow_patterns=patterns))
"""


def plain_download(
    url: str, cache: Path, repo_id: str, *patterns: str, offline: bool = False
) -> subprocess.CompletedProcess[str]:
    """`snapshot_download` of a repository; its last line is the snapshot's folder."""
    return plain_script(_DOWNLOAD, url, cache, repo_id, *patterns, offline=offline)


def plain_script(
    script: str, url: str, cache: Path, *arguments: str, offline: bool = False
) -> subprocess.CompletedProcess[str]:
    """A script that finds the hub and the cache in its environment."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    own = {"HF_ENDPOINT": url, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1"}
    if offline:
        own["HF_HUB_OFFLINE"] = "1"
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**inherited, **own},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
