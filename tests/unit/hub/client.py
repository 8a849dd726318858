"""The real client library in a process of its own: it reads its environment at import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hub import Hub

_PROGRAM = """
import json, sys
import huggingface_hub
function, arguments = json.loads(sys.argv[1])
target = huggingface_hub
for name in function.split("."):
    target = getattr(target() if isinstance(target, type) else target, name)
try:
    answer = {"value": str(target(**arguments))}
except Exception as error:
    cause = error.__cause__
    answer = {"error": type(error).__name__, "cause": type(cause).__name__ if cause else None}
print(json.dumps(answer))
"""


@dataclass(frozen=True)
class Answer:
    value: str | None = None
    error: str | None = None
    cause: str | None = None

    @property
    def path(self) -> Path:
        assert self.value is not None, f"the library raised {self.error} from {self.cause}"
        return Path(self.value)


class HubClient:
    """Calls functions of `huggingface_hub` against a hub, with a cache of its own."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.cache = home / "hub"
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "HF_HOME": str(home),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def call(self, function: str, /, **arguments: Any) -> Answer:
        """Calls the function of this name, such as `snapshot_download` or `HfApi.model_info`."""
        command = [sys.executable, "-c", _PROGRAM, json.dumps([function, arguments])]
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return Answer(**json.loads(done.stdout.splitlines()[-1]))

    def download(self, repo_id: str, **arguments: Any) -> Answer:
        return self.call("snapshot_download", repo_id=repo_id, **arguments)
